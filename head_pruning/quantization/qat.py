"""Quantization-aware training: 8-bit linear layers, through torchao."""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ContextManager, Optional

import numpy as np

from ..compact.shapes import FLAG, STEP, Number
from ..errors import HeadPruningError, one_line
from ..pruner import Pruner, SessionView
from ..registry import register_pruner
from ..schedules import STEPS, resolve_steps

if TYPE_CHECKING:
    from .engine.inputs import QuantizedInput

logger = logging.getLogger(__name__)

RANGES = ("token", "average")


@dataclass
class QatConfig:
    """Options of qat."""

    do_quantization: bool = field(
        default=False, metadata={"help": "train with linear layers quantized to 8 bits (the quantizer qat)"}
    )
    quantization_begin: float = field(
        default=0.0, metadata={"help": "updates before quantization sets in; below 1: a fraction of training"}
    )
    not_to_quantize: Optional[str] = field(
        default=None, metadata={"help": "regular expression of the linear layers to leave as they are, by module name"}
    )
    input_ranges: str = field(
        default="token",
        metadata={
            "help": "by which range a layer's inputs are quantized: token (each token's own, as torchao computes) or "
            "average (the moving average of the batches', as the published code does, and exported ONNX files)"
        },
    )


class QatPruner(Pruner):
    """Quantization-aware training of linear layers to int8 (Zafrir et al. 2019, 2021).

    Weights are rounded to a symmetric int8 scale per output channel, so zeros stay zeros; gradients pass through
    unrounded. The optimizer goes on with the weights as they are.
    """

    name, kind = "qat", "quantizes"
    needs_unit_map = False
    starts_anywhere = True
    schedule_option = "quantization_begin"
    state_shapes = {"begun": (FLAG,), "begin": (STEP,), "ranges": [Number()]}

    def check_options(self) -> None:
        options = self.config
        if options.input_ranges not in RANGES:
            raise HeadPruningError(f"--input-ranges is {options.input_ranges!r}; choose one of {', '.join(RANGES)}.")
        if not options.quantization_begin >= 0:
            raise HeadPruningError(f"--quantization-begin is {options.quantization_begin}; give {STEPS}.")
        try:
            re.compile(options.not_to_quantize or "")
        except re.error as error:
            raise HeadPruningError(
                f"--not-to-quantize is no regular expression ({one_line(error)}); mend it."
            ) from error

    def summary(self) -> str:
        return f"{len(self._layers)} linear layers to 8 bits; {super().summary()}"

    def attach(self, session: SessionView) -> None:
        from .engine.linears import base_config, find_linears, prepare

        base_config()
        super().attach(session)
        self._layers = find_linears(session.model, self.config.not_to_quantize)
        if not self._layers:
            raise HeadPruningError(
                "The model has no linear layer (torch.nn.Linear, with weights of its own) to quantize, or "
                "--not-to-quantize names them all."
            )
        if any(pruner.needs_gates for pruner in session.pruners):
            logger.warning(
                "pruned heads and units stay as zeros in the 8-bit model, out of which they cannot be cut; for a "
                "smaller one prune without quantization, cut them out, and train that with it"
            )
        self._begin: Optional[int] = None
        self._begun = self._updating = False
        prepare(session.model, list(self._layers), averaged=self.config.input_ranges == "average")
        self._switch(False)

    def detach(self) -> None:
        from .engine.linears import put_back

        if self.session is not None and getattr(self, "_layers", None):
            put_back(self.session.model, self._layers)
        super().detach()

    def begin_anew(self) -> None:
        # The layers stay in their places: gates are on them, and a teacher's may stand in for them.
        for each in self._inputs:
            each.load([0.0] * 4)
        self._begin, self._updating = None, False
        self._switch(False)

    @property
    def _prepared(self) -> list[Any]:
        return [self.session.model.get_submodule(name) for name in self._layers]

    @property
    def _inputs(self) -> list[QuantizedInput]:
        return [layer.activation_fake_quantizer for layer in self._prepared]

    def _switch(self, on: bool) -> None:
        for layer in self._prepared:
            layer.weight_fake_quantizer.enabled = layer.activation_fake_quantizer.enabled = on
        self._begun = on

    def before_update(self, step: int) -> None:
        if self._begin is None:
            self._begin = resolve_steps(
                self.config.quantization_begin, self.session.total_steps, "--quantization-begin"
            )
        if not self._begun and step >= self._begin:
            self._switch(True)
        if self._begun:
            from .engine.inputs import begin_update  # executes torch, which listing methods does not need

            begin_update(self._inputs)
            self._updating = True

    def after_backward(self, loss_scale: float, denominator: float, micro_batches: int) -> None:
        if self._begun:
            from .engine.inputs import end_update

            end_update(self._inputs, self.session.greatest)

    def after_step(self, step: int, lr_factor: float) -> None:
        self._updating = False

    def skip_update(self, step: int) -> None:
        if self._updating:
            from .engine.inputs import undo_update

            undo_update(self._inputs)  # an overflow has no range, and a batch that is tried again would count twice
        self._updating = False

    def at_target(self) -> bool:
        return self._begun

    def harden(self) -> None:
        """Quantize from now on, whatever the schedule says."""
        self._switch(True)

    def stored(self) -> ContextManager[None]:
        from .engine.linears import stored

        return stored(self.session.model, list(self._layers)) if self._begun else contextlib.nullcontext()

    def save_beside(self, folder: Path) -> None:
        from .engine.files import save_ranges

        inputs = zip(self._layers, self._inputs)
        save_ranges(folder, self.config.input_ranges, {name: each.state()[2:] for name, each in inputs})

    def state_dict(self) -> dict[str, np.ndarray]:
        states = [each.state() for each in self._inputs]
        return {
            "begun": np.array([float(self._begun)]),
            "begin": np.array([-1.0 if self._begin is None else float(self._begin)]),
            "ranges": np.array(states, dtype=float).flatten(),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        ranges = state["ranges"].reshape(len(self._layers), 4)
        for each, values in zip(self._inputs, ranges.tolist()):
            each.load(values)
        begin = int(state["begin"][0]) if "begin" in state else -1  # earlier versions kept none
        self._begin, self._updating = None if begin < 0 else begin, False
        self._switch(bool(state["begun"][0]))


register_pruner(
    name="qat",
    config=QatConfig,
    pruner=QatPruner,
    selected_by=lambda options: options.do_quantization,
    example={"quantization_begin": 0.2},
)
