"""The frozen model that a distiller compares with: asked once per micro-batch, and no part of the student."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from typing import Container, Iterable, Optional

import numpy as np
import torch

from ..errors import HeadPruningError
from ..outputs import LastLayer, Outputs
from ..pruner import SessionView
from ..unit_map import UnitMap

#: What ``--teacher-dtype`` takes.
DTYPES = ("float32", "bfloat16", "float16")
# Two sums of the same numbers in float64 differ by less than this share of the sum of their absolute values.
_SAME = 1e-9

_open: "weakref.WeakKeyDictionary[SessionView, dict[tuple, Teacher]]" = weakref.WeakKeyDictionary()


class Teacher:
    """A frozen model in evaluation mode, read as its student is.

    It is held by the distillers, not by the student: so no state dict, optimizer, data-parallel wrapper or copy of the
    student has it. It follows the student to another device, and, unless it was given a type of its own, to another
    type of numbers.

    Args:
        model: the model; it is frozen and set to evaluation.
        unit_map: its layers and sites; None where only its logits are looked at.
        session: the student's.
        dtype: the type of its numbers; None: that of the student.

    Attributes:
        shared: ids of the student's parameters that are the teacher's too, and so must not be trained.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        unit_map: Optional[UnitMap],
        session: SessionView,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        self.model, self.unit_map, self.dtype = model.eval().requires_grad_(False), unit_map, dtype
        self.shared: set[int] = set()
        self.users = 0
        self._sums: Optional[np.ndarray] = None
        self._student = session.model
        self._recorder = session.recorder(model, unit_map)
        self._recorder.attach()
        self._recorder.live = False
        self._recorder.told = True  # the student's tells
        self.follow()
        self._asked: Optional[weakref.ref] = None
        self._answer: Optional[Outputs] = None

    def __call__(self, outputs: Outputs) -> Outputs:
        """What it gives for the student's micro-batch, without gradients. Asked again it does not compute again, and
        what it gave is forgotten with ``outputs``.
        """
        if self._answer is None or self._asked is None or self._asked() is not outputs:
            self.follow()
            self._recorder.live = True
            try:
                last = None if outputs.last is None else LastLayer.of(self.model, outputs.last.find)
                with torch.no_grad(), contextlib.nullcontext() if last is None else last.left_out():
                    raw = outputs.call(self.model)
                seen = self._recorder.take(outputs.tokens)
                self._answer = dataclasses.replace(seen, raw=raw, last=last, args=(), kwargs={})
            finally:
                self._recorder.live = False
            self._asked = weakref.ref(outputs, self._forget)
        return self._answer

    def _forget(self, _: object) -> None:
        self._answer = None

    def follow(self) -> None:
        """Go where the student is by now, and to its type of numbers. A call does so too."""
        mine, theirs = _first(self.model, self.shared), _first(self._student)
        dtype = self.dtype or theirs.dtype
        if (mine.device, mine.dtype) != (theirs.device, dtype):
            if mine.dtype != dtype:
                self.fingerprint()  # that of the numbers as they were loaded, whenever it is asked for
            # Parameters that are the student's as well have gone there with it.
            self.model.to(device=theirs.device, dtype=dtype)

    def share(self, student: torch.nn.Module, names: Iterable[str]) -> None:
        """Keep one copy of the named parameters wherever the student's equal the teacher's; see :attr:`shared`."""
        theirs = dict(self.model.named_parameters())
        mine = dict(student.named_parameters())
        for name in names:
            if name in theirs and _equal(mine[name], theirs[name]):
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._parameters[leaf] = mine[name]
                self.shared.add(id(mine[name]))

    def fingerprint(self) -> np.ndarray:
        """Sums that tell it from another teacher, ``float64[3]``; :meth:`check_same` compares them.

        They are taken once, of the numbers before they follow the student to another type: a host that trains in half
        precision makes its model so only some time after it was built, and a resumed run at another time.
        """
        if self._sums is None:
            self._sums = _sums(self.model)
        return self._sums

    def check_same(self, stored: np.ndarray) -> None:
        """Raise HeadPruningError where a checkpoint's fingerprint is of another teacher."""
        if _alike(self.fingerprint(), stored):
            return
        self.follow()
        if not _alike(_sums(self.model), stored):  # earlier versions took those of the student's type
            raise HeadPruningError(
                "The checkpoint was distilled from another teacher than this run's; load the model that the run was "
                "started from, before the checkpoint is loaded into it, or give the same --teacher-path."
            )

    def close(self) -> None:
        """Take the hooks off and let go of the model."""
        self._recorder.detach()
        self._answer = self._asked = None


def open_teacher(
    session: SessionView, path: Optional[str], dtype: Optional[str], shared: Iterable[str] = ()
) -> Teacher:
    """The teacher of a session: distillers that ask for the same one get the same one.

    Args:
        session: the student's.
        path: of the checkpoint that the host loads; None: the student as it is now.
        dtype: one of :data:`DTYPES`; None: the student's.
        shared: names of the student's parameters that will not be trained: the teacher uses them too where they are
            equal, so that memory holds them once.

    Raises:
        HeadPruningError: the host cannot load the teacher, or cannot load any.
    """
    known = _open.setdefault(session, {})
    if (path, dtype) not in known:
        kind = getattr(torch, dtype) if dtype else None
        student = session.model
        if path is not None:
            if session.load_teacher is None:
                raise HeadPruningError(
                    "--teacher-path is loaded by the host, which this session has none of; give the session "
                    "load_teacher=, or leave the path out to learn from the model as it is now."
                )
            model, unit_map = session.load_teacher(path, session.needs)
        elif session.weights_come_later:
            raise HeadPruningError(
                "A model that is loaded only when training begins cannot be its own teacher; give the model to learn "
                "from as --teacher-path."
            )
        else:
            own = dict(student.named_parameters()) if kind in (None, _first(student).dtype) else {}
            kept = {id(own[name]): own[name] for name in shared if name in own}
            model, unit_map = _copy(student, kept), session.unit_map
        known[path, dtype] = Teacher(model, unit_map, session, kind)
    teacher = known[path, dtype]
    teacher.share(session.model, shared)
    teacher.users += 1
    return teacher


def _copy(student: torch.nn.Module, kept: dict[int, torch.nn.Parameter]) -> torch.nn.Module:
    """The student as it is now. Raises HeadPruningError where the copy would run the student."""
    copied = copy.deepcopy(student, dict(kept))
    for (name, mine), theirs in zip(student.named_modules(), copied.modules()):
        forward = vars(theirs).get("forward")
        if forward is not None and forward is vars(mine).get("forward"):  # functions are not copied
            raise HeadPruningError(
                f"The forward of {name or type(student).__name__} is a function of its own, which a copy of the model "
                "shares, so the model would learn from itself; compile with model.compile(), or give the model to "
                "learn from as --teacher-path."
            )
    return copied


def close_teacher(session: SessionView, teacher: Teacher) -> None:
    """A distiller needs the teacher no more; with the last of them it is closed."""
    teacher.users -= 1
    if teacher.users == 0:
        known = _open.get(session, {})
        for key in [key for key, found in known.items() if found is teacher]:
            del known[key]
        teacher.close()


def _first(model: torch.nn.Module, shared: Container[int] = ()) -> torch.nn.Parameter:
    """A parameter that tells where a model is, and in which type of numbers: rather not one of ``shared``."""
    found = filter(torch.is_floating_point, model.parameters())  # in each update: not all of them are looked at
    own = next((parameter for parameter in found if id(parameter) not in shared), None)
    return next(filter(torch.is_floating_point, model.parameters())) if own is None else own


def _sums(model: torch.nn.Module) -> np.ndarray:
    """Of all parameters, and of their absolute values, and how many there are."""
    values = [p.detach() for p in model.parameters()]
    sums = [(float(p.sum(dtype=torch.float64)), float(p.abs().sum(dtype=torch.float64))) for p in values]
    return np.array([sum(each[0] for each in sums), sum(each[1] for each in sums), float(len(sums))])


def _alike(mine: np.ndarray, stored: np.ndarray) -> bool:
    far = abs(mine[0] - stored[0]) + abs(mine[1] - stored[1])
    return bool(mine[2] == stored[2] and far <= _SAME * stored[1])


def _equal(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if mine is theirs:
        return True
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype and bool(torch.equal(mine.cpu(), theirs.cpu()))
