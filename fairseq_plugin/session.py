"""Opening a pruning session on a fairseq model."""

from typing import Sequence

from torch import nn

from head_pruning import HeadPruningError, Pruner, PruningSession
from head_pruning.outputs import ATTENTIONS
from head_pruning.session import LAYERDROP_UPDATES

from .modules.attention import UnfusedAttention, give_probabilities, probabilities
from .modules.unit_map import unit_map


def open_session(model: nn.Module, pruners: Sequence[Pruner], **options) -> PruningSession:
    """Map a fairseq model, put gates on it and make every attention module run them (for pruners of heads).

    Where a pruner looks at attention probabilities, every attention module gives them in training.

    Args:
        model: any fairseq model built on MultiheadAttention.
        pruners: see :class:`~head_pruning.PruningSession`.
        **options: further arguments of the session.

    Returns:
        The attached session; its ``detach()`` leaves the model as it was.

    Raises:
        HeadPruningError: the model cannot be mapped, a method does not fit it, or quantizes.
    """
    quantizer = next((pruner.name for pruner in pruners if pruner.kind == "quantizes"), None)
    if quantizer is not None:
        raise HeadPruningError(
            f"The quantizer {quantizer} is not for fairseq, whose attention computes with the weights of its linear "
            "layers and does not call them; drop it, or train a model of transformers with it (hf_plugin)."
        )
    options.setdefault("fired_within", LAYERDROP_UPDATES if _drops_layers(model) else 1)
    options = {"time_first": True, "sums_losses": True, "read_attention": probabilities, **options}
    session = PruningSession(model, unit_map(model), pruners, **options).attach()
    watched = ATTENTIONS in session.needs
    if session.gated or watched:
        unfused = UnfusedAttention(model)
        unfused.attach()
        session.on_detach(unfused.detach)
    if watched:
        session.on_detach(give_probabilities(model))
    return session


def _drops_layers(model: nn.Module) -> bool:
    names = ("encoder_layerdrop", "decoder_layerdrop", "layerdrop")  # wherever an architecture keeps it
    return any(getattr(module, name, 0) for module in model.modules() for name in names)
