"""What a recipe of removed heads must be, checked before anything is built of it."""

from typing import Any, Mapping

from .shapes import Either, Rest, Whole, conform

#: No model has more heads: a file that claims more is damaged, and is refused before an array is made of them.
MAX_HEADS = 1 << 20
#: The attributes that say how many heads a module has and how wide they are, and those of its convolution.
COUNTED = frozenset(
    "all_head_size inner_dim split_size kv_dim key_value_proj_dim embed_dim hidden_size d_model d_model_size dim "
    "num_key_value_groups groups in_channels out_channels".split()
)

_HEADS, _SIZE = Whole(0, MAX_HEADS), Whole(0, 1 << 31)
_NAMES = [str]
_BLOCK = Either((Whole(0, 2), _SIZE), (Whole(1, 1), _SIZE, _HEADS, _HEADS))
_PLACE = (str, Either(Whole(0, 1000), None), Rest(object))
_NO_HEADS = {
    "drop": _NAMES,
    "inputs?": [_PLACE],
    "out?": Either(None, str),
    "after?": _NAMES,
    "residual?": Either(None, _PLACE),
    "norm?": Either(None, str),
    "returns?": Either(None, [Either(None, _PLACE)]),
    "attentions?": (Either(None, _PLACE), Whole(0, 1000)),
    "weights?": [Whole(0, 1000)],
    "cache?": Either(None, (str, Either(Whole(0, 1000), None), str, Rest(object))),
    "streams?": Either(None, str),
    "bias?": Either(None, _PLACE),
}
_SITE = {
    "heads": _HEADS,
    "kept": [_HEADS],
    "tensors": [(str, Whole(0, 9), [_BLOCK])],
    "counts": [(str, _SIZE, Rest(str))],
    "hooks": [(str, str, dict)],
    "empty": Either(None, (str, Either(None, dict))),
    "per_group?": Whole(1, MAX_HEADS),
    "queries?": Either(None, [_HEADS]),
    "expanded?": bool,
    "dummy?": Either(None, _HEADS),
}
#: What :meth:`head_pruning.UnitMap.to_dict` gives.
UNIT_MAP = {
    "attention": [
        {
            "name": str,
            "kind": str,
            "layer": str,
            "heads": _HEADS,
            "head_dim": _SIZE,
            "out_proj": str,
            "projections?": _NAMES,
        }
    ],
    "feed_forward": [
        {"name": str, "layer": str, "width": _HEADS, "in_proj": str, "out_proj": str, "gates?": _NAMES},
    ],
    "experts?": [
        {"name": str, "layer": str, "weights": _NAMES, "biases?": _NAMES, "transposed?": Either(None, bool)},
    ],
    "layers?": _NAMES,
    "units?": str,
}


def check_recipe(recipe: Any) -> Mapping[str, Any]:
    """The recipe. Raises ValueError, naming the place, unless it is one that a model could have been saved with.

    What it says of tensors is checked against them when it is applied.
    """
    conform(recipe, {"version": int, "unit_map": UNIT_MAP, "sites": {str: _SITE}}, "the recipe")
    known = {block["name"]: block["width"] for block in recipe["unit_map"]["feed_forward"]}
    known |= {unit["name"]: unit["heads"] for unit in recipe["unit_map"]["attention"]}
    total = sum(unit["heads"] for unit in recipe["unit_map"]["attention"])
    if total > MAX_HEADS:
        raise ValueError(f"the recipe has {total} heads")
    for name, site in recipe["sites"].items():
        heads, of = site["heads"], site.get("per_group", 1)
        if known.get(name) != heads:
            raise ValueError(f"{name} has {heads} heads in one place and {known.get(name)} in another")
        if of * heads > MAX_HEADS:
            raise ValueError(f"{name} has {of} query heads for each of {heads}")
        for listed, number in ((site["kept"], heads), (site.get("queries") or [], heads * of)):
            if sorted(set(listed)) != list(listed) or not all(head < number for head in listed):
                raise ValueError(f"{name} cannot keep the heads {listed!s:.80} of {number}")
        if not site["kept"] and site["empty"] is None or (site.get("dummy") or 0) >= heads > 0:
            raise ValueError(f"{name} cannot lose all of its heads")
        if site["empty"] is not None and site["empty"][1] is not None:
            conform(site["empty"][1], _NO_HEADS, f"what is left of {name}")
        odd = [count[0] for count in site["counts"] if not _is_count(count[0].rpartition(".")[2])]
        odd += [str(more) for _, _, *more in site["counts"] if more not in ([], ["queries"], ["per_group"])]
        if odd:
            raise ValueError(f"{odd[0]} is no count of heads")
    return recipe


def _is_count(attribute: str) -> bool:
    return attribute in COUNTED or "head" in attribute
