"""Classes of transformers models whose attention heads are removed, also where the package is not installed.

A copy of this file, with ``compact.py`` and ``returned.py`` of ``head_pruning`` in front of it, travels with every
compact checkpoint as ``compact_heads.py``: it is what ``from_pretrained(..., trust_remote_code=True)`` runs. It
imports nothing else but torch and transformers. ``config.json`` holds the recipe of the removed heads as its
``quantization_config``, whose ``quant_method`` is ``head_pruning``, or, when the weights are also quantized, as
``removed_heads``.
"""

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto


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


"""What a module's forward returns, read from its source: it differs between versions of transformers.

Attention without heads is a constant, but only its class's code tells what comes back beside that constant. Imports
nothing but the standard library: a copy of this file lies in every compact folder.
"""

import ast
import inspect
import textwrap
from typing import Any, Iterator, Optional, Sequence

# The first value, the names of the others (None: it is bare), how many more there are with attentions, whether it is a
# list.
Returned = tuple[str, Optional[list[str]], int, bool]


def parsed_forward(kind: type) -> tuple[tuple[str, ...], Optional[ast.FunctionDef]]:
    """The names of a forward's parameters, and its tree; None when the source is not at hand."""
    function = inspect.unwrap(kind.forward)
    parameters = tuple(inspect.signature(function).parameters)[1:]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return parameters, None
    return parameters, tree if isinstance(tree, ast.FunctionDef) else None


def statements_of(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The simple statements of a function in order, those of nested functions left out."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        inner = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
        if any(inner):
            for part in inner:
                yield from statements_of(part)
        else:
            yield statement


def assigned_name(statement: ast.stmt) -> Optional[str]:
    """The one name that a statement assigns to, or None."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        if isinstance(statement.targets[0], ast.Name):
            return statement.targets[0].id
    return None


def returned_values(tree: ast.FunctionDef) -> Optional[Returned]:
    """What a forward returns. None where the returns differ or cannot be read."""
    statements = list(statements_of(tree.body))
    assigned: dict[str, list[ast.expr]] = {}
    for statement in statements:
        name = assigned_name(statement)
        if name and isinstance(statement, ast.Assign):
            assigned.setdefault(name, []).append(statement.value)

    def elements(value: ast.expr) -> Optional[tuple[list[ast.expr], int, bool]]:
        """The values without attentions, how many more there are with them, and whether it is a list."""
        if isinstance(value, (ast.Tuple, ast.List)):
            return value.elts, 0, isinstance(value, ast.List)
        if isinstance(value, ast.IfExp):
            less, more = elements(value.orelse), elements(value.body)
            return less and more and (less[0], len(more[0]) - len(less[0]), less[2])
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            less, more = elements(value.left), elements(value.right)
            return less and (less[0], less[1] + (len(more[0]) if more else 1), less[2])
        if isinstance(value, ast.Name) and value.id in assigned:
            found = elements(assigned[value.id][0])
            return found and (found[0], found[1] + len(assigned[value.id]) - 1, found[2])
        return None

    found = set()
    for statement in statements:
        if not isinstance(statement, ast.Return) or statement.value is None:
            continue
        known = elements(statement.value)
        if known is None:
            if not isinstance(statement.value, ast.Name):
                return None
            found.add((statement.value.id, None, 0, False))
            continue
        first, *others = (ast.unparse(element) for element in known[0])
        if first in assigned and elements(ast.Name(first)) is not None:
            return None  # a tuple in a tuple
        found.add((first, tuple(others), *known[1:]))
    kinds = {(first, None if others is None else len(others), *more) for first, others, *more in found}
    if len(kinds) != 1:
        return None
    first, others, attentions, as_list = sorted(found)[0]
    return first, None if others is None else list(others), attentions, as_list


def return_options(parameters: Sequence[str], returned: Returned, constants: int) -> dict[str, Any]:
    """How :class:`head_pruning.compact.NoHeads` is told what to return.

    Args:
        parameters: of the forward.
        returned: what it returns.
        constants: how many of the first values are constants, one for each sequence that attends.
    """
    _, others, attentions, as_list = returned
    asks = "output_attentions"
    passed = [placed([name], parameters) if name in parameters else None for name in (others or ())[constants - 1 :]]
    return {
        "returns": None if others is None else passed,
        "attentions": [placed([asks], parameters) if asks in parameters else None, attentions],
        **({"list": True} if as_list else {}),
    }


def placed(where: Sequence[Any], parameters: Sequence[str]) -> list:
    """An argument as the recipes give it, name and position and maybe more, with its position in this forward."""
    name, *more = where
    return [name, parameters.index(name) if name in parameters else None, *more[1:]]


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


METHOD = "head_pruning"
RECIPE = "removed_heads"
FILE = "compact_heads"  # this file's name in a checkpoint, without .py
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_NEVER_CONFIG = ("attn_implementation", "device_map", "dtype", "quantization_config", "torch_dtype")


class CompactModel:
    """What a model class of transformers needs to save, load and push a model whose heads are removed.

    In memory the config is that of the original; the recipe lies on the model (:data:`ATTRIBUTE`).
    """

    dense_class: type  # the class of transformers

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        recipe = take_recipe(config)
        super().__init__(config, *args, **options)
        if recipe is not None:
            remove(self, recipe)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **options: Any) -> PreTrainedModel:
        """As the base class; with ``quantization_config=`` the compact weights are quantized while they load.

        A layer without heads has an output projection of width 0, which quantizers refuse: name it in the quantization
        config's ``modules_to_not_convert``.
        """
        if isinstance(config, transformers.PreTrainedConfig):
            config = copy.deepcopy(config)
        else:
            hub = {name: options.pop(name) for name in _HUB if name in options}
            other = {name: options.pop(name) for name in _NEVER_CONFIG if name in options}
            source = folder if config is None else config
            config, options = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **options)
            options |= hub | other
        # Out of transformers' sight, which would look for a quantizer of that name.
        setattr(config, RECIPE, take_recipe(config))
        return super().from_pretrained(folder, *args, config=config, **options)

    def save_pretrained(self, folder: Any, is_main_process: bool = True, *args: Any, **options: Any) -> None:
        """As the base class; the recipe goes into the config, and the code into the folder."""
        with self._telling_config():
            super().save_pretrained(folder, is_main_process, *args, **options)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            self._write_code(folder)

    def _upload_modified_files(self, folder: Any, *args: Any, **options: Any) -> Any:
        self._write_code(folder)
        return super()._upload_modified_files(folder, *args, **options)

    def _write_code(self, folder: Any) -> None:
        if hasattr(self, ATTRIBUTE) and self._travels():
            Path(folder, f"{FILE}.py").write_text(travelling_code(), encoding="utf-8")

    @contextlib.contextmanager
    def _telling_config(self) -> Iterator[None]:
        """Inside the block the config tells which heads are removed and where the code lies."""
        recipe, values = getattr(self, ATTRIBUTE, None), vars(self.config)
        if recipe is None:
            yield
            return
        before = {name: values[name] for name in ("quantization_config", "auto_map") if name in values}
        if before.get("quantization_config") is None:
            self.config.quantization_config = {"quant_method": METHOD, "recipe": recipe}
        else:
            setattr(self.config, RECIPE, recipe)
        if self._travels():
            self.config.auto_map = {**(before.get("auto_map") or {}), **auto_map(self)}
        try:
            yield
        finally:
            for name in ("quantization_config", "auto_map", RECIPE):
                values.pop(name, None)
            values.update(before)

    def _travels(self) -> bool:
        """Whether a process without the package finds the model's class in transformers."""
        return getattr(transformers, self.dense_class.__name__, None) is self.dense_class


def compact_class(base: type) -> type:
    """The class of compact models that are otherwise of ``base``; of the same name."""
    if issubclass(base, CompactModel):
        return base
    if getattr(transformers, base.__name__, None) is not base:
        return type(base.__name__, (CompactModel, base), {"__module__": base.__module__, "dense_class": base})
    if base.__name__ not in globals():
        globals()[base.__name__] = type(
            base.__name__, (CompactModel, base), {"__module__": __name__, "dense_class": base}
        )
    return globals()[base.__name__]


def __getattr__(name: str) -> type:
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return compact_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """Each Auto class that has a class for models of this kind, and that class in the travelling file."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        if not (isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass)):
            continue
        names = auto._model_mapping._model_mapping.get(model.config.model_type) if auto._model_mapping else None
        names = (names,) if isinstance(names, str) else tuple(names or ())
        if names:
            own = type(model).__name__
            found[name] = f"{FILE}.{own if own in names else names[0]}"
    return found


def take_recipe(config: Any) -> Optional[Mapping[str, Any]]:
    """Take what concerns removed heads out of a config: the recipe is returned, None when there is none."""
    quantization = getattr(config, "quantization_config", None)
    method = (quantization or {}).get("quant_method") if isinstance(quantization, Mapping) else None
    recipe = getattr(config, RECIPE, None)
    if method == METHOD:
        recipe = quantization.get("recipe", {})
        del config.quantization_config
    if hasattr(config, RECIPE):
        delattr(config, RECIPE)
    references = getattr(config, "auto_map", None)
    if isinstance(references, Mapping):
        config.auto_map = {
            name: reference
            for name, reference in references.items()
            if not (isinstance(reference, str) and reference.rpartition("--")[2].startswith(f"{FILE}."))
        }
        if not config.auto_map:
            del config.auto_map
    return recipe


def remove(model: PreTrainedModel, recipe: Mapping[str, Any]) -> None:
    """Give a model of the original shape the shape that ``recipe`` says.

    Raises:
        ValueError: the recipe is damaged, or of another model.
    """
    try:
        with torch.device("cpu"):  # not "meta": the indices that are cut need values
            apply_recipe(model, fitted(model, checked(recipe)))
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The recipe of removed heads in config.json is damaged or not made for {type(model).__name__} "
            f"({str(error) or repr(error)}); take the config.json that was saved with these weights."
        ) from error


def checked(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe. Raises ValueError, KeyError or TypeError when a site's heads are no increasing list of its heads."""
    for name, site in recipe["sites"].items():
        heads, kept = site["heads"], site["kept"]
        if not all(isinstance(head, int) and 0 <= head < heads for head in kept) or sorted(set(kept)) != kept:
            raise ValueError(f"{name} cannot keep the heads {kept} of {heads}")
    return recipe


def fitted(model: PreTrainedModel, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe by the names that modules have in ``model``, which may have another task head, or less than all.

    Raises ValueError when a model of the class that was saved lacks a site.
    """
    modules, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."
    there: dict[str, Any] = {}
    for rename in (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix)):
        there = {rename(name): site for name, site in recipe["sites"].items() if rename(name) in modules}
        if there:
            break
    lacking = [name for name in recipe["sites"] if rename(name) not in there]
    if lacking and (not there or type(model).__name__ in (getattr(model.config, "architectures", None) or ())):
        raise ValueError(f"there is no module {lacking[0]}")
    sites = {name: _renamed_site(site, rename) for name, site in there.items()}
    units = {
        kind: [_renamed_unit(unit, rename) for unit in listed if rename(unit["out_proj"]) in modules]
        for kind, listed in recipe["unit_map"].items()
    }
    return {**recipe, "sites": sites, "unit_map": units}


def _renamed_site(site: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    lists = {name: [[rename(entry[0]), *entry[1:]] for entry in site[name]] for name in ("tensors", "counts")}
    hooks = [[kind, rename(name), options] for kind, name, options in site["hooks"]]
    empty = site["empty"] and [rename(site["empty"][0]), *site["empty"][1:]]
    return {**site, **lists, "hooks": hooks, "empty": empty}


def _renamed_unit(unit: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    names = {field: rename(unit[field]) for field in ("name", "layer", "in_proj", "out_proj") if field in unit}
    if "projections" in unit:
        names["projections"] = [rename(name) for name in unit["projections"]]
    return {**unit, **names}


def travelling_code() -> str:
    """The text of the file that travels."""
    own = Path(__file__).read_text(encoding="utf-8")
    if apply_recipe.__module__ == __name__:
        return own
    text = own
    for module in ("head_pruning.compact", "head_pruning.returned"):  # each in place of its import
        head, _, body = text.partition(f"\nfrom {module} import ")
        code = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
        text = f"{head}\n\n{code}\n{body.partition(chr(10))[2]}"
    return text
