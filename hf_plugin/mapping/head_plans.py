"""What of a transformers model belongs to which head: the plans of the surgery, by projection layout."""

import ast
import re
from typing import Any, Iterator, Optional

import torch
from torch import nn

from head_pruning import AttentionSite, FeedForwardSite
from head_pruning.compact.hooks import mixes_positions
from head_pruning.surgery.plans import Blocks, SitePlan, columns_of, rows_of, unit_plan
from head_pruning.unit_map import Site

from .forward_source import Forward, names_in, read_forward, without_heads
from .head_counts import GROUPS, HEADS
from .layouts import FUSED_ROWS, HEAD_PARAMETERS, PARTS, SHARED_PARAMETERS

# Attributes that tell how many features all heads of a module have together; the second kind may also mean the width
# of the module's input, and counts where the forward reshapes to it.
WIDTHS = ("all_head_size", "inner_dim", "split_size", "kv_dim")
AMBIGUOUS_WIDTHS = ("embed_dim", "hidden_size", "d_model", "d_model_size", "dim", "head_size")
# Where a forward reads the width of the input off a tensor and reshapes to it, or to its share per head.
READ_WIDTH = re.compile(
    r"\.(view|reshape)\([^()]*((?<!self\.)\b(embed_dim|hidden_size|hidden_dim)|// self\.num_(attention_)?heads)\s*\)"
)
# Arguments with a slice per head: the heads' dimension, and whether the examples come first in it.
HEAD_ARGUMENTS = {
    "position_bias": (-3, False),
    "relative_position_bias": (-3, False),
    "alibi": (-3, True),
    "extended_predict_attention_mask": (-4, False),  # ProphetNet
}
# Modules around attention that make a bias per head, which is added to the mask.
BIASES = ("relative_position_bias", "shared_position_bias")


class _Refused(Exception):
    """Why a site cannot be cut."""


def plan_site(model: nn.Module, site: Site) -> SitePlan:
    """The plan of one site of a transformers model; its ``refuse`` says why where it has none."""
    try:
        for name in (*site.projections, site.out_proj):
            _check_projection(name, model.get_submodule(name))
        return unit_plan(model, site) if isinstance(site, FeedForwardSite) else _plan(model, site)
    except _Refused as reason:
        return SitePlan((), refuse=str(reason))


def core_of(site: AttentionSite) -> str:
    """The name of the module that holds the site's projections and attends."""
    holders = [name.removesuffix(".linear").rpartition(".")[0] for name in site.projections]
    return min(holders, key=len)


def _plan(model: nn.Module, site: AttentionSite) -> SitePlan:
    if not site.projections:
        raise _Refused(
            "it names no projections, in whose rows the heads lie; name those of query, key and value in its "
            "AttentionSite (projections=)"
        )
    name = core_of(site)
    core = model.get_submodule(name)
    forward = read_forward(type(core))
    norms = _norms_of_all(model, site, name)
    rows = {each: _rows(model, site, each) for each in site.projections if each not in norms.values()}
    others = _other_tensors(model, site, name, tuple(norms))
    hooks = (*_takes(model, site, norms), *_hooks(model, site, name, site.out_proj[len(name) + 1 :]))
    per_group = 1 if others or hooks else _per_group(site, rows)
    tensors = columns_of(model, site.out_proj, _of_queries(((1, site.head_dim),), per_group))
    for projection, blocks in rows.items():
        queries = _of_queries(blocks[:1], per_group) if projection == site.projections[0] else blocks[:1]
        tensors += rows_of(model, projection, (*queries, *blocks[1:]))
    tensors += others
    out = site.out_proj[len(name) + 1 :] if site.out_proj.startswith(f"{name}.") else None
    drop = [whole[len(name) + 1 :] for whole in (*site.projections, *norms)]
    drop += [options["table"] for kind, _, options in hooks if kind == "rearrange"]
    drop += [tensor[len(name) + 1 :] for tensor, _, _ in tensors if tensor.startswith(f"{name}.")]
    drop = [each for each in dict.fromkeys(drop) if out is None or not each.startswith(f"{out}.")]
    drop = [each for each in drop if not any(each.startswith(f"{other}.") for other in drop)]
    options = without_heads(core, out, drop, site.kind, "position_bias" if _makes_shared_bias(core) else None)
    empty = (site.out_proj, None) if options is None else (name, options)
    counts = tuple(_counts(core, name, site, forward, per_group))
    return SitePlan(tuple(tensors), counts, hooks, empty, per_group=per_group)


def _per_group(site: AttentionSite, rows: dict[str, Blocks]) -> int:
    """How many query heads share a key, where they lie apart from it; else 1."""
    value = list(rows.values())[-1][-1][1]
    apart = len(rows) == 3 or [len(blocks) for blocks in rows.values()] == [3]
    return site.head_dim // value if apart and site.head_dim % value == 0 else 1


def _of_queries(blocks: Blocks, per_group: int) -> Blocks:
    """Blocks of groups as blocks of their query heads."""
    return tuple((2, width // per_group) for _, width in blocks) if per_group > 1 else blocks


def _check_projection(name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if hasattr(module, "get_base_layer"):
        raise _Refused(
            f"{name} carries an adapter; call merge_and_unload first and prune the model that it returns, or "
            "hf_plugin.merge_and_cut, which does both"
        )
    own = isinstance(module._parameters.get("weight"), nn.Parameter)
    if not own or weight is None or not weight.is_floating_point():
        raise _Refused(
            f"{name} is a {type(module).__name__}, whose weight is not its own (load the model without "
            "quantization first)"
        )


def _shape(projection: Any) -> torch.Size:
    """Of its weight."""
    return projection.weight.shape


def _is_conv1d(module: nn.Module) -> bool:
    return hasattr(module, "nf")


def _rows(model: nn.Module, site: AttentionSite, name: str) -> Blocks:
    """How the heads lie in the rows of a projection."""
    module = model.get_submodule(name)
    wide = _shape(module)[1 if _is_conv1d(module) else 0]
    if wide % site.heads:
        raise _Refused(f"{wide} rows of {name} are not evenly those of {site.heads} heads")
    each = wide // site.heads
    count = len(site.projections)
    leaf, out = name.rpartition(".")[2], site.out_proj.rpartition(".")[2]
    fused = count == 1 or (count == 2 and leaf in ("c_attn", "to_kv") and name == site.projections[1])
    if not fused:
        if count == 2 and leaf not in ("kv_b_proj", "k_proj", "v_proj") and name == site.projections[1]:
            raise _Refused(f"it is not known how the heads lie in {name}")
        return ((1, each),)
    kind = FUSED_ROWS.get(f"{leaf} {out}", FUSED_ROWS.get(leaf))
    if kind is None:
        raise _Refused(f"it is not known how the heads lie in {name}")
    if leaf == "c_attn" and not _is_conv1d(module) and count == 1:
        kind = "heads"
    if kind == "heads" or site.heads == 1:
        return ((1, each),)
    if kind == "parts" and "mp_num = 4" not in read_forward(type(model.get_submodule(core_of(site)))).text:
        raise _Refused(f"it is not known how the heads lie in {name}")
    if kind == "parts":
        of = site.heads // PARTS
        return tuple((1, each // 3, part * of, part * of + of) for part in range(PARTS) for _ in range(3))
    if count == 2:
        return ((1, each // 2),) * 2
    key = (each - site.head_dim) // 2
    return (1, site.head_dim), (1, key), (1, key)


def _norms_of_all(model: nn.Module, site: AttentionSite, core: str) -> dict[str, str]:
    """Norms over the queries or the keys of all heads at once, with the projections that they read."""
    if len(site.projections) != 3:
        return {}
    query, key, value = site.projections
    sizes = [_shape(model.get_submodule(projection))[0] for projection in site.projections]
    found = {}
    for name, module in model.get_submodule(core).named_modules():
        leaf = re.match(r"(?:(q)|k)(?:uery|ey)?(?:_|$|norm|layer)", name.rpartition(".")[2])
        parameters = list(module.parameters(recurse=False))
        if leaf and "Norm" in type(module).__name__ and parameters:
            size = sizes[0 if leaf[1] else 1]
            if size > sizes[2] // site.heads and {tuple(each.shape) for each in parameters} == {(size,)}:
                found[f"{core}.{name}"] = query if leaf[1] else key
    return found


def _takes(model: nn.Module, site: AttentionSite, norms: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for norm, projection in norms.items():
        yield "take", norm, {"width": _shape(model.get_submodule(projection))[0] // site.heads}


def _other_tensors(
    model: nn.Module, site: AttentionSite, core: str, norms: tuple[str, ...]
) -> list[tuple[str, int, Blocks]]:
    """The tensors with slices per head that are no projections, nor ``norms`` of all heads. Raises _Refused for
    parameters that are not known.
    """
    projections = [*site.projections, site.out_proj, *norms]
    module = model.get_submodule(core)
    if _makes_shared_bias(module):
        projections.append(f"{core}.relative_attention_bias")
    if hasattr(module, "relative_pos_embeddings") and not mixes_positions(type(module)):
        raise _Refused("it is not known how its code reads the relative positions")
    if getattr(module, "init_option", "") == "original" and module.num_landmarks != module.seq_len:
        raise _Refused("its inverse starts from the largest value of all heads")
    found: dict[str, tuple[str, int, Blocks]] = {}
    for name, parameter in module.named_parameters():
        full = f"{core}.{name}"
        if any(full.startswith(f"{projection}.") for projection in projections) or SHARED_PARAMETERS.match(name):
            continue
        where = next((where for names, where in HEAD_PARAMETERS.items() if _named(names, name)), None)
        if isinstance(where, int):
            blocks = ((1, _per_head(parameter.shape[where], site, full)),)
            found[full] = (full, where, blocks)
        elif where is not None:
            projection = full.rpartition(".")[0]
            wide = _shape(model.get_submodule(projection))[0]
            blocks = ((1, _per_head(wide, site, full)),)
            found.update({entry[0]: entry for entry in rows_of(model, projection, blocks)})
        elif _of_each_head(model, site, full, parameter):
            found[full] = (full, 0, ((1, _per_head(parameter.shape[0], site, full)),))
    return list(found.values())


def _makes_shared_bias(core: nn.Module) -> bool:
    """Whether the module has the table of a position bias that other layers use too."""
    return bool(getattr(core, "has_relative_attention_bias", False)) and (
        "position_bias" in read_forward(type(core)).parameters
    )


def _named(names: str, parameter: str) -> bool:
    return re.fullmatch(rf"(?:{names})(\.weight|\.bias)?", parameter) is not None


def _per_head(size: int, site: AttentionSite, name: str) -> int:
    if size % site.heads:
        raise _Refused(f"{name} has {size} slices for {site.heads} heads")
    return size // site.heads


def _of_each_head(model: nn.Module, site: AttentionSite, name: str, parameter: nn.Parameter) -> bool:
    """Whether a norm of queries or keys has a row per head. Raises _Refused where it is one norm of all heads."""
    module = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[0].rpartition(".")[2]
    if "Norm" not in type(module).__name__ or not re.match(r"(q|k|qk|query|key|v|value)(_|$|norm|layer)", leaf):
        raise _Refused(f"it is not known which of its heads use the parameter {name}")
    if parameter.ndim == 2 and len(getattr(module, "normalized_shape", "1")) == 1:
        return True
    widths = {_shape(model.get_submodule(p))[0] // site.heads for p in site.projections}
    if parameter.ndim == 1 and any(width % parameter.shape[0] == 0 for width in widths):
        return False
    raise _Refused(f"{name} normalizes over all heads at once")


def _counts(core: nn.Module, name: str, site: AttentionSite, forward: Forward, per_group: int) -> Iterator[tuple]:
    whole = site.heads * site.head_dim
    attributes = [*HEADS, *GROUPS, *WIDTHS]
    for attribute in AMBIGUOUS_WIDTHS:
        reshaped = rf"(\.(view|reshape|split)\([^()]*|\()self\.{attribute}\b,?[ \w=]*\)"
        if getattr(core, attribute, None) == whole and re.search(reshaped, forward.text):
            attributes.append(attribute)
    owners: list[tuple[str, Any, list[str]]] = [(name, core, list(dict.fromkeys(attributes)))]
    read = names_in(forward.text, "self.config")
    owners.append((f"{name}.config", getattr(core, "config", None), sorted(read & {*HEADS, *GROUPS})))
    for path, owner, names in owners:
        for attribute in names:
            value = getattr(owner, attribute, None)
            if attribute in HEADS and _takes_input_apart(core, forward):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not value or value % site.heads:
                continue
            if per_group > 1 and attribute not in (*GROUPS, "kv_dim"):
                yield f"{path}.{attribute}", value // (site.heads * per_group), "queries"
            else:
                yield f"{path}.{attribute}", value // site.heads
    if per_group > 1 and hasattr(core, "num_key_value_groups"):
        yield f"{name}.num_key_value_groups", per_group, "per_group"
    conv = getattr(core, "conv", None)
    if isinstance(conv, nn.Conv2d) and conv.groups == site.heads:
        for attribute in ("groups", "in_channels", "out_channels"):
            yield f"{name}.conv.{attribute}", getattr(conv, attribute) // site.heads


def _takes_input_apart(core: nn.Module, forward: Forward) -> bool:
    """Whether the number of heads says how the input is made of them (rotary conformers)."""
    if getattr(core, "position_embeddings_type", None) != "rotary":
        return False
    if forward.tree is not None and "self.num_heads" in ast.unparse(forward.tree):
        raise _Refused("its code takes its input and its heads apart by the same number")
    return True


def _hooks(
    model: nn.Module, site: AttentionSite, name: str, out: Optional[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    core = model.get_submodule(name)
    forward = read_forward(type(core))
    if READ_WIDTH.search(forward.text):
        yield "reshape", name, {"width": site.head_dim}
    arguments = {argument: where for argument, where in HEAD_ARGUMENTS.items() if argument in forward.parameters}
    if _mask_per_head(model, site, forward):
        arguments["attention_mask"] = (-3, False)
    for argument, (dim, folded) in arguments.items():
        if argument in forward.parameters:
            position = forward.parameters.index(argument)
            width = _queries(core) // site.heads if "alibi" in forward.parameters else 1
            yield (
                "select",
                name,
                {"argument": argument, "position": position, "dim": dim, "folded": folded, "width": width},
            )
    if hasattr(core, "has_relative_attention_bias") and "position_bias" in forward.parameters:
        table = "relative_attention_bias" if _makes_shared_bias(core) else None
        yield "shared_bias", name, {"output": 1, "table": table}
    if hasattr(core, "relative_pos_embeddings"):
        yield "rearrange", name, {"table": "relative_pos_embeddings", "buckets": core.num_buckets}
    leaf = site.projections[0].rpartition(".")[2]
    if FUSED_ROWS.get(f"{leaf} {out}") == "parts":
        options = {"parts": PARTS, "blocks": 3, "width": site.head_dim, "projection": leaf, "out": out}
        yield "arrange", name, options


def _queries(core: nn.Module) -> int:
    return next(getattr(core, name) for name in HEADS if isinstance(getattr(core, name, None), int))


def _mask_per_head(model: nn.Module, site: AttentionSite, forward: Forward) -> bool:
    """Whether the attention mask may come with a slice per head: ProphetNet's does, others with a bias added."""
    if "num_attn_heads, 1, src_len" in forward.text:
        return True
    if {"alibi", "extended_predict_attention_mask"} & set(forward.parameters):
        return True
    path = site.name
    while path:
        path = path.rpartition(".")[0]
        if any(getattr(model.get_submodule(path), name, None) is not None for name in BIASES):
            return True
    return False
