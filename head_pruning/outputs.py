"""What a model gave for one micro-batch, and the hooks that record it, whatever the host."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping, Optional

import torch

from .errors import HeadPruningError
from .unit_map import UnitMap

logger = logging.getLogger(__name__)

HIDDEN_STATES, ATTENTIONS, EAGER_ATTENTION = "hidden_states", "attentions", "eager_attention"
#: What a pruner may need of its host.
NEEDS = frozenset({HIDDEN_STATES, ATTENTIONS, EAGER_ATTENTION})


@dataclass(frozen=True)
class Late:
    """Logits that are not made yet: ``layer(features)``, which losses may make a chunk at a time.

    Args:
        features: ``[..., width]``.
        layer: the model's last one.
    """

    features: torch.Tensor
    layer: torch.nn.Linear

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits."""
        return (*self.features.shape[:-1], self.layer.out_features)

    def flat(self) -> "Late":
        """As ``[rows, classes]``."""
        return Late(self.features.flatten(0, -2), self.layer)

    def __getitem__(self, rows: Any) -> "Late":
        return Late(self.features[rows], self.layer)

    def whole(self) -> torch.Tensor:
        """The logits."""
        return self.layer(self.features)


def _input(features: torch.Tensor) -> torch.Tensor:
    return features


@dataclass(frozen=True)
class LastLayer:
    """The layer that makes a model's largest logits, and how to leave it out of a call.

    Args:
        find: finds the layer in the model, and in one like it, such as its teacher; None where it has none.
        layer: the model's.
    """

    find: Callable[[torch.nn.Module], Optional[torch.nn.Linear]]
    layer: torch.nn.Linear

    @classmethod
    def of(
        cls, model: torch.nn.Module, find: Callable[[torch.nn.Module], Optional[torch.nn.Linear]]
    ) -> "Optional[LastLayer]":
        """That of a model; None where it cannot be left out so that what the model gives tells of it."""
        layer = find(model)
        if type(layer) is not torch.nn.Linear or layer.in_features == layer.out_features:  # others compute more
            return None
        return cls(find, layer)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside the block the model gives the layer's input in the place of its logits."""
        vars(self.layer)["forward"] = _input
        try:
            yield
        finally:
            del vars(self.layer)["forward"]

    def late(self, logits: torch.Tensor) -> "torch.Tensor | Late":
        """The logits, or what stands in their place."""
        return Late(logits, self.layer) if logits.shape[-1] == self.layer.in_features else logits


@dataclass(frozen=True)
class Outputs:
    """What :meth:`Pruner.loss` is given of one micro-batch.

    Args:
        raw: what the host's model gave, as it is.
        hidden_states: ``[B, T, width]`` each. For every stack of layers what goes into its first layer, then what
            comes out of each layer, in the order of the unit map; a layer that runs several times counts as often.
        attentions: ``[B, H, T, S]`` each, the attention probabilities of each site in the order of the unit map.
        masks: one per hidden state, ``bool[B, T]`` that is true at tokens and false at padding, or None where the
            host knows of no padding or its mask does not fit.
        attention_masks: one pair per entry of ``attentions``: the masks of what attends and of what is attended to.
        tokens: the same masks by ``encoder`` and ``decoder``.
        weight: what the mean of a term over the micro-batch must be multiplied with to weigh as much as the task
            loss: 1 where that is a mean itself, the number of tokens where it is a sum over them.
        args: the positional arguments that the model was called with.
        kwargs: the others.
        last: the layer that the model was called without; None: it was called as a whole.
    """

    raw: Any = None
    hidden_states: tuple[torch.Tensor, ...] = ()
    attentions: tuple[torch.Tensor, ...] = ()
    masks: tuple[Optional[torch.Tensor], ...] = ()
    attention_masks: tuple[tuple[Optional[torch.Tensor], Optional[torch.Tensor]], ...] = ()
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    weight: "float | torch.Tensor" = 1.0
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    last: Optional[LastLayer] = None

    @property
    def logits(self) -> tuple[torch.Tensor, ...]:
        """``[..., classes]`` each: one for most tasks, that of the start and that of the end for spans of text."""
        return tuple(each.whole() if isinstance(each, Late) else each for each in self.late_logits)

    @property
    def late_logits(self) -> "tuple[torch.Tensor | Late, ...]":
        """:attr:`logits`, where the model was called without its last layer not made yet."""
        found = logits_of(self.raw)
        return found if self.last is None else tuple(map(self.last.late, found))

    def call(self, model: torch.nn.Module) -> Any:
        """What another model, such as a teacher, gives for the same micro-batch."""
        return model(*self.args, **self.kwargs)


def logits_of(raw: Any) -> tuple[torch.Tensor, ...]:
    """The logits among a model's outputs: a tensor itself, entries whose names end so, or the first of a tuple.

    Raises:
        HeadPruningError: there are none.
    """
    if torch.is_tensor(raw):
        return (raw,)
    if isinstance(raw, Mapping):
        named = [value for name, value in raw.items() if name.endswith("logits") and torch.is_tensor(value)]
    else:
        # A tuple of transformers' begins with the loss, which has no dimension.
        named = [value for value in _tensors(raw) if value.dim() > 0][:1]
    if not named:
        raise HeadPruningError(f"The model gave no logits ({type(raw).__name__}), which a pruner compares.")
    return tuple(named)


def last_of(output: Any) -> Optional[torch.Tensor]:
    """The attention probabilities that an attention module gives as the last of its outputs, ``[B, H, T, S]``."""
    last = output[-1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    return last if torch.is_tensor(last) and last.dim() == 4 else None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in (values if isinstance(values, (tuple, list)) else (values,)) if torch.is_tensor(value))


class _Call:
    """What the hooks write down: one call of the model, from its beginning to its end.

    Between the two, so not when activations are computed again in the backward pass. A deep copy of a model takes its
    hooks along; those of the copy record nothing.
    """

    def __init__(self, live: bool = True) -> None:
        self.live, self.running = live, False
        self.forget()

    def __deepcopy__(self, memo: dict) -> "_Call":
        return _Call(live=False)

    def forget(self) -> None:
        self.finished, self.raw = False, None
        self.args: tuple = ()
        self.kwargs: Mapping[str, Any] = {}
        self.layers: dict[str, list[tuple]] = {}
        self.sites: dict[str, list[Any]] = {}
        self.lost: list[str] = []

    def begin(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if self.live:
            self.forget()
            self.running, self.args, self.kwargs = True, args, kwargs

    def end(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if self.running:
            self.running, self.finished, self.raw = False, True, output

    def check_gradient(self, name: str, module: torch.nn.Module, given: Optional[torch.Tensor], of_all: bool) -> None:
        """Write down a module that learns but gives no gradient; its parameters are those that it runs with now.

        ``of_all``: whether what it gave depends on all of them.
        """
        expected = module.training and (of_all or not torch.is_grad_enabled())
        if given is not None and not given.requires_grad and expected:
            if any(parameter.requires_grad for parameter in module.parameters()):
                self.lost.append(name)


class _Layer:
    """Writes down what goes into and what comes out of one layer."""

    def __init__(self, call: _Call, name: str) -> None:
        self.call, self.name = call, name

    def hook(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if self.call.running:
            into, out = next(_tensors([*args, *kwargs.values()]), None), next(_tensors(output), None)
            self.call.layers.setdefault(self.name, []).append((into, out))
            self.call.check_gradient(self.name, module, out, of_all=True)


class _Site:
    """Writes down what comes out of one attention module."""

    def __init__(self, call: _Call, name: str, read: Callable[[Any], Optional[torch.Tensor]]) -> None:
        self.call, self.name, self.read = call, name, read

    def hook(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if self.call.running:
            found = self.read(output)
            self.call.sites.setdefault(self.name, []).append(found)
            # Probabilities do not depend on the values' projection, but always on what goes in.
            into = next(_tensors([*args, *kwargs.values()]), None)
            moves = into is not None and into.requires_grad
            self.call.check_gradient(self.name, module, found, of_all=moves)


class Recorder:
    """Records calls of a model by forward hooks on it, on its layers and on its attention modules.

    So the model need not know how to return hidden states, and a teacher is read as its student is::

        recorder = Recorder(teacher, unit_map(teacher), {"hidden_states"})
        recorder.attach()
        outputs.call(teacher)
        theirs = recorder.take().hidden_states

    Args:
        model: the model.
        unit_map: its layers and sites; None where only the call itself is recorded.
        needs: any of ``hidden_states`` and ``attentions``.
        time_first: whether layers give ``[T, B, width]``.
        read_attention: finds ``[B, H, T, S]`` in what an attention module gives.

    Raises:
        HeadPruningError: the map names a module that the model lacks, or there is no map.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        unit_map: Optional[UnitMap],
        needs: "frozenset[str] | set[str]" = frozenset(),
        *,
        time_first: bool = False,
        read_attention: Callable[[Any], Optional[torch.Tensor]] = last_of,
    ) -> None:
        self.model = model
        self.hidden, self.attentions = HIDDEN_STATES in needs, ATTENTIONS in needs
        self.time_first, self.read_attention = time_first, read_attention
        if unit_map is None and (self.hidden or self.attentions):
            raise HeadPruningError("Hidden states and attentions are found by the model's unit map; pass it.")
        self._layers = () if unit_map is None else unit_map.layers
        self._sites = () if unit_map is None else unit_map.attention
        self._call = _Call()
        self._handles: list = []
        #: Whether it was told that a mask does not fit.
        self.told = False

    @property
    def live(self) -> bool:
        """Whether calls are recorded."""
        return self._call.live

    @live.setter
    def live(self, live: bool) -> None:
        self._call.live = live
        if not live:
            self._call.running = False
            self._call.forget()

    def attach(self) -> None:
        """Put the hooks on. Idempotent."""
        if self._handles:
            return
        call, handles = self._call, self._handles
        handles.append(self.model.register_forward_pre_hook(call.begin, with_kwargs=True))
        if self.hidden:
            for name in self._layers:
                layer = _Layer(call, name)
                handles.append(self._module(name).register_forward_hook(layer.hook, with_kwargs=True))
        if self.attentions:
            for site in self._sites:
                hook = _Site(call, site.name, self.read_attention).hook
                handles.append(self._module(site.name).register_forward_hook(hook, with_kwargs=True))
        handles.append(self.model.register_forward_hook(call.end, with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()
        self._call.forget()

    def _module(self, name: str) -> torch.nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise HeadPruningError(f"The model has no module {name}, which the unit map names; correct it.") from error

    def take(self, masks: Optional[Mapping[str, torch.Tensor]] = None) -> Outputs:
        """What the model's last call gave; it is forgotten then.

        Args:
            masks: ``bool[B, T]`` of the tokens that are no padding, by ``encoder`` and ``decoder``.

        Raises:
            HeadPruningError: the model was not called as a whole, or did not give what is needed.
        """
        call = self._call
        if not call.finished:
            raise HeadPruningError(
                "A pruner's loss looks at what the model gave, but the model was not called since; compute the task "
                "loss by calling the model that the session is on (not a part of it), between before_update() and "
                "loss()."
            )
        tokens = dict(masks or {})
        states, sides = self._hidden_states() if self.hidden else ([], [])
        attentions, pairs = self._attentions() if self.attentions else ([], [])
        self._refuse_lost_gradients()
        found = Outputs(
            raw=call.raw,
            hidden_states=tuple(states),
            attentions=tuple(attentions),
            masks=tuple(self._fitting(tokens.get(side), state.shape[:-1]) for side, state in zip(sides, states)),
            attention_masks=tuple(
                (
                    self._fitting(tokens.get(query), (len(probabilities), probabilities.shape[-2])),
                    self._fitting(tokens.get(key), (len(probabilities), probabilities.shape[-1])),
                )
                for (query, key), probabilities in zip(pairs, attentions)
            ),
            tokens=tokens,
            args=call.args,
            kwargs=call.kwargs,
        )
        call.forget()
        return found

    def _fitting(self, mask: Optional[torch.Tensor], shape: tuple[int, ...]) -> Optional[torch.Tensor]:
        """The mask where it is of this shape, else None: convolutions, windows and prompts change the length."""
        if mask is None or tuple(mask.shape) == tuple(shape):
            return mask
        if not self.told:
            self.told = True
            logger.warning(
                "the mask of the tokens is of the shape %s where the model computes with %s, so padding counts as "
                "tokens do in what is compared with a teacher; put examples of one length into a batch to have none",
                list(mask.shape),
                list(shape),
            )
        return None

    def _hidden_states(self) -> tuple[list[torch.Tensor], list[str]]:
        states, sides, stack, side = [], [], None, "encoder"
        kinds = {site.layer: site.kind for site in self._sites}
        for name in self._layers:
            runs = self._call.layers.get(name)
            if not runs or any(out is None for _, out in runs):
                raise HeadPruningError(
                    f"The layer {name} did not run or gave no tensor, so its hidden state is missing; switch dropping "
                    "of layers off (layerdrop), or leave it out of the unit map."
                )
            if name in kinds:  # a layer without heads is of the stack that it stands in
                side = kinds[name].partition("_")[0]
            first, stack = stack != name.rpartition(".")[0], name.rpartition(".")[0]
            for state in [*([runs[0][0]] if first and runs[0][0] is not None else []), *(out for _, out in runs)]:
                states.append(state.transpose(0, 1) if self.time_first and state.dim() == 3 else state)
                sides.append(side)
        return states, sides

    def _refuse_lost_gradients(self) -> None:
        if self._call.lost and torch.is_grad_enabled():
            raise HeadPruningError(
                f"What {self._call.lost[0]} gave carries no gradient, as under gradient checkpointing of the "
                "reentrant kind; choose the other one (use_reentrant=False), or switch it off."
            )

    def _attentions(self) -> tuple[list[torch.Tensor], list[tuple[str, str]]]:
        found: list[torch.Tensor] = []
        pairs: list[tuple[str, str]] = []
        for site in self._sites:
            read = self._call.sites.get(site.name, [])
            runs = [run for run in read if run is not None]
            if not runs or len(runs) < len(read):
                raise HeadPruningError(
                    f"{site.name} gave no attention probabilities, which a pruner needs; switch the model to eager "
                    'attention (attn_implementation="eager").'
                )
            found += runs
            side = site.kind.partition("_")[0]
            pairs += [(side, "encoder" if site.kind.endswith("cross") else side)] * len(runs)
        return found, pairs
