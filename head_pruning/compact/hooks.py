"""Hooks that a recipe puts on modules which read more than their own heads."""

import inspect
import re
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .shapes import Either, Whole
from .slices import index_on, slices

HOOK_ATTRIBUTE = "_head_hooks"  # of a module: its hooks by kind and argument
_SIZE = Whole(1, 1 << 20)  # of something per head


class HeadHook:
    """What every kind of hook is told when a recipe is applied.

    Attributes:
        heads: H of the original.
        kept: the heads that stay.
        shape: what its options in a recipe must be (:mod:`head_pruning.compact.shapes`).
    """

    heads: int = 0
    kept: Sequence[int] = ()
    shape: Mapping[str, Any] = {}


class Select(HeadHook):
    """Forward pre-hook: of one argument keep the slices of the heads that stay.

    Args:
        argument: its name.
        position: its position among the positional arguments, or None.
        dim: the dimension of the heads, counted from the last.
        folded: whether examples and heads may share that dimension, examples first.
        width: slices per head.
    """

    shape = {
        "argument": str,
        "position": Either(None, Whole(0, 1000)),
        "dim": Whole(-9, -1),
        "folded": bool,
        "width": _SIZE,
    }

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
        index = index_on(slices([(1, self.width)], range(self.heads), self.kept), whole.device)
        if whole.shape[dim] == size:
            taken: Any = whole.index_select(dim, index)
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

    shape = {"width": _SIZE}

    def __init__(self, width: int) -> None:
        self.width = width

    def attach(self, module: nn.Module) -> list:
        return [module.register_forward_hook(self)]

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        index = index_on(self.kept, output.device)
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

    shape = {"table": str, "buckets": _SIZE}

    def __init__(self, table: str, buckets: int) -> None:
        self.table, self.buckets = table, buckets

    def attach(self, module: nn.Module) -> list:
        if not mixes_positions(type(module)):
            raise ValueError(f"it is not known how {type(module).__name__} reads its relative positions")
        return [module.get_submodule(self.table).register_forward_hook(self)]

    def __call__(self, table: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        index = index_on(self.kept, output.device)
        values = output.unflatten(-1, (self.buckets, self.heads))
        if values.ndim == 4:  # the main stream
            return values.index_select(-1, index).flatten(-2)
        examples, streams, tokens = values.shape[:3]
        # Through one dimension: from one shape to the other in one step, torch.export wants even lengths.
        rows = values.permute(0, 2, 1, 4, 3).flatten(0, 3)
        read = rows.unflatten(0, (examples, streams, self.heads, tokens)).index_select(2, index)
        stay = read.flatten(0, 3).unflatten(0, (examples, tokens, streams, len(self.kept)))
        return stay.permute(0, 2, 1, 4, 3).flatten(-2)


def mixes_positions(kind: Any) -> bool:
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

    shape = {"output": Whole(0, 1000), "table": Either(None, str)}

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
        return values.index_select(-1, index_on(self.kept, values.device))

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

    shape = {"width": _SIZE}

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

    shape = {"parts": Whole(1, 64), "blocks": Whole(1, 64), "width": _SIZE, "projection": str, "out": str}

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
        found: dict[tuple[int, Optional[int]], torch.Tensor] = {
            (block, head): piece for (_, block, head), piece in zip(order, output.split(self.width, -1))
        }
        dummy = output.new_zeros(*output.shape[:-1], self.width)
        heads: list[Optional[int]] = [*self.kept, *[None] * (self.padded() - len(self.kept))]
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


def is_silent(module: nn.Module) -> bool:
    """Whether :class:`Silence` is on a module: nothing that it reads is left."""
    return any(isinstance(hook, Silence) for hook, _ in module.__dict__.get(HOOK_ATTRIBUTE, {}).values())


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
