"""The formula that counted MACs are compared with."""


def stack_macs(hidden: int, inner: int, length: int, layers: int = 1, kept: float = 1.0) -> float:
    """MACs of a stack of encoder layers for one example, by formula.

    Per token and layer: ``4 d^2`` for the projections and ``2 s d`` for scores and sums, both times the share of heads
    that is kept, and ``2 d f`` for the feed-forward block.

    Args:
        hidden: d, the width of the model.
        inner: f, the width of the feed-forward block.
        length: s, tokens.
        layers: number of layers.
        kept: share of the heads that stay, wherever they are.
    """
    return layers * length * (kept * (4 * hidden**2 + 2 * length * hidden) + 2 * hidden * inner)
