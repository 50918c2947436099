"""How gates sit on a model, and how K of N are drawn or chosen; methods see only what the session does with gates."""
