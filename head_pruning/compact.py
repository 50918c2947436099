"""The shape of a model whose heads are removed: applying a recipe to a model of the original shape.

This file imports nothing but torch, and :mod:`head_pruning.returned`: a copy of both travels with compact checkpoints,
so that they load without the package. A recipe is JSON::

    {"version": 2, "unit_map": {...}, "sites": {"encoder.layer.0.attention": {
        "heads": 12, "kept": [0, 7],
        "tensors": [["encoder.layer.0.attention.self.query.weight", 0, [[1, 64]]], ...],
        "counts": [["encoder.layer.0.attention.self.num_attention_heads", 1], ...],
        "hooks": [["select", "encoder.layer.0.attention.self", {"argument": "position_bias", ...}], ...],
        "empty": ["encoder.layer.0.attention.self", {...}]}}}

``kept`` are the heads that stay, numbered as in the original model, whose sites ``unit_map`` lists. ``tensors``: name,
dimension and the blocks that the dimension is made of; ``[1, width]`` is so many slices of every head, head after
head, ``[1, width, first, end]`` of the heads from ``first`` to before ``end`` only, ``[0, width]`` so many that all
heads share; ``[2, width]`` is so many slices of every query head, where query heads share keys (``per_group`` of them
each). ``counts``: attributes and what each head adds to them, or with ``"queries"`` each query head; a last
``config.`` is the module's own view of its configuration. ``hooks``: see :data:`HOOKS`. ``empty``: what is left when
no head stays: a module that becomes :class:`NoHeads` and its options; without options, the output projection of a site
that keeps the head ``dummy`` then, whose output counts as zero. ``queries``, where heads are groups that lost single
query heads: the query heads that stay; ``expanded``: keys and values are repeated, one for each of them.
"""

import ast
import copy
import inspect
import re
from typing import Any, Iterable, Mapping, Optional, Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from head_pruning.returned import parsed_forward, placed, return_options, returned_values

VERSION = 2
# The versions of recipes. In the first no module that makes a position bias can lose all heads, and no projection with
# heads stays whole.
READABLE = (1, 2)
HEADS, QUERIES = 1, 2  # kinds of blocks
ATTRIBUTE = "_removed_heads"  # a plain attribute of the model: its recipe
HOOK_ATTRIBUTE = "_head_hooks"  # of a module: its hooks by kind and argument


class HeadHook:
    """What every kind of hook is told when a recipe is applied.

    Attributes:
        heads: H of the original.
        kept: the heads that stay.
    """

    heads: int = 0
    kept: Sequence[int] = ()


class Select(HeadHook):
    """Forward pre-hook: of one argument keep the slices of the heads that stay.

    Args:
        argument: its name.
        position: its position among the positional arguments, or None.
        dim: the dimension of the heads, counted from the last.
        folded: whether examples and heads may share that dimension, examples first.
        width: slices per head.
    """

    def __init__(self, argument: str, position: Optional[int], dim: int, folded: bool, width: int) -> None:
        self.argument, self.position, self.dim, self.folded, self.width = argument, position, dim, folded, width

    def attach(self, module: nn.Module) -> list:
        return [module.register_forward_pre_hook(self, with_kwargs=True)]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs.get(self.argument) is not None:
            kwargs = {**kwargs, self.argument: self.taken(kwargs[self.argument])}
        elif self.position is not None and len(args) > self.position and args[self.position] is not None:
            args = (*args[: self.position], self.taken(args[self.position]), *args[self.position + 1 :])
        return args, kwargs

    def taken(self, whole: Any) -> Any:
        """The slices that stay; what has no slice per head is shared by all."""
        if not isinstance(whole, torch.Tensor) or whole.ndim < -self.dim:
            return whole
        dim, size = self.dim % whole.ndim, self.heads * self.width
        index = _index(slices([(1, self.width)], range(self.heads), self.kept), whole.device)
        if whole.shape[dim] == size:
            taken = whole.index_select(dim, index)
            taken.of_all_heads = whole  # for the layers to come, see SharedBias
            return taken
        if self.folded and whole.shape[dim] % size == 0:
            return whole.unflatten(dim, (-1, size)).index_select(dim + 1, index).flatten(dim, dim + 1)
        return whole


class Take(HeadHook):
    """Forward hook of a norm over the queries or keys of all heads, whose projection stays whole: hand on those of the
    heads that stay.

    Args:
        width: features of one head.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def attach(self, module: nn.Module) -> list:
        return [module.register_forward_hook(self)]

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        index = _index(self.kept, output.device)
        return output.unflatten(-1, (self.heads, self.width)).index_select(-2, index).flatten(-2)


class Rearrange(HeadHook):
    """For ProphetNet's n-gram attention, which reads its table of relative positions in another order than it is in.

    Rows of its streams, ``[examples, tokens, streams, heads]``, are read as ``[examples, streams, heads, tokens]``, so
    that heads read what was meant for others. The table therefore stays whole, and its output becomes one in which
    each head that stays finds what it read in the original.

    Args:
        table: the projection within the module; its output is ``[..., buckets, heads]``, flat.
        buckets: number of buckets.
    """

    def __init__(self, table: str, buckets: int) -> None:
        self.table, self.buckets = table, buckets

    def attach(self, module: nn.Module) -> list:
        if not mixes_positions(type(module)):
            raise ValueError(f"it is not known how {type(module).__name__} reads its relative positions")
        return [module.get_submodule(self.table).register_forward_hook(self)]

    def __call__(self, table: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        index = _index(self.kept, output.device)
        values = output.unflatten(-1, (self.buckets, self.heads))
        if values.ndim == 4:  # the main stream
            return values.index_select(-1, index).flatten(-2)
        examples, streams, tokens = values.shape[:3]
        # Through one dimension: from one shape to the other in one step, torch.export wants even lengths.
        rows = values.permute(0, 2, 1, 4, 3).flatten(0, 3)
        read = rows.unflatten(0, (examples, streams, self.heads, tokens)).index_select(2, index)
        stay = read.flatten(0, 3).unflatten(0, (examples, tokens, streams, len(self.kept)))
        return stay.permute(0, 2, 1, 4, 3).flatten(-2)


def mixes_positions(kind: type) -> bool:
    """Whether a class reads its relative positions as :class:`Rearrange` says; false without its source, too."""
    try:
        text = inspect.getsource(kind.get_predict_relative_pos_embeddings)
    except (AttributeError, OSError, TypeError):
        return False
    flat = r"(\w+) = \1\.permute\(0, 2, 1, 4, 3\)\s+(#.*\s+)*\1 = \1\.reshape\(-1, self\.num_buckets\)"
    return re.search(flat, text) is not None


class SharedBias(HeadHook):
    """A position bias that one layer returns for the layers to come, which have other heads: return that of all heads.

    Where the layer was given the bias, it is the one that :class:`Select` got. Where the layer made it, it is what its
    table of all heads says, plus whatever was added for all heads alike (a mask).

    Args:
        output: position of the bias among the values that the module returns.
        table: the embedding within the module whose output is ``[queries, keys, heads]``; None: the bias is the same
            for all heads.
    """

    def __init__(self, output: int, table: Optional[str]) -> None:
        self.output, self.table = output, table
        self.whole: dict[torch.device, torch.Tensor] = {}

    def attach(self, module: nn.Module) -> list:
        handles = [module.register_forward_hook(self)]
        if self.table is not None:
            handles.append(module.get_submodule(self.table).register_forward_hook(self.read))
        return handles

    def read(self, table: nn.Module, args: tuple, values: torch.Tensor) -> torch.Tensor:
        """Forward hook of the table: what it says of the heads that stay."""
        self.whole[values.device] = values
        return values.index_select(-1, _index(self.kept, values.device))

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        bias = output[self.output]
        whole = self.whole.pop(bias.device, None) if isinstance(bias, torch.Tensor) else None
        if not isinstance(bias, torch.Tensor):
            return output
        if hasattr(bias, "of_all_heads"):
            full = bias.of_all_heads
        elif whole is None:
            full = bias[..., :1, :, :].expand(*bias.shape[:-3], self.heads, *bias.shape[-2:])
        else:
            whole = whole.permute(2, 0, 1)[:, -bias.shape[-2] :, :]
            added = (bias[..., :1, :, :] - whole[self.kept[:1]]).detach()
            full = whole + added
        return (*output[: self.output], full, *output[self.output + 1 :])


class Reshape(HeadHook):
    """Inside a module's forward, reshape to what the heads that stay have where the width of all is asked for.

    For modules that merge heads into the width of their input, or divide it by the number of heads.

    Args:
        width: features of one head.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    def attach(self, module: nn.Module) -> list:
        return [
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple) -> None:
        _Reshaping(self.heads * self.width, len(self.kept)).__enter__()

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        _Reshaping(0, 1).__exit__(None, None, None)  # leaves the innermost mode, whichever object says so


class _Reshaping(TorchFunctionMode):
    def __init__(self, whole: int, heads: int) -> None:
        super().__init__()
        self.whole, self.heads = whole, heads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        if func in (torch.Tensor.view, torch.Tensor.reshape) and isinstance(args[-1], (int, tuple)):
            *leading, last = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            if leading and last in (self.whole, self.whole // self.heads):
                size = 1
                for extent in leading:
                    size *= extent
                if size > 0 and args[0].numel() != size * last and args[0].numel() % size == 0:
                    args = (args[0], *leading, args[0].numel() // size)
        return func(*args, **(kwargs or {}))


class Arrange(HeadHook):
    """Hooks for code that takes a fused projection apart into a fixed number of parts of equally many heads: its
    activations get dummy heads up to the next multiple, which the output projection does not read.

    Args:
        parts: number of parts; each is made of blocks with a slice per head of the part.
        blocks: number of blocks in a part.
        width: features of one head in each block, and in the input of the output projection.
        projection: the fused projection within the module.
        out: the output projection within the module.
    """

    def __init__(self, parts: int, blocks: int, width: int, projection: str, out: str) -> None:
        self.parts, self.blocks, self.width = parts, blocks, width
        self.projection, self.out = projection, out

    def attach(self, module: nn.Module) -> list:
        return [
            module.get_submodule(self.projection).register_forward_hook(self.pad),
            module.get_submodule(self.out).register_forward_pre_hook(self.narrow),
        ]

    def padded(self) -> int:
        """Number of heads that the module computes with."""
        return -(-len(self.kept) // self.parts) * self.parts

    def pad(self, projection: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """From the parts that the heads had in the original to parts of equally many heads."""
        per_part, now = self.heads // self.parts, self.padded() // self.parts
        order = sorted(
            ((head // per_part, block, head) for head in self.kept for block in range(self.blocks)),
        )
        found = {(block, head): piece for (_, block, head), piece in zip(order, output.split(self.width, -1))}
        dummy = output.new_zeros(*output.shape[:-1], self.width)
        heads = [*self.kept, *[None] * (self.padded() - len(self.kept))]
        pieces = [
            found.get((block, head), dummy)
            for part in range(self.parts)
            for block in range(self.blocks)
            for head in heads[part * now : (part + 1) * now]
        ]
        return torch.cat(pieces, -1)

    def narrow(self, out: nn.Module, args: tuple) -> tuple:
        """What the heads that stay made."""
        return (args[0][..., : len(self.kept) * self.width], *args[1:])


class Silence(HeadHook):
    """Forward pre-hook of an output projection: what it reads counts as zero."""

    def attach(self, module: nn.Module) -> list:
        return [module.register_forward_pre_hook(self)]

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return (torch.zeros_like(args[0]), *args[1:])


#: The kinds of hooks that a recipe names.
HOOKS = {
    "select": Select,
    "take": Take,
    "rearrange": Rearrange,
    "shared_bias": SharedBias,
    "reshape": Reshape,
    "arrange": Arrange,
    "silence": Silence,
}


class ConfigView:
    """A module's configuration with some values of its own; all else is read from the model's."""

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_config"], name)


class NoHeads(nn.Module):
    """What attention without heads is: the output projection's bias, or, inside, nothing for it to read.

    An attention module becomes one by a change of its class; its attributes stay. Options (``_no_heads``):

    - ``inputs``: name and position of the argument whose shape each of its constants has; usually one.
    - ``out``: name of the output projection within the module; null: it is outside and gets an input of width 0.
    - ``after``: what runs on the output projection's output: names of modules, or of attributes that say a dropout's
      probability.
    - ``residual``: name and position of the argument that is added then, or null; ``norm``: the module that follows.
    - ``returns``: what it returns after the constants: name and position of an argument, or null for None; null: the
      bare tensor; ``list``: true where it returns a list instead of a tuple.
    - ``attentions``: name and position of the argument that asks for attentions, or null, and how many values more it
      returns then.
    - ``drop``: names of its modules and parameters that are no longer needed.
    - ``cache``: name and position of the argument with keys and values of earlier tokens, and the attribute that says
      which of its layers this is, and whether they are those of another sequence; or null. ``tokens_first``: true
      where the input has the tokens before the examples; ``streams``: the attribute that says how many streams of the
      same tokens come behind the first in the input, which are not kept.
    - ``bias``: name and position of the argument with the position bias that it hands on to the layers to come, with
      their heads; it makes the bias where it gets none, with its own class's ``compute_bias``.
    - ``versions``: true where positions and what it returns are those of one version of transformers, and are read
      anew from the class's source when the recipe is applied.

    I-BERT's attention keeps a silent head instead: its output projection, once quantized, fails without inputs.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The constant, in the shape of the input."""
        options: Mapping[str, Any] = self._no_heads
        given = [_argument(where, args, kwargs) for where in options["inputs"]]
        constants = [None if each is None else self.constant(each, args, kwargs) for each in given]
        made = options.get("bias") and _argument(options["bias"], args, kwargs) is None
        seen, keys = 0, None
        if options.get("cache"):
            name, position, layer, cross = options["cache"]
            cache = _argument((name, position), args, kwargs)
            hidden = given[0].transpose(0, 1) if options.get("tokens_first") else given[0]
            if options.get("streams"):
                hidden = hidden[:, : hidden.shape[1] // (1 + getattr(self, options["streams"]))]
            if made and cache is not None:
                seen = cache.get_seq_length(getattr(self, layer))
                seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # counted on in place
            keys = count_tokens(cache, hidden, getattr(self, layer), cross, kwargs.get("cache_position"))
        if options["returns"] is None:
            return constants[0]
        where, more = options["attentions"]
        if not _argument((where or ("output_attentions", None)), args, kwargs):
            more = 0
        passed = [None if where is None else _argument(where, args, kwargs) for where in options["returns"]]
        if made:
            keys = given[0].shape[1] if keys is None else keys
            bias = self.position_bias(given[0], keys, seen, args, kwargs)
            passed = [bias if where == options["bias"] else each for where, each in zip(options["returns"], passed)]
        returned = (*constants, *passed, *[None] * more)
        return list(returned) if options.get("list") else returned

    def position_bias(self, hidden: torch.Tensor, keys: int, seen: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        """What the module's class says of the positions of queries and keys, for all heads of the original.

        Args:
            hidden: the queries' input, ``[examples, tokens, features]``.
            keys: number of keys.
            seen: number of earlier tokens.
            args: of the forward.
            kwargs: of the forward.

        Returns:
            ``[1 or examples, heads, tokens, keys]``, with the mask where this version of transformers adds it here; in
            blocks as the class has them.
        """
        kind, here = self._no_heads_class, self._no_heads["bias_maker"]
        original = kind.__new__(kind)  # this module as it was: its methods call each other
        object.__setattr__(original, "__dict__", self.__dict__)
        known = {"query_length": hidden.shape[1], "key_length": keys, "device": hidden.device}
        known |= {"past_seen_tokens": seen, "cache_position": kwargs.get("cache_position")}
        known["block_length"] = getattr(self, "block_len", None)
        bias = original.compute_bias(**{name: known[name] for name in here["arguments"]})
        mask = here["mask"] and _argument(here["mask"], args, kwargs)
        if mask is None:
            return bias
        if known["block_length"] is not None:
            return bias + torch.where(mask > 0, 0.0, -1e10).transpose(1, 2)
        return bias + mask[:, :, :, :keys]

    def constant(self, like: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """What the attention of queries in the shape of ``like`` has become."""
        options: Mapping[str, Any] = self._no_heads
        output = like.new_zeros(*like.shape[:-1], 0)
        if not options.get("out"):
            return output
        out = self.get_submodule(options["out"])
        if hasattr(out, "nf"):  # GPT-2's Conv1D cannot read nothing
            output = like.new_zeros(*like.shape[:-1], out.nf) + out.bias
        else:
            output = out(output)
        for name in options["after"]:
            step = getattr(self, name)
            if isinstance(step, nn.Module):
                output = step(output)
            else:
                output = nn.functional.dropout(output, step, self.training)
        if options.get("residual"):
            output = _argument(options["residual"], args, kwargs) + output
        return self.get_submodule(options["norm"])(output) if options.get("norm") else output


def _index(places: Sequence[int], device: torch.device) -> torch.Tensor:
    """Places on a device, which is not waited for."""
    return torch.tensor(places, dtype=torch.long).to(device, non_blocking=True)


def _argument(where: Sequence, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    name, position = where
    if name in kwargs:
        return kwargs[name]
    return args[position] if position is not None and len(args) > position else None


def bias_maker(kind: type) -> Optional[dict[str, Any]]:
    """How a class makes its position bias: the arguments of its ``compute_bias``, and where the mask is that it adds.

    The mask is null where it adds none, as newer transformers do. None where something of this is not known.
    """
    parameters, tree = parsed_forward(kind)
    if tree is None or not hasattr(kind, "compute_bias"):
        return None
    arguments = list(inspect.signature(kind.compute_bias).parameters)[1:]
    added = re.findall(r"position_bias = position_bias \+ (.*)", ast.unparse(tree))
    known = {"query_length", "key_length", "device", "past_seen_tokens", "cache_position", "block_length"}
    if not set(arguments) <= known or not set(added) <= {"causal_mask", "mask.transpose(1, 2)"}:
        return None
    return {"arguments": arguments, "mask": placed(["mask"], parameters) if added else None}


def _of_this_version(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of :class:`NoHeads`, for the forward that a class has in this version of transformers.

    Raises ValueError when it is not known how the class makes its position bias.
    """
    if not options.get("versions"):
        return dict(options)
    parameters, tree = parsed_forward(kind)
    now = {**options, "inputs": [placed(where, parameters) for where in options["inputs"]]}
    for name in ("residual", "cache", "bias"):
        if options.get(name):
            now[name] = placed(options[name], parameters)
    returned = None if tree is None else returned_values(tree)
    if returned is not None:
        now.pop("list", None)
        now.update(return_options(parameters, returned, len(now["inputs"])))
    if options.get("bias"):
        now["bias_maker"] = bias_maker(kind)
        if now["bias_maker"] is None or now["bias"] not in (now["returns"] or ()):
            raise ValueError(f"it is not known how {kind.__name__} makes its position bias")
    return now


def count_tokens(
    cache: Any, hidden: torch.Tensor, layer: int, cross: bool, where: Optional[torch.Tensor]
) -> Optional[int]:
    """Fill the place that a layer without keys has in a cache: positions are read off the length of its entries.

    Args:
        cache: of transformers, or None.
        hidden: the queries' input, ``[examples, tokens, features]``.
        layer: the layer's number in the cache.
        cross: whether its keys are those of another sequence.
        where: the tokens' positions, where the caller knows them; older caches need to be told.

    Returns:
        How many keys layers with heads have: tokens so far, or places in a cache of fixed size; None without a cache,
        and for those of another sequence.
    """
    # Ones: some caches count the keys that are not zero.
    nothing = hidden.new_ones(hidden.shape[0], 1, 1 if cross else hidden.shape[1], 1)
    if cross:
        if hasattr(cache, "cross_attention_cache") and not cache.is_updated.get(layer):
            cache.cross_attention_cache.update(nothing, nothing, layer)
            cache.is_updated[layer] = True
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    if not hasattr(cache, "update"):
        return None
    keys, _ = cache.update(nothing, nothing, layer, *([] if where is None else [{"cache_position": where}]))
    return keys.shape[-2]


def slices(
    blocks: Iterable[Sequence[int]],
    held: Sequence[int],
    kept: Sequence[int],
    queries: Optional[tuple[Sequence[int], Sequence[int]]] = None,
    repeat: int = 0,
) -> list[int]:
    """Indices of what stays of a dimension that is made of ``blocks`` for the heads ``held``.

    Args:
        blocks: see the top of the file.
        held: the heads there are.
        kept: the heads that stay.
        queries: the query heads there are, and those that stay; needed for blocks of query heads.
        repeat: query heads per head of the original, where the slices of a head are to be repeated for each of its
            query heads that stay; else 0.
    """
    found: list[int] = []
    start = 0
    for kind, width, *of in blocks:
        there, stay = (queries if kind == QUERIES and queries else (held, kept)) if kind else ([None], [None])
        for head in there:
            if of and not of[0] <= head < of[1]:
                continue
            if head in stay:
                times = sum(query // repeat == head for query in queries[1]) if repeat and kind == HEADS else 1
                found.extend(list(range(start, start + width)) * times)
            start += width
    return found


def stays(site: Mapping[str, Any], earlier: Optional[Mapping[str, Any]], blocks: Iterable[Sequence[int]]) -> list[int]:
    """Indices of what a site's recipe keeps of a dimension, whose tensor holds what the ``earlier`` recipe kept."""
    held, queries = _held(site, earlier)
    repeat = site["per_group"] if site.get("expanded") else 0
    return slices(blocks, held, held_heads(site), (queries, held_queries(site)), repeat)


def was(site: Mapping[str, Any], earlier: Optional[Mapping[str, Any]], blocks: Iterable[Sequence[int]]) -> int:
    """The size of that dimension before."""
    held, queries = _held(site, earlier)
    return len(slices(blocks, held, held, (queries, queries)))


def _held(site: Mapping[str, Any], earlier: Optional[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    if earlier is None:
        return list(range(site["heads"])), list(range(site["heads"] * site.get("per_group", 1)))
    return held_heads(earlier), held_queries(earlier)


def held_heads(site: Mapping[str, Any]) -> list[int]:
    """The heads of a site that its tensors hold: those that stay, or the dummy."""
    return site["kept"] or ([site["dummy"]] if site.get("dummy") is not None else [])


def held_queries(site: Mapping[str, Any]) -> list[int]:
    """The query heads of a site that its tensors hold, numbered as in the original."""
    of = site.get("per_group", 1)
    there = site.get("queries")
    return [
        query
        for head in held_heads(site)
        for query in range(head * of, head * of + of)
        if there is None or query in there
    ]


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any], before: Optional[Mapping[str, Any]] = None) -> nn.Module:
    """Cut a model's tensors in place, on any device ("meta" too).

    Args:
        model: of the original shape, or of the shape that ``before`` gave it.
        recipe: the heads that stay, see the top of the file.
        before: the recipe that was applied earlier; its kept heads are what the tensors hold.

    Raises:
        ValueError: the recipe is of another version, or names a module or sizes that the model does not have.
    """
    if recipe.get("version") not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise ValueError(f"the recipe of removed heads is of version {recipe.get('version')}, not {known}")
    done: dict[tuple, tuple] = {}
    for name, site in recipe["sites"].items():
        earlier = before["sites"].get(name) if before is not None else None
        if earlier == site:
            continue
        if earlier is not None and earlier.get("expanded"):
            raise ValueError(f"nothing more can be cut out of {name}, whose keys and values are repeated")
        for tensor, dim, blocks in site["tensors"]:
            _cut(model, tensor, dim, stays(site, earlier, blocks), was(site, earlier, blocks), done)
        _adapt(model, site)
    setattr(model, ATTRIBUTE, copy.deepcopy(dict(recipe)))
    return model


def _cut(model: nn.Module, name: str, dim: int, index: list[int], width: int, done: dict[tuple, tuple]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = getattr(owner, leaf)
    if tensor.shape[dim] != width:
        raise ValueError(f"{name} has {tensor.shape[dim]} slices where the recipe expects {width}")
    if index == list(range(width)):
        return
    key = (id(tensor), dim, tuple(index))
    if key not in done:  # tied weights stay tied
        new = tensor.detach().index_select(dim, torch.tensor(index, dtype=torch.long, device=tensor.device))
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        done[key] = (new, tensor)
    setattr(owner, leaf, done[key][0])
    _sizes(owner)


def _sizes(owner: nn.Module) -> None:
    """Let a projection's attributes tell the size of its weight."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    if hasattr(owner, "nf"):  # GPT-2's Conv1D
        owner.nf = weight.shape[1]
        if hasattr(owner, "nx"):
            owner.nx = weight.shape[0]
    elif hasattr(owner, "in_features"):
        owner.out_features, owner.in_features = weight.shape
    elif isinstance(owner, nn.Embedding):
        owner.embedding_dim = weight.shape[1]


def _adapt(model: nn.Module, site: Mapping[str, Any]) -> None:
    """Everything about a site but its tensors: attributes, hooks, and its module when it has no heads."""
    held = held_heads(site)
    hooks = site["hooks"] if held else ()
    if held and not site["kept"]:
        hooks = [*hooks, ["silence", site["empty"][0], {}]]
    heads = len(held)
    for kind, name, options in hooks:
        hook = _hook(model.get_submodule(name), kind, options)
        hook.heads, hook.kept = site["heads"], list(held)
        if isinstance(hook, Arrange):
            heads = hook.padded()
    queries = held_queries(site)
    if site.get("expanded"):
        heads = len(queries)
    for name, each, *of in site["counts"]:
        path, _, leaf = name.rpartition(".")
        value = each * (len(queries) if of == ["queries"] else heads)
        if of == ["per_group"]:
            value = len(queries) // heads if heads else each
        if path.rpartition(".")[2] == "config":
            module = model.get_submodule(path.rpartition(".")[0])
            if not isinstance(module.config, ConfigView):
                module.config = ConfigView(module.config)
            setattr(module.config, leaf, value)
        else:
            setattr(model.get_submodule(path), leaf, value)
    if not held:
        _remove_hooks(model, site)
        _empty(model, *site["empty"])


def _hook(module: nn.Module, kind: str, options: Mapping[str, Any]) -> Any:
    """The module's hook of this kind, attached when it has none yet."""
    hooks = module.__dict__.setdefault(HOOK_ATTRIBUTE, {})
    key = f"{kind} {options.get('argument', '')}"
    if key not in hooks:
        hook = HOOKS[kind](**options)
        hooks[key] = (hook, hook.attach(module))
    return hooks[key][0]


def _remove_hooks(model: nn.Module, site: Mapping[str, Any]) -> None:
    for _, name, _ in site["hooks"]:
        for _, handles in model.get_submodule(name).__dict__.pop(HOOK_ATTRIBUTE, {}).values():
            for handle in handles:
                handle.remove()


def _empty(model: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Make the module of a site without heads a :class:`NoHeads`, without its projections."""
    module = model.get_submodule(name)
    for gone in options["drop"]:
        parent, _, leaf = gone.rpartition(".")
        setattr(module.get_submodule(parent), leaf, None)
    module.__dict__.pop("forward", None)  # older transformers leave one there when they have recorded outputs
    module._no_heads, module._no_heads_class = _of_this_version(type(module), options), type(module)
    module.__class__ = NoHeads
