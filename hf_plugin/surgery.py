"""What of a transformers model belongs to which head: the plans of the surgery, by projection layout."""

from torch import nn

from head_pruning import AttentionSite
from head_pruning.surgery import SitePlan, columns_of, rows_of

# Attributes that tell how many heads a module has, or how many features all of its heads have together.
COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads")
WIDTHS = ("all_head_size", "inner_dim")


def plan_site(model: nn.Module, site: AttentionSite) -> SitePlan:
    """The plan of one site of a transformers model."""
    core_name = site.projections[0].rpartition(".")[0]
    core = model.get_submodule(core_name)
    tensors = columns_of(model, site.out_proj, ((1, site.head_dim),))
    for name in site.projections:
        module = model.get_submodule(name)
        wide = module.weight.shape[1 if hasattr(module, "nf") else 0]
        tensors += rows_of(model, name, ((1, wide // site.heads),))
    counts = []
    for attribute in (*COUNTS, *WIDTHS):
        value = getattr(core, attribute, None)
        if isinstance(value, int) and value % site.heads == 0:
            counts.append((f"{core_name}.{attribute}", value // site.heads))
    inside = site.out_proj.startswith(f"{core_name}.")
    options = {
        "out": site.out_proj[len(core_name) + 1 :] if inside else None,
        "after": [],
        "returns": 2,
        "cache": site.kind == "decoder_self",
        "drop": [name[len(core_name) + 1 :] for name in site.projections],
    }
    return SitePlan(tuple(tensors), tuple(counts), empty=(core_name, options))
