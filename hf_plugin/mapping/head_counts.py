"""How many heads an attention module has and how wide they are, checked against its projections."""

from typing import Any, Mapping, Optional, Sequence

from torch import nn

from .layouts import widths

HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_attn_heads", "heads")
GROUPS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
# A head's width in the values comes first: it is the one that the output projection sees.
WIDTHS = ("v_head_dim", "v_channels_per_head", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


def _number(owners: Sequence[Any], names: Sequence[str]) -> Optional[int]:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _told(config: Any, names: Sequence[str], half: str) -> Optional[int]:
    """What a configuration says of one half of a model: its own attribute, or the one for all.

    The one for all is no answer where it is another name of the other half's (``attribute_map``), as Whisper's is.
    """
    own = [f"{half}_{name}" for name in (*names, *(name.removeprefix("num_") for name in names))]
    other = "decoder" if half == "encoder" else "encoder"
    aliases = getattr(config, "attribute_map", None) or {}
    return _number([config], [*own, *(name for name in names if other not in aliases.get(name, name))])


def count_heads(
    modules: Sequence[nn.Module], config: Any, parts: Mapping[str, nn.Module], half: str = "encoder"
) -> tuple[int, int]:
    """Number of prunable heads (key/value groups) and the width of one in the input of the output projection.

    Args:
        modules: the attention module and those inside it that hold its projections; their attributes are read.
        config: the configuration they were built from, read where the modules and the widths of their projections say
            nothing; or None.
        parts: role to projection, see :mod:`hf_plugin.mapping.layouts`.
        half: ``encoder`` or ``decoder``, whose part of the configuration counts.

    Raises:
        ValueError: the attributes are missing or contradict the widths; its text says how.
    """
    width = widths(parts["out"])[0]
    heads, head_dim = _number(modules, HEADS), _number(modules, WIDTHS)
    if heads is None and head_dim is not None and width % head_dim == 0:
        heads = width // head_dim
        told = _told(config, HEADS, half)
        if told is not None and told != heads:
            raise ValueError(f"its configuration says {told} heads, but {width} features of {head_dim} are {heads}")
    if heads is None:
        heads = _told(config, HEADS, half)
    if heads is None:
        raise ValueError("nothing tells how many heads it has")
    if head_dim is None and width % heads == 0:
        head_dim = width // heads
    if heads * (head_dim or 0) != width:
        raise ValueError(f"its output projection reads {width} features, which is not {heads} heads of {head_dim}")
    groups = _groups(modules, config, parts, heads, width // heads, half)
    if groups > heads or heads % groups:
        raise ValueError(f"{heads} heads do not share {groups} key/value heads evenly")
    _check_widths(parts, heads, groups, width // heads)
    return groups, width // groups


def _groups(
    modules: Sequence[nn.Module],
    config: Any,
    parts: Mapping[str, nn.Module],
    heads: int,
    head_dim: int,
    half: str,
) -> int:
    groups = _number(modules, GROUPS)
    per_group = _number(modules, ("num_key_value_groups",))
    if groups is None and per_group is not None:
        groups = max(1, heads // per_group)
    if groups is None:
        groups = _made(parts, heads, head_dim)
    if groups is None and any(getattr(module, "config", None) is config for module in modules):
        groups = _told(config, GROUPS, half)
    return groups or heads


def _made(parts: Mapping[str, nn.Module], heads: int, head_dim: int) -> Optional[int]:
    """How many heads the projection of values makes; None where there is none, or its width is not of so many."""
    role = next((role for role in ("v", "kv", "qkv") if role in parts), None)
    if role is None:
        return None
    made, rest = divmod(widths(parts[role])[1], head_dim)
    groups, odd = {"v": (made, 0), "kv": divmod(made, 2), "qkv": divmod(made - heads, 2)}[role]
    return groups if groups > 0 and not (rest or odd) else None


def _check_widths(parts: Mapping[str, nn.Module], heads: int, groups: int, head_dim: int) -> None:
    expected = {
        "v": groups * head_dim,
        "kv": 2 * groups * head_dim,
        "qkv": (heads + 2 * groups) * head_dim,
    }
    for role, wide in expected.items():
        if role in parts and widths(parts[role])[1] != wide:
            raise ValueError(
                f"its projection of {'/'.join(role)} makes {widths(parts[role])[1]} features, not {wide} for "
                f"{groups} heads of {head_dim}"
            )
    if "latent" in parts and (groups != heads or widths(parts["latent"])[1] % heads):
        raise ValueError(f"its latent projection makes {widths(parts['latent'])[1]} features for {heads} heads")
