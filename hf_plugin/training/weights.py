"""Weight pruners in transformers: the files that they leave."""

import contextlib
from pathlib import Path
from typing import Mapping, Optional

import transformers
from torch import nn

from head_pruning import PruningSession
from head_pruning.files import atomic_path
from head_pruning.pruner import options_of
from head_pruning.report.weights import count_weights, write_weight_artifacts
from head_pruning.surgery.zeros import removed_counts, zeroed_heads

from ..saving.card import is_adapted, weight_card, weight_section


def save_weight_masks_and_report(
    folder: "str | Path",
    model: nn.Module,
    session: PruningSession,
    *,
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
    history: Optional[list] = None,
) -> None:
    """Add masks, densities and their picture to the folder of a pruned model, and to its card (new if no heads went).

    The numbers are those of the model as it is saved: with the weights of removed heads at zero too, but where only
    adapters are saved.

    Args:
        folder: where the model was saved.
        model: the model.
        session: the session that pruned it.
        scores: metrics for a new card.
        dataset: what they were measured on.
        history: one entry per scored state, if no heads went.

    Raises:
        HeadPruningError: there is no mask yet.
    """
    mask, masks = session.head_mask(), session.weight_masks()
    # Where heads went too, the report of these names all methods already.
    pruners = session.pruners if mask is None else session.of_kind("weights")
    method = "+".join(pruner.name for pruner in pruners)
    options = options_of(pruners)
    removed = {} if mask is None else removed_counts(model, mask)
    zeroed = contextlib.nullcontext() if mask is None or is_adapted(model) else zeroed_heads(model, mask)
    with zeroed, session.stored():
        parameters = dict(model.named_parameters())
        counts, left_dense = count_weights(masks, parameters, removed=removed), session.left_dense()
        write_weight_artifacts(
            folder,
            masks,
            parameters,
            counts=counts,
            left_dense=left_dense,
            method=method,
            options=options,
            head_mask=mask,
            history=history,
            versions={"transformers": transformers.__version__},
        )
    path = Path(folder) / "README.md"
    if mask is None:
        card = weight_card(
            model, counts, method=method, options=options, left_dense=left_dense, scores=scores, dataset=dataset
        )
    else:  # save_pruned wrote it just before
        card = "\n".join([path.read_text(encoding="utf-8"), *weight_section(counts, left_dense)])
    with atomic_path(path) as temporary:
        temporary.write_text(card, encoding="utf-8")
