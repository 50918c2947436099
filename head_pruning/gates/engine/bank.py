"""Putting gates on a model and taking them off, without copying or subclassing model code.

A gate sits on a head, or on a feed-forward unit where the map numbers these: a unit is a head one feature wide.
"""

import contextlib
import logging
import sys
from typing import Any, Iterator, Optional

import numpy as np
import torch
from torch import nn

from ...compact.recipe import input_width
from ...errors import HeadPruningError, UnfiredSiteError
from ...unit_map import AttentionSite, Site, UnitMap

logger = logging.getLogger(__name__)


class HeadGate(nn.Module):
    """Scales each head's slice of the input of an output projection: ``out = W (g * concat(heads)) + b``.

    A forward pre-hook that is a bound method of this module, which is not registered in the model: so the model's
    parameters and state dict stay as they are, and ``copy.deepcopy`` of the model copies the gate along.

    Args:
        heads: H.
        head_dim: width of one head; the hooked input has ``H * head_dim`` features in its last dimension.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.training_gate = torch.ones(heads)
        self.evaluation_gate = torch.ones(heads)
        self.mode = "follow"  # "follow" the hooked module's .training, or force "training" / "evaluation"
        self.fired = self.trained = False  # whether it ran, and whether with its training gate

    def scale(self, module: nn.Module, args: tuple) -> tuple:
        """The hook. ``args[0]`` is ``[..., H * head_dim]``."""
        if not self.fired:
            self.fired = True
        training = module.training if self.mode == "follow" else self.mode == "training"
        if training and not self.trained:
            self.trained = True
        gate = self.training_gate if training else self.evaluation_gate
        heads = args[0].unflatten(-1, (self.heads, self.head_dim))
        if gate.device != heads.device:  # the model moved after its gates were set, or lies on several devices
            gate = gate.to(heads.device)  # not kept: what the bank sets next must be seen here too
        if gate.dim() == 2:
            gate = _of_examples(gate, heads)
        # Multiplied in float32 also for a half-precision model: the gate's gradient is a sum over all tokens, which
        # float16 could not hold.
        return ((heads * gate.unsqueeze(-1)).to(heads.dtype).flatten(-2), *args[1:])


# Gradients of half precision would be 0 without a scale; a power of two changes no other.
_SCALE = 128.0


class _Without(torch.autograd.Function):
    """The identity of a loss, whose backward pass takes ``gradients`` away from ``leaves``."""

    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, gradients: list, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return term.clone()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple:
        return outer, None, *(None if each is None else -outer * each for each in ctx.gradients)


def _of_examples(gate: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Gates ``[B, H]`` in the shape that multiplies ``heads``, whose last dimensions are H and the head dim.

    The examples are the first dimension, the second after one of another size (time first), or run along the first
    (examples cut into windows or packed into equally long rows).
    """
    examples, first = gate.shape[0], heads.shape[0]
    if first != examples and heads.dim() > 3 and heads.shape[1] == examples:
        return gate
    if first % examples:
        raise HeadPruningError(
            f"A gated module gets an input of shape {list(heads.flatten(-2).shape)}, in which the {examples} examples "
            "of the batch cannot be told apart; measure the importance per batch."
        )
    if first != examples:
        gate = gate.repeat_interleave(first // examples, dim=0)
    return gate.view(first, *[1] * (heads.dim() - 3), -1)


def gates_on(module: nn.Module) -> list[HeadGate]:
    """The gates that are on a module, or on a module in it (an output projection that an adapter wraps)."""
    hooks = (hook for inner in module.modules() for hook in inner._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, HeadGate)]


def refuse_gates(model: nn.Module, unit_map: UnitMap, cure: str, *, besides: Optional["GateBank"] = None) -> None:
    """Raise HeadPruningError, whose sentence ends with ``cure``, if the heads of a site are gated.

    Args:
        model: the model.
        unit_map: its sites; those that the model lacks do not count.
        cure: what to do, without a full stop.
        besides: gates that may be on the model.
    """
    known = [] if besides is None else [gate for _, gate in besides._targets]
    modules = dict(model.named_modules())
    for site in unit_map.sites:
        found = gates_on(modules[site.out_proj]) if site.out_proj in modules else []
        if any(gate not in known for gate in found):
            raise HeadPruningError(f"The heads of {site.name} are gated; {cure}.")


def _forget_compiled() -> None:
    """Have torch.compile compile anew: what it compiled does not look whether hooks were put on or taken off since.

    (``torch._dynamo.config.skip_nnmodule_hook_guards``.) Nothing happens where nothing was compiled.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and getattr(dynamo.convert_frame.input_codes, "seen", True):
        dynamo.reset()


def _described(site: Site) -> str:
    """A site as a user would write it."""
    if not isinstance(site, AttentionSite):
        return repr(site)
    return (
        f'AttentionSite("{site.name}", "{site.kind}", "{site.layer}", heads={site.heads}, '
        f'head_dim={site.head_dim}, out_proj="{site.out_proj}", projections={site.projections!r})'
    )


class GateBank:
    """All head gates of one model, over one flat buffer of N training gates, N evaluation gates and N gradients.

    The gates read float32 leaves that are slices of the flat buffers, so that setting them is one copy to the device
    and reading their gradients is one copy back.
    """

    def __init__(self, model: nn.Module, unit_map: UnitMap) -> None:
        self._model, self.unit_map = model, unit_map
        modules = dict(model.named_modules())
        self._targets: list[tuple[nn.Module, HeadGate]] = []
        for site in unit_map.sites:
            module = modules.get(site.out_proj)
            if module is None:
                raise HeadPruningError(
                    f"The model has no module {site.out_proj}, the output projection of {site.name}; correct the map."
                )
            width = input_width(module)
            if width not in (None, site.heads * site.head_dim):
                raise HeadPruningError(
                    f"{site.out_proj} reads {width} numbers, and the unit map says {site.heads} heads of "
                    f"{site.head_dim}; correct the map."
                )
            self._targets.append((module, HeadGate(site.heads, site.head_dim)))
        self._handles: list = []
        self._learn = True
        self._place(torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        size = self.unit_map.num_heads
        self.device = device
        self.training_values = torch.ones(size, device=device)
        self.evaluation_values = torch.ones(size, device=device)
        self.gradients = torch.zeros(size, device=device)
        # Copies out of pinned memory do not wait for the device. Reusing the buffers is safe: reading the gradients
        # waits once per update.
        self._staging = [torch.empty(size, pin_memory=device.type == "cuda") for _ in range(2)]
        for (_, gate), (_, where) in zip(self._targets, self.unit_map.slices()):
            leaf = self.training_values[where].detach().requires_grad_(self._learn)
            leaf.grad = self.gradients[where] if self._learn else None
            gate.training_gate = leaf
            gate.evaluation_gate = self.evaluation_values[where].detach()

    def _prepare(self, learn: bool) -> None:
        if learn != self._learn:
            self._learn = learn
            kept = self.evaluation_values
            self._place(self.device)
            self.evaluation_values.copy_(kept)
        self.follow_device()

    def _set(self, target: torch.Tensor, values: np.ndarray, buffer: int) -> None:
        staging = self._staging[buffer]
        staging.numpy()[:] = values
        with torch.no_grad():
            target.copy_(staging, non_blocking=True)

    def follow_device(self) -> None:
        """Move to the model's device if it moved since."""
        parameter = next(self._targets[0][0].parameters(), None)
        if parameter is not None and parameter.device != self.device:
            kept = self.training_values, self.evaluation_values
            self._place(parameter.device)
            self.training_values.copy_(kept[0])
            self.evaluation_values.copy_(kept[1])

    def attach(self) -> None:
        """Put the hooks on. Idempotent."""
        if self._handles:
            return
        # A pruner of the session may have put another module in a place since.
        modules = dict(self._model.named_modules())
        places = zip(self.unit_map.sites, self._targets)
        self._targets = [(modules.get(site.out_proj, module), gate) for site, (module, gate) in places]
        for _, gate in self._targets:
            gate.fired = gate.trained = False
        self.follow_device()
        self._handles = [module.register_forward_pre_hook(gate.scale) for module, gate in self._targets]
        _forget_compiled()

    def detach(self) -> None:
        """Take the hooks off: the model is again what it was."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _forget_compiled()

    def check_in_place(self, model: nn.Module) -> None:
        """Raise HeadPruningError if what stands at the place of a gated module is no longer that module.

        Wrappers without parameters of their own, such as those that shard the module, run it, and its gate, on all
        that goes in; an adapter's path goes past it.
        """
        everywhere = None
        for site, (module, _) in zip(self.unit_map.sites, self._targets):
            standing: Optional[nn.Module]
            try:
                standing = model.get_submodule(site.out_proj)
            except AttributeError:  # renamed by a wrapper further out
                everywhere = everywhere or set(model.modules())
                standing = module if module in everywhere else None
            if standing is module:
                continue
            inside = [] if standing is None else list(standing.modules())
            own = set() if standing is None else set(standing.parameters()) - set(module.parameters())
            if own or module not in inside:
                raise HeadPruningError(
                    f"{site.out_proj} was wrapped or replaced after the gates were put on it, so a part of what it "
                    "computes goes past them; change the model first (get_peft_model, quantization), and open the "
                    "session or mask the heads then."
                )

    def set_training(self, values: np.ndarray) -> None:
        """Set the gates used while training (``[N]``) and clear their gradients."""
        self._prepare(learn=True)
        self._set(self.training_values, values, 0)
        self.gradients.zero_()

    def set_fixed(self, values: np.ndarray) -> None:
        """Set the gates of training and evaluation alike (``[N]``), without gradients."""
        self._prepare(learn=False)
        self._set(self.training_values, values, 0)
        self._set(self.evaluation_values, values, 1)

    def set_evaluation(self, values: np.ndarray) -> None:
        """Set the gates used in evaluation (``[N]``)."""
        self.follow_device()
        self._set(self.evaluation_values, values, 1)

    def without(self, term: torch.Tensor) -> torch.Tensor:
        """``term``, a part of a loss, with all of its gradient but what would reach the training gates.

        It takes a backward pass of its own through the model, though not to its parameters. What is left at the gates
        is the rounding of the two passes.

        Raises:
            HeadPruningError: the model's gradients cannot be computed twice.
        """
        leaves = [gate.training_gate for _, gate in self._targets]
        if not self._learn or not term.requires_grad:
            return term
        try:
            found = torch.autograd.grad(_SCALE * term, leaves, retain_graph=True, allow_unused=True)
            reason = "none reaches them apart from the whole loss, as where activations are checkpointed reentrantly"
        except RuntimeError as error:  # a compiled model that reuses its buffers
            found, reason = (), str(error).split(". ")[0]
        if all(each is None for each in found):
            raise HeadPruningError(
                f"The gates' gradient of the teacher's terms cannot be told from that of the task loss: {reason}. Add "
                "--distill-while-choosing, and gates learn from both."
            )
        return _Without.apply(term, [None if each is None else each / _SCALE for each in found], *leaves)

    @contextlib.contextmanager
    def forced(self, mode: str) -> Iterator[None]:
        """Use the "training" or the "evaluation" gates inside the block, whatever the modules' ``.training`` says."""
        before = [gate.mode for _, gate in self._targets]
        for _, gate in self._targets:
            gate.mode = mode
        try:
            yield
        finally:
            for (_, gate), old in zip(self._targets, before):
                gate.mode = old

    @contextlib.contextmanager
    def reading(self, values: torch.Tensor) -> Iterator[None]:
        """Inside the block the gates of training and evaluation are the caller's tensor, whose gradient flows.

        Args:
            values: ``[N]``, or ``[B, N]`` for a gate per example of a batch of B.
        """
        before = [(gate.training_gate, gate.evaluation_gate) for _, gate in self._targets]
        for (_, gate), (_, where) in zip(self._targets, self.unit_map.slices()):
            gate.training_gate = gate.evaluation_gate = values[..., where]
        try:
            yield
        finally:
            for (_, gate), old in zip(self._targets, before):
                gate.training_gate, gate.evaluation_gate = old

    def silent_sites(self) -> list[str]:
        """Names of the sites whose hook never ran."""
        return [site.name for site, (_, gate) in zip(self.unit_map.sites, self._targets) if not gate.fired]

    def check_fired(self) -> None:
        """Raise UnfiredSiteError with the names of the sites whose hook never ran."""
        silent = self.silent_sites()
        if silent:
            lines = [f"    {_described(site)}," for site in self.unit_map.sites if site.name in silent][:4]
            raise UnfiredSiteError(
                f"The gates of {', '.join(silent)} never ran, so pruning them would do nothing; leave these sites out "
                "of the unit map, or describe them by the module that the model really calls (out_proj below).\n\n"
                + "\n".join(lines)
            )

    def tell_untrained(self) -> None:
        """Warn where gates that learn ran in evaluation mode only, in which they do not."""
        resting = [site.name for site, (_, gate) in zip(self.unit_map.sites, self._targets) if not gate.trained]
        if self._learn and resting:
            logger.warning(
                "the gates of %s ran in evaluation mode only, where they do not learn; call model.train() before the "
                "update (dropout is switched off by a rate of 0)",
                ", ".join(resting),
            )
