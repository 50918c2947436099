"""The methods' options with the defaults of the published BERT scripts."""

from types import SimpleNamespace
from typing import Any, Mapping

from head_pruning import HeadPruningError, Pruner, build_pruner
from head_pruning.registry import get_method

from .mistakes import as_arguments


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the method ``name``: those in ``options``, and the BERT scripts' defaults for the others.

    Raises:
        HeadPruningError: no such method, it has no such option, or options contradict each other.
    """
    method = get_method(name)
    foreign = sorted(set(options) - set(method.options))
    if foreign:
        raise HeadPruningError(
            f"The pruner {name} has no option {foreign[0]}; it has {', '.join(sorted(method.options))}."
        )
    ours = method.pruner.bert_options(options)
    return {option: ours.get(option, field.default) for option, field in method.options.items()}


def pruner(name: str, **options: Any) -> Pruner:
    """Build the pruner ``name`` with the defaults of the BERT scripts.

    Args:
        name: a registered method of any kind, of heads (``dsp``, ``ste``, ``voita``, ``random``, ...) or of weights
            (``platon``, ``magnitude``, ``movement``, ``lock``, ...).
        **options: its options; ``head-pruning pruners`` lists them.

    Raises:
        HeadPruningError: no such method, it has no such option, or options contradict each other.
    """
    try:
        return build_pruner(get_method(name), SimpleNamespace(**complete_options(name, options)))
    except HeadPruningError as error:
        raise HeadPruningError(as_arguments(str(error))) from error
