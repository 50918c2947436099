"""A layer of the student replaced by the teacher's for one update, without a copy of either."""

from __future__ import annotations

from typing import Any, Iterable, Mapping, Optional, Sequence

import numpy as np
import torch

from ..errors import HeadPruningError
from ..weights.engine.targets import shortened


class Graft:
    """Whether one layer of the student is replaced by the teacher's.

    The layer itself runs, with its dropout, its gates and whatever else hangs on it; no module is replaced, so those
    who look at the layers (transformers' own capture of hidden states, recorders) see it as ever. The teacher's
    parameters need no gradient, so none is computed.

    Args:
        layer: the student's.
        donor: the teacher's, with parameters of the same names and shapes.

    Attributes:
        live: whether the teacher's parameters are used, in training; a layer in evaluation is the student's.
    """

    def __init__(self, layer: torch.nn.Module, donor: torch.nn.Module) -> None:
        self.live = False
        self._layer, self._donor = layer, donor

    def attach(self) -> list:
        """Put the hooks on the modules that are in the layer by now; returns their handles."""
        handles = []
        for path, module in self._layer.named_modules():
            places = self._places(module, path)
            if places:
                handles += _Swap(self, places).attach(module)
        return handles

    def _places(self, module: torch.nn.Module, path: str) -> list[tuple[dict, dict, str]]:
        """Where the parameters in a module stand, those of the teacher's, and their own names."""
        found = []
        for name, inner in module.named_modules(prefix=path):
            own = [each for each, parameter in inner._parameters.items() if parameter is not None]
            if own:  # modules without, such as quantizers, need not be the teacher's too
                theirs = self._donor.get_submodule(name)._parameters
                found += [(inner._parameters, theirs, each) for each in own]
        return found


class _Swap:
    """Hooks on one module of a layer: while it runs it has the teacher's parameters, and all modules in it.

    Every module of a layer has them, for the backward pass runs parts of a layer again under activation checkpointing,
    past the hooks of the layer itself. A deep copy of a model takes its hooks along; those of the copy do nothing.
    """

    def __init__(self, graft: Optional[Graft] = None, places: Sequence[tuple[dict, dict, str]] = ()) -> None:
        self._graft, self._places = graft, places
        self._kept: list[list[torch.nn.Parameter]] = []

    def __deepcopy__(self, memo: dict) -> "_Swap":
        return _Swap()

    def __reduce__(self) -> tuple:
        return _Swap, ()

    def attach(self, module: torch.nn.Module) -> list:
        return [
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: torch.nn.Module, args: tuple) -> None:
        if self._graft is not None and self._graft.live and module.training:
            self._kept.append([mine[name] for mine, _, name in self._places])
            for mine, theirs, name in self._places:
                mine[name] = theirs[name]

    def leave(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if self._kept:
            for (mine, _, name), parameter in zip(self._places, self._kept.pop()):
                mine[name] = parameter


class Grafts:
    """The layers of a student, any of which can be replaced by its teacher's.

    Args:
        student: the model that is trained.
        teacher: the one whose layers step in.
        layers: dotted names of the student's layers.
        theirs: dotted names of the teacher's, as many.

    Raises:
        HeadPruningError: the two have not as many layers, or one has other parameters than its counterpart.
    """

    def __init__(
        self, student: torch.nn.Module, teacher: torch.nn.Module, layers: Sequence[str], theirs: Sequence[str]
    ) -> None:
        if len(layers) != len(theirs):
            raise HeadPruningError(
                f"The student has {len(layers)} layers and its teacher {len(theirs)}, so none can stand in for "
                "another; take a teacher of the same architecture."
            )
        self.layers = tuple(layers)
        self._handles: list = []
        mine = [student.get_submodule(name) for name in layers]
        donors = [teacher.get_submodule(name) for name in theirs]
        for name, layer, donor in zip(layers, mine, donors):
            _check_alike(name, _shapes(layer), _shapes(donor))
        self._grafts = [Graft(layer, donor) for layer, donor in zip(mine, donors)]

    def attach(self) -> None:
        """Put the hooks on. Idempotent.

        What shall see a layer with the parameters that it ran with comes before, and so do pruners that put other
        modules into the layers.
        """
        if not self._handles:
            self._handles = [h for graft in self._grafts for h in graft.attach()]

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def set(self, student: "np.ndarray | Iterable[bool]") -> None:
        """Which layers are the student's from now on, ``bool[layers]``; the others are the teacher's."""
        for graft, mine in zip(self._grafts, student, strict=True):
            graft.live = not mine


def _shapes(layer: torch.nn.Module) -> dict[str, tuple]:
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters(remove_duplicate=False)}


def _check_alike(name: str, mine: Mapping[str, tuple], theirs: Mapping[str, tuple]) -> None:
    odd = sorted({key for key, _ in set(mine.items()) ^ set(theirs.items())})
    if odd:
        raise HeadPruningError(
            f"The layer {name} of the student and its teacher's differ in {shortened(odd)}, so one cannot stand in "
            "for the other; take a teacher of the same architecture."
        )
