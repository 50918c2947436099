"""The sites of a fairseq model: every MultiheadAttention, every fc1/fc2 pair."""

from fairseq.modules import MultiheadAttention
from torch import nn

from head_pruning import AttentionSite, FeedForwardSite, UnitMap
from head_pruning.compact.hooks import is_silent
from head_pruning.unit_map import ATTENTION_KINDS

from .surgery import adapt, plan_site


def _kind(name: str, module: MultiheadAttention) -> str:
    if module.encoder_decoder_attention:
        return "decoder_cross"
    return "decoder_self" if "decoder" in name.split(".") else "encoder_self"


def unit_map(model: nn.Module) -> UnitMap:
    """Map a fairseq model.

    The rows are in the order of the published code: encoder self-attention, decoder cross-attention, decoder
    self-attention, each by layer. Modules whose heads or units were all removed are left out.

    Raises:
        HeadPruningError: the model has no MultiheadAttention.
    """
    attention, feed_forward, layers, emptied = [], [], [], []
    for name, module in model.named_modules():
        layer = name.rpartition(".")[0]
        if isinstance(module, MultiheadAttention):
            layers.append(layer)
            if not module.num_heads:
                continue
            attention.append(
                AttentionSite(
                    name=name,
                    kind=_kind(name, module),
                    layer=layer,
                    heads=module.num_heads,
                    head_dim=module.head_dim,
                    out_proj=f"{name}.out_proj",
                    projections=tuple(f"{name}.{part}_proj" for part in "qkv"),
                )
            )
        elif isinstance(getattr(module, "fc1", None), nn.Linear) and isinstance(
            getattr(module, "fc2", None), nn.Linear
        ):
            layers.append(name)
            if is_silent(module.fc2):
                emptied.append(name)
                continue
            feed_forward.append(
                FeedForwardSite(
                    name=f"{name}.ffn",
                    layer=name,
                    width=module.fc1.out_features,
                    in_proj=f"{name}.fc1",
                    out_proj=f"{name}.fc2",
                )
            )
    attention.sort(key=lambda site: ATTENTION_KINDS.index(site.kind))
    ordered = tuple(dict.fromkeys(layers))  # modules are listed in the order in which data goes through them
    sites = tuple(attention), tuple(feed_forward)
    return UnitMap(*sites, ordered, emptied=tuple(emptied), planner=plan_site, adapt=adapt)
