"""The loss of masked words, and of the next sentence where the model has a head for it, in any Trainer."""

import contextlib
from typing import Any, Mapping, Optional

import numpy as np
import torch
from transformers import EvalPrediction

from head_pruning.distillation.engine.vocabulary import cross_entropy
from head_pruning.outputs import LastLayer, Late, logits_of

from .batches import IGNORED

_Trainer: Any = object  # the class of the trainer comes after the mixin


class Pretrains(_Trainer):
    """A Trainer on batches of :class:`hf_plugin.pretraining.batches.Masker`.

    The loss is the mean over the masked words of a micro-batch, plus the mean over its pairs. In training the logits
    of the vocabulary are made for masked words only, a chunk at a time, where :attr:`last_layer` is set.
    """

    #: The layer that makes logits of words, to be left out of the model's forward pass; None: it is not.
    last_layer: Optional[LastLayer] = None
    loss_is_scaled_for_ga = False
    # Also for versions that ask for this: the loss is a mean, which the Trainer divides by the micro-batches.
    model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See the class."""
        given = dict(inputs)
        labels, rows, follows = (given.pop(n, None) for n in ("labels", "label_rows", "next_sentence_label"))
        last = self.last_layer if model.training else None
        with contextlib.nullcontext() if last is None else last.left_out():
            outputs = model(**given)
        words, *others = logits_of(outputs)
        with self.accelerator.autocast():
            made = words if last is None else last.late(words)
            flat = made.flat() if isinstance(made, Late) else made.flatten(0, -2)
            loss = cross_entropy(flat[rows], labels.flatten()[rows])
            if follows is not None:
                loss = loss + torch.nn.functional.cross_entropy(others[0].float(), follows)
        return (loss, outputs) if return_outputs else loss


def scores_of(logits: Any, labels: Any) -> torch.Tensor:
    """What an evaluation keeps of a batch, ``[B, 4]``: loss and number of the masked words, loss of the pair, whether
    that was guessed.
    """
    logits, labels = (each if isinstance(each, (tuple, list)) else (each,) for each in (logits, labels))
    words, wanted = logits[0], labels[0]
    losses = torch.nn.functional.cross_entropy(
        words.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(wanted.shape)
    columns = [losses.sum(1), (wanted != IGNORED).sum(1).float()]
    if len(labels) > 1:
        far = torch.nn.functional.cross_entropy(logits[1].float(), labels[1], reduction="none")
        columns += [far, (logits[1].argmax(-1) == labels[1]).float()]
    return torch.stack(columns, dim=1)


def metrics_of(outputs: EvalPrediction) -> dict[str, float]:
    """The metrics out of :func:`scores_of`: means over all masked words, and over all pairs."""
    scores = np.asarray(outputs.predictions, dtype=np.float64)
    words = scores[:, 0].sum() / max(1.0, scores[:, 1].sum())
    found = {"mlm_loss": float(words), "perplexity": float(np.exp(min(words, 700.0)))}
    if scores.shape[1] > 2:
        found |= {"nsp_loss": float(scores[:, 2].mean()), "nsp_accuracy": float(scores[:, 3].mean())}
    return found
