"""The trained model that ``run_michel`` starts from, and its data."""

import contextlib
from pathlib import Path
from typing import Iterator

from fairseq import checkpoint_utils, tasks
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, BaseFairseqModel, FairseqEncoderDecoderModel
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig

from head_pruning import HeadPruningError
from head_pruning.errors import one_line

from ..checkpoints.keeper import keeper_of
from ..checkpoints.weights import mask_weights


@contextlib.contextmanager
def data_found(folder: str) -> Iterator[None]:
    """One sentence when fairseq finds no dictionary or no split in a data folder, whatever it raises then."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        raise HeadPruningError(f"{folder} lacks data of this model ({reason:.300}); name its data folder.") from error


def load_translator(path: str, data: str) -> tuple[BaseFairseqModel, DictConfig, FairseqTask]:
    """The model of a checkpoint, the configuration that it was trained with, and its task on ``data``.

    Raises:
        HeadPruningError: the checkpoint is missing, damaged, pruned or no translation model's, or its dictionaries are
            not those in ``data``.
    """
    if not Path(path).is_file():
        raise HeadPruningError(f"There is no checkpoint {path}; give a trained model with --restore-file.")
    overrides = {"data": data}
    state = checkpoint_utils.load_checkpoint_to_cpu(path, overrides)
    mask_weights(state)
    if state.get("cfg") is None:
        raise HeadPruningError(f"{path} is no fairseq checkpoint: it has no configuration in it; write it again.")
    _refuse_other_models(path, state["cfg"])
    with data_found(data):
        task = tasks.setup_task(state["cfg"].task, from_checkpoint=True)
    try:
        models, saved, task = checkpoint_utils.load_model_ensemble_and_task([path], overrides, task, state=state)
    except RuntimeError as error:
        reason = one_line(error)
        raise HeadPruningError(
            f"The weights in {path} do not fit the dictionaries in {data} ({reason:.300}); name the data folder "
            "that it was trained on."
        ) from error
    if keeper_of(models[0]) is not None:
        raise HeadPruningError(f"{path} is already pruned; start from a dense checkpoint.")
    return models[0], saved, task


def _refuse_other_models(path: str, cfg: DictConfig) -> None:
    """Raise HeadPruningError when a known model does not translate; ones that a user added are let through."""
    name = getattr(cfg.model, "_name", None) or getattr(cfg.model, "arch", None)
    model = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if model is not None and not issubclass(model, FairseqEncoderDecoderModel):
        raise HeadPruningError(
            f"{path} is a {name}, which does not translate, and rounds are scored by translations; give a translation "
            "model with --restore-file."
        )
