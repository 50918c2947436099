"""How masks of millions of weights are drawn fast; methods see only :class:`.portions.Portion`."""
