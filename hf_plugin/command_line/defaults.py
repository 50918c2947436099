"""The methods' options with the defaults of the published BERT scripts."""

from types import SimpleNamespace
from typing import Any, Mapping

from head_pruning import HeadPruningError, Pruner, build_pruner, methods
from head_pruning.registry import Method, get_method, option_fields

# Where the published BERT scripts differ from the core's (the fairseq scripts') defaults; of pruners of heads.
COMMON = {
    "pruning_lr": 0.5,
    "initial_temperature": 1000.0,
    "cooldown_steps": 25000,
    "gate_adam_beta2": 0.999,
}
BY_METHOD: dict[str, dict[str, Any]] = {"voita": {"pruning_lr": 0.1}}


def find_method(name: str) -> Method:
    """The method of heads or of weights that is called ``name``. Raises HeadPruningError when there is none."""
    return get_method(name, {**methods(), **methods("weights")})


def default_options(name: str) -> dict[str, Any]:
    """All options of the method ``name`` with the defaults of the BERT scripts."""
    method = find_method(name)
    known = {option: field.default for option, field in option_fields([name], method.prunes).items()}
    ours = {**COMMON, **BY_METHOD.get(method.name, {})} if method.prunes == "heads" else {}
    return {option: ours.get(option, default) for option, default in known.items()}


def complete_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the method ``name``: those in ``options``, and the BERT scripts' defaults for the others.

    Raises:
        HeadPruningError: no such method, it has no such option, or options contradict each other.
    """
    values = default_options(name)
    foreign = sorted(set(options) - set(values))
    if foreign:
        raise HeadPruningError(f"The pruner {name} has no option {foreign[0]}; it has {', '.join(sorted(values))}.")
    values.update(options)
    if "l0_pipelined" in values:  # on BERT the L0 gates too are joint only when asked
        if options.get("l0_pipelined") and options.get("joint_pruning"):
            raise HeadPruningError("joint_pruning and l0_pipelined contradict each other; give one of them.")
        values["l0_pipelined"] = options.get("l0_pipelined", not values["joint_pruning"])
    return values


def pruner(name: str, **options: Any) -> Pruner:
    """Build the pruner ``name`` with the defaults of the BERT scripts.

    Args:
        name: a registered method, of heads (``dsp``, ``ste``, ``voita``, ``random``, ...) or of weights (``platon``,
            ``magnitude``, ``movement``, ``lock``, ...).
        **options: its options; ``head-pruning pruners`` lists them.

    Raises:
        HeadPruningError: no such method, it has no such option, or options contradict each other.
    """
    return build_pruner(find_method(name), SimpleNamespace(**complete_options(name, options)))
