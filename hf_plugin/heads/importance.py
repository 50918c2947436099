"""Head importance by gradients (Michel et al. 2019), on any transformers model."""

import contextlib
import logging
import re
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from head_pruning import HeadMask, HeadPruningError, UnitMap, full_mask
from head_pruning.gates import GateBank
from head_pruning.gates.engine.bank import gates_on
from head_pruning.importance import ImportanceAccumulator, normalize_importance
from head_pruning.masks import whole_number
from head_pruning.progress import bar_options

from ..mapping.unit_map import unit_map as map_units
from .example_losses import mean_of_examples, rows_of, token_losses
from .masking import gates_of_mask, masked_heads
from .pruning import pruned_heads

logger = logging.getLogger(__name__)

# What a model computes its loss from.
_LABELS = re.compile("label|start_positions|end_positions|return_loss")


def head_importance(
    model: nn.Module,
    dataloader: Iterable,
    *,
    per_example: bool = False,
    mask: Optional[HeadMask] = None,
    loss: Optional[Callable[[nn.Module, Any], torch.Tensor]] = None,
    normalize_by_layer: bool = True,
    normalize_globally: bool = True,
    unit_map: Optional[UnitMap] = None,
    progress: bool = True,
) -> np.ndarray:
    """How much the loss feels each head: the sum of ``|d loss / d gate|``, by Michel, Levy and Neubig (section 4.1).

    The model runs in evaluation mode without gradients of its weights, and is left as it was. Heads removed by
    :func:`hf_plugin.mask_heads` stay removed, their importance is 0; likewise under the present mask of an open
    session or a ``head_mask`` block, of which it warns.

    Args:
        model: any model that :func:`hf_plugin.unit_map` can map.
        dataloader: batches as the model takes them, with labels; moved to the model's device.
        per_example: take the absolute value for each example, as the paper does; default: for each batch, as its code
            does, where derivatives of opposite sign cancel. The inputs of the gated modules must start with the
            examples' dimension. An example's loss is the mean over its own labels, as if it came alone. Where labels
            are left out (-100) and the model's loss is no plain mean of cross entropies over the others, examples do
            come alone, which takes longer.
        mask: heads taken as removed while measuring; unlike the heads masked by ``mask_heads`` they have
            derivatives too, as in the published code.
        loss: ``(model, batch) -> loss``, ``[]`` as the mean over the examples or ``[B]`` with one for each; default:
            the loss that the model returns. Per batch, longer examples weigh more in a mean over all tokens.
        normalize_by_layer: divide the scores of each site by their L2 norm.
        normalize_globally: scale all scores to 0 to 1.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`.
        progress: show a bar.

    Returns:
        ``float64[N]``, one score per head in the order of the unit map (``unit_map.by_site(scores)`` gives them by
        name). Without normalisation: the sum divided by the number of attended input tokens (of examples, where the
        inputs are not tokens).

    Raises:
        HeadPruningError: there are no batches, no loss, a loss or scores that are not finite (also when all labels of
            a batch, or per example those of an example, are -100), or no gradients since it was called in
            ``torch.inference_mode()``.
        UnfiredSiteError: a site of the map did not run in the first batch.
    """
    if torch.is_inference_mode_enabled():
        raise HeadPruningError(
            "The importance is a gradient, which torch.inference_mode() forbids; call head_importance outside of it."
        )
    unit_map = unit_map or map_units(model)
    if mask is None:
        mask = full_mask(unit_map)
    else:
        mask = mask.fitted(unit_map)
    _tell_gates(model, unit_map)
    gates = GateBank(model, unit_map)
    accumulator = ImportanceAccumulator(gates)
    losses = _Losses(model, loss, gates)
    with _frozen(model), _attached(gates), accumulator.probing(mask), torch.enable_grad():
        tokens = torch.zeros((), dtype=torch.float64, device=gates.device)
        for batch in tqdm(dataloader, desc="importance", disable=not progress, leave=False, **bar_options()):
            batch = _moved(batch, gates.device)
            losses.batches += 1
            if per_example:
                _add_examples(accumulator, losses, batch)
            else:
                losses.of(batch).mean().backward()
                accumulator.add()
            tokens += _tokens(batch)
    losses.check()
    scores = accumulator.scores() / max(1.0, float(tokens))
    return normalize_importance(scores, unit_map, by_layer=normalize_by_layer, globally=normalize_globally)


def least_important(
    model: nn.Module, scores: np.ndarray, count: int, *, unit_map: Optional[UnitMap] = None
) -> dict[str, list[int]]:
    """The ``count`` heads with the lowest scores, as :func:`hf_plugin.prune_heads` takes them; ties: the lower index.

    Heads that ``mask_heads`` or ``prune_heads`` removed already are not among them; of a model that was pruned, the
    heads are numbered as in the original.

    Args:
        model: the model that the scores are of.
        scores: ``[N]``, such as :func:`head_importance` gives.
        count: how many heads.
        unit_map: the sites; default: found by :func:`hf_plugin.unit_map`.

    Raises:
        HeadPruningError: the model has no ``count`` heads left, or the scores are of another model or not finite.
    """
    unit_map = unit_map or map_units(model)
    mask = (masked_heads(model) or full_mask(unit_map)).numbering(unit_map.units)
    unit_map.check_same_heads(mask.unit_map, "The unit map")
    if len(scores) != unit_map.num_heads:
        raise HeadPruningError(
            f"There are {len(scores)} scores for {unit_map.num_heads} heads; give the scores of this model."
        )
    if not np.isfinite(np.asarray(scores, dtype=np.float64)).all():
        raise HeadPruningError("Scores are NaN or infinite, so no head is the least important; measure them anew.")
    left = np.flatnonzero(mask.keep)
    if whole_number(count) is None or not 0 <= count <= left.size:
        raise HeadPruningError(f"The model has {left.size} heads left; choose from 0 to {left.size} of them.")
    chosen = np.zeros(unit_map.num_heads, dtype=bool)
    chosen[left[np.argsort(np.asarray(scores)[left], kind="stable")[:count]]] = True
    original = pruned_heads(model)
    numbers = {} if original is None else original.numbering(unit_map.units).kept_heads()
    return {
        name: [int(numbers[name][head]) if name in numbers else int(head) for head in np.flatnonzero(heads)]
        for name, heads in unit_map.by_site(chosen).items()
    }


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and none of its parameters requires a gradient."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _attached(gates: GateBank) -> Iterator[None]:
    """Inside the block the gates are on."""
    gates.attach()
    try:
        yield
    finally:
        gates.detach()


def _tell_gates(model: nn.Module, unit_map: UnitMap) -> None:
    """Warn of gates other than those of ``mask_heads``, under which the importance is measured."""
    own = {id(gate) for gate in gates_of_mask(model)}
    modules = dict(model.named_modules())
    found = [gate for site in unit_map.sites for gate in gates_on(modules[site.out_proj]) if id(gate) not in own]
    if found:
        kept = sum(int((gate.evaluation_gate.detach() > 0).sum()) for gate in found)
        logger.warning(
            "a session or a head_mask block has gates on the model: the importance is measured under its present mask "
            "of %d of %d heads; detach() the session, or leave the block, to measure the whole model",
            kept,
            sum(gate.heads for gate in found),
        )


class _Losses:
    """The losses of batches, by passes through all gates, and the first of them that is not finite."""

    def __init__(self, model: nn.Module, loss: Optional[Callable], gates: GateBank) -> None:
        self.model, self.loss, self.gates = model, loss, gates
        self.batches = 0
        self.broken = torch.zeros((), dtype=torch.int64, device=gates.device)  # its number, from 1

    def of(self, batch: Any) -> torch.Tensor:
        """``[]`` or ``[B]``."""
        return self.look(self.with_output(batch)[0])

    def with_output(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """The loss, and all that the model returned unless the loss is one of the caller's."""
        output = None
        if self.loss is not None:
            value = self.loss(self.model, batch)
        elif isinstance(batch, Mapping):
            output = self.model(**batch)
            value = _returned_loss(output, batch)
        else:
            raise HeadPruningError(
                f"A batch is a {type(batch).__name__}, not a dict of the model's inputs; pass loss=."
            )
        if value is None:
            raise HeadPruningError("The model returned no loss; put labels into the batches, or pass loss=.")
        self.gates.check_fired()
        return value, output

    def look(self, value: torch.Tensor) -> torch.Tensor:
        """Keep in mind whether it is finite; no device is waited for."""
        broken = ~value.detach().isfinite().all().to(self.broken.device)
        self.broken = torch.where((self.broken == 0) & broken, self.batches, self.broken)
        return value

    def check(self) -> None:
        """Raise HeadPruningError if there were no batches, or a loss was not finite."""
        if not self.batches:
            raise HeadPruningError("The dataloader has no batches, so no importance can be measured; give it data.")
        broken = int(self.broken)
        if broken:
            raise HeadPruningError(
                f"The loss of batch {broken} of {self.batches} is NaN or infinite, so no importance can be measured; "
                "leave out examples whose labels are all -100, or correct the data or the model's precision."
            )


def _add_examples(accumulator: ImportanceAccumulator, losses: _Losses, batch: Any) -> None:
    """Add the absolute derivatives of each example's own loss."""
    count = _examples(batch)
    if not count:
        raise HeadPruningError("A batch has no tensor with examples, so they cannot be counted; put one in.")
    with accumulator.examples(count):
        value, output = losses.with_output(batch)
        each: Optional[torch.Tensor] = value
        if not value.dim() and mean_of_examples(losses.model, batch):
            each = value * count  # of a mean each example's own loss is B times its share
        elif not value.dim():
            each = None if output is None else token_losses(value, output, batch)
        if each is not None:
            losses.look(each).sum().backward()
    if each is None:
        for row in rows_of(batch, count):
            losses.of(row).mean().backward()
            accumulator.add()


def _returned_loss(output: Any, batch: Mapping) -> Optional[torch.Tensor]:
    """The loss in what a model returned, or None; that of a tuple comes first, where labels were given."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        labelled = any(_LABELS.search(name) and batch[name] is not None for name in batch)
        first = output[0] if output and labelled else None
        return first if isinstance(first, torch.Tensor) and first.numel() == 1 else None
    return getattr(output, "loss", None)


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on ``device``; containers of other types are left alone."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _examples(batch: Any) -> int:
    """B: the first dimension of the labels, or of the first tensor of a batch."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), torch.Tensor):
        batch = batch["labels"]
    if isinstance(batch, torch.Tensor) and batch.dim():
        return batch.shape[0]
    for part in batch.values() if isinstance(batch, Mapping) else batch if type(batch) in (list, tuple) else ():
        count = _examples(part)
        if count:
            return count
    return 0


def _tokens(batch: Any) -> Any:
    """The number of attended tokens of a batch, or of its examples if it has no tokens; waits for no device."""
    if isinstance(batch, Mapping):
        if isinstance(batch.get("attention_mask"), torch.Tensor):
            return (batch["attention_mask"] != 0).sum()
        if isinstance(batch.get("input_ids"), torch.Tensor):
            return batch["input_ids"].numel()
    return _examples(batch)
