"""The masked export, an ordinary model folder whose pruned heads are zero, and the compact one without them."""

import contextlib
import logging
import re
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterator, Mapping, Optional, Sequence, cast

import torch
import transformers
from torch import nn
from transformers.utils import CHAT_TEMPLATE_DIR

from head_pruning import HeadMask, HeadPruningError, Pruner
from head_pruning.files import appearing_at_once
from head_pruning.pruner import options_of
from head_pruning.quantization.engine.tensors import entries
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.plots import plot_head_masks
from head_pruning.surgery.remaining import heads_left
from head_pruning.surgery.zeros import cannot_zero, zeroed_heads

from ..compact.quantizer import dense_twin, mark_compact
from .card import is_adapted, model_card
from .notices import quiet_saving

logger = logging.getLogger(__name__)

PICTURE = "head_mask.png"
# The names of a whole model's weights, and of what else from_pretrained would read beside them.
_WEIGHTS = re.compile(r"model(\.\w+)?(-\d+-of-\d+)?\.safetensors")
_READ = re.compile(
    rf"{_WEIGHTS.pattern}|model\.safetensors\.index(\.\w+)?\.json|adapter_config\.json|adapter_model\.(safetensors|bin)"
)


@contextlib.contextmanager
def replacing_model(folder: "str | Path", also: Sequence[re.Pattern] = ()) -> Iterator[Path]:
    """A temporary folder whose files take the place of the model in ``folder`` when the block is done.

    Of the model that was there the files go that have no successor and that ``from_pretrained`` would read with the
    new ones: other shards, an adapter. All other files stay, and so they do where no whole model is written: the base
    of an adapter may lie beside it.

    Args:
        folder: where to; made if missing.
        also: names that belong together; where one of them is written, those of the model that was there go.
    """
    folder = Path(folder)
    with appearing_at_once(folder) as temporary:
        yield temporary
        written = _names(temporary)
    if any(map(_WEIGHTS.fullmatch, written)):
        gone = [_READ, *(names for names in also if any(map(names.fullmatch, written)))]
        for name in _names(folder) - written:
            if any(names.fullmatch(name) for names in gone):
                (folder / name).unlink()


def _names(folder: Path) -> set[str]:
    """The files of a folder, and of that in which tokenizers keep further chat templates."""
    found = (*folder.glob("*"), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*"))
    return {path.relative_to(folder).as_posix() for path in found if path.is_file()}


def save_pruned(
    model: nn.Module,
    mask: HeadMask,
    folder: "str | Path",
    *,
    processing_class: Any = None,
    pruners: Sequence[Pruner] = (),
    method: Optional[str] = None,
    options: Optional[Mapping[str, Any]] = None,
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
    history: Optional[list] = None,
    form: Callable[[], ContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Write the pruned model: a folder that plain ``from_pretrained`` loads, with the outputs of the gated model.

    Beside the model and its tokenizer lie ``masks.safetensors``, ``pruning.json``, ``head_mask.png`` and a model card.
    Every file appears whole or not at all, and the weights of another model in the folder go. Of a PEFT model the
    adapter is saved, and no weight is zeroed: it loads with :func:`hf_plugin.load_pruned_peft`.

    Args:
        model: the model, gated or not; it is left as it is.
        mask: the heads that stay.
        folder: where to; made if missing.
        processing_class: tokenizer or processor to save along.
        pruners: the methods that made the mask, for the report.
        method: their name, if ``pruners`` is not given.
        options: their options, if ``pruners`` is not given.
        scores: metrics for the model card.
        dataset: what the scores were measured on.
        history: one entry per scored state.
        form: inside its block the model is in the form to be stored in, such as an integer one.

    Raises:
        HeadPruningError: the model has no ``save_pretrained``.
    """
    if not hasattr(model, "save_pretrained"):
        raise HeadPruningError(
            f"{type(model).__name__} has no save_pretrained; save its state dict and the mask (mask.save), or pass "
            "the model of transformers that it holds."
        )
    adapter, saved = is_adapted(model), cast(Any, model)
    method = method or "+".join(pruner.name for pruner in pruners) or "mask"
    options = dict(options or options_of(pruners))
    inexact = "" if adapter else cannot_zero(model, mask)
    if inexact:  # a training must not end for it: with the mask, the folder can be exported compact
        logger.warning("loaded without its mask, %s gives something else: %s", folder, inexact)
    with replacing_model(folder) as temporary:
        with quiet_saving(model), contextlib.nullcontext() if adapter else zeroed_heads(model, mask):
            with form():
                saved.save_pretrained(temporary)
                sizes = None if adapter else (_size(model), _nonzero(model))
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        _describe(temporary, model, mask, sizes, None, method, options, history, scores, dataset)


def describe_pruned(
    model: nn.Module,
    mask: HeadMask,
    folder: "str | Path",
    *,
    method: str,
    options: Optional[Mapping[str, Any]] = None,
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
    history: Optional[list] = None,
) -> None:
    """Write anew what :func:`save_pruned` wrote beside the model, such as when its scores are known."""
    adapter = is_adapted(model)
    with contextlib.nullcontext() if adapter else zeroed_heads(model, mask):
        sizes = None if adapter else (_size(model), _nonzero(model))
    with appearing_at_once(folder) as temporary:
        _describe(temporary, model, mask, sizes, None, method, options or {}, history, scores, dataset)


def save_compact(
    model: transformers.PreTrainedModel,
    folder: "str | Path",
    *,
    processing_class: Any = None,
    method: str = "mask",
    options: Optional[Mapping[str, Any]] = None,
    scores: Optional[Mapping[str, float]] = None,
    dataset: Optional[str] = None,
    history: Optional[list] = None,
) -> None:
    """Write a model whose heads are removed: a folder that ``AutoModel*.from_pretrained`` loads.

    It loads after ``import hf_plugin``, or with ``trust_remote_code=True`` where this package is not installed. The
    model's own ``save_pretrained`` writes as much of it as is needed to load; here its tokenizer, ``pruning.json``,
    ``masks.safetensors`` and ``head_mask.png``, which tell the heads of the original that each site still has, and a
    model card come on top. Every file appears whole or not at all, and the weights of another model in the folder go.

    Args:
        model: what :func:`head_pruning.surgery.remove_heads` made, or ``from_pretrained`` loaded.
        folder: where to; made if missing.
        processing_class: tokenizer or processor to save along.
        method: name of the method that chose the heads, for the report.
        options: its options.
        scores: metrics for the model card.
        dataset: what the scores were measured on.
        history: one entry per scored state.

    Raises:
        HeadPruningError: the model has all of its heads, or is not of transformers.
    """
    mask = heads_left(model)
    if mask is None or not isinstance(model, transformers.PreTrainedModel):
        raise HeadPruningError(
            "No heads were cut out of the model; remove them with head_pruning.surgery.remove_heads first (of a "
            "model wrapped by PEFT, after merging), or write it with save_pruned."
        )
    mark_compact(model)
    with replacing_model(folder) as temporary:
        model.save_pretrained(temporary)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        sizes = (_size(dense_twin(model)), _nonzero(model))
        _describe(temporary, model, mask, sizes, _size(model), method, options or {}, history, scores, dataset)


def _describe(
    folder: Path,
    model: nn.Module,
    mask: HeadMask,
    sizes: Optional[tuple[int, int]],
    compact: Optional[int],
    method: str,
    options: Mapping[str, Any],
    history: Optional[list],
    scores: Optional[Mapping[str, float]],
    dataset: Optional[str],
) -> None:
    """Everything beside the model: report, masks, picture and card."""
    write_artifacts(
        folder,
        mask,
        method=method,
        options=options,
        history=history,
        versions={"transformers": transformers.__version__},
        parameters=sizes,
        compact_parameters=compact,
    )
    plot_head_masks({method: mask}, folder / PICTURE)
    card = model_card(
        model,
        mask,
        method=method,
        options=options,
        scores=scores,
        dataset=dataset,
        parameters=None if compact is None or sizes is None else (sizes[0], compact),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _nonzero(model: nn.Module) -> int:
    return int(torch.stack([torch.count_nonzero(entries(parameter)) for parameter in model.parameters()]).sum())
