"""Recipes: the flags of published results by name, such as ``--preset platon/mnli``."""

from typing import Any

from head_pruning import HeadPruningError
from head_pruning.registry import get_method, option_fields

from .fields import SHARED

_PLATON = {"pruner_name": "platon", "initial_threshold": 1.0, "beta1": 0.85, "deltaT": 10}
_ADAMAX = {"optimizer": "adamax", "adam_epsilon": 1e-6}
_GLUE = {
    **_PLATON,
    **_ADAMAX,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "optimizer_warmup_steps": 0.1,
}
# Under this name stands a configuration that Prune Once for All ships, for the flags that it means.
_CONFIG = "pruning_config"

# What Prune Once for All's student learns beside what is pruned; its teacher is the user's.
_STUDENT = {
    "distill": "logits",
    "distill_task": 0.5,
    "distill_logits": 0.5,
    "distill_temperature": 2.0,
    "lr_rewind": True,
    "max_steps": 100000,
    "per_device_train_batch_size": 256,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "optimizer_warmup_steps": 0.01,
    "weight_decay": 0.01,
}


def _glue(
    density: float,
    beta2: float,
    *,
    steps: int,
    final: int,
    batch: int,
    rate: float,
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    return {
        **_GLUE,
        "final_threshold": density,
        "beta2": beta2,
        "warmup_steps": steps,
        "initial_warmup": 1,
        "final_warmup": final,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "seed": seed,
    }


_MNLI: dict[str, Any] = {"steps": 5400, "final": 5, "batch": 32, "rate": 8e-5, "epochs": 8, "seed": 7}
_RTE: dict[str, Any] = {"steps": 200, "final": 6, "batch": 16, "rate": 1e-4, "epochs": 20, "seed": 8}

#: Names of flags to values, by recipe. The number in a name of PLATON's is the percentage of weights that stay.
PRESETS: dict[str, dict[str, Any]] = {
    "platon/cola": _glue(0.10, 0.95, steps=500, final=3, batch=32, rate=1e-4, epochs=15, seed=9),
    "platon/mnli": _glue(0.10, 0.85, **_MNLI),
    "platon/mnli-15": _glue(0.15, 0.90, **_MNLI),
    "platon/mnli-20": _glue(0.20, 0.95, **_MNLI),
    "platon/mrpc": _glue(0.10, 0.95, steps=300, final=3, batch=8, rate=1e-4, epochs=10, seed=9),
    "platon/qnli": _glue(0.10, 0.90, steps=2000, final=6, batch=32, rate=1e-4, epochs=10, seed=9),
    "platon/qqp-20": _glue(0.20, 0.85, steps=5400, final=5, batch=32, rate=1e-4, epochs=10, seed=9),
    "platon/rte": _glue(0.10, 0.95, **_RTE),
    "platon/rte-15": _glue(0.15, 0.65, **_RTE),
    "platon/rte-20": _glue(0.20, 0.95, **_RTE),
    "platon/squad": {
        **_PLATON,
        "final_threshold": 0.10,
        "beta2": 0.95,
        "warmup_steps": 5400,
        "initial_warmup": 1,
        "final_warmup": 5,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-5,
        "num_train_epochs": 10,
        "seed": 9,
    },
    "platon/sst-2": _glue(0.10, 0.85, steps=1000, final=5, batch=32, rate=8e-5, epochs=6, seed=8),
    "platon/sts-b": _glue(0.10, 0.85, steps=500, final=5, batch=16, rate=1e-4, epochs=15, seed=9),
    "pruneofa/glue-85": {_CONFIG: "glue_85_config.json"},
    "pruneofa/lock": {_CONFIG: "lock_config.json"},
    "pruneofa/squad-85": {_CONFIG: "squad_85_config.json"},
    "pruneofa/student-85": {**_STUDENT, _CONFIG: "student_pruning_85_config.json"},
    "pruneofa/student-90": {**_STUDENT, _CONFIG: "student_pruning_90_config.json"},
}
# The scripts that a recipe is for, by the beginning of its name, where it is not for all.
_ONLY = {"pruneofa/student": ("run_pretraining", "run_mlm")}


def add_preset(given: dict[str, Any], notes: list[str], script: str) -> None:
    """Take ``preset`` out of the flags that were set and add its recipe; a flag that was set wins.

    With another pruner of the same kind the recipe gives what that one has too: the baselines share PLATON's schedule.

    Raises:
        HeadPruningError: there is no such preset, it is for other scripts, or a configuration says the same.
    """
    name = given.pop("preset", None)
    if not name:
        return
    if name.lower() not in PRESETS:
        raise HeadPruningError(f"There is no preset {name}; choose one of {', '.join(PRESETS)}.")
    scripts = next((only for prefix, only in _ONLY.items() if name.lower().startswith(prefix)), (script,))
    if script not in scripts:
        raise HeadPruningError(f"--preset {name} is a recipe of {scripts[0]}.py; use that, or choose another preset.")
    if given.get(_CONFIG):
        raise HeadPruningError(f"--preset {name} and --pruning_config both say what is pruned; drop one of them.")
    recipe = dict(PRESETS[name.lower()])
    if _CONFIG in recipe:
        from ..training.pruning_config import PUBLISHED, as_flags  # --help needs none of it

        recipe.update(as_flags(PUBLISHED[recipe.pop(_CONFIG)]))
    kind = get_method(recipe["pruner_name"]).kind
    named = [get_method(given[flag]) for flag in ("pruner_name", "pruner") if given.get(flag)]
    own = next((method for method in named if method.kind == kind), None)
    rising = {"warmup_ratio"}  # flags that say how the learning rate rises
    if own is not None:
        del recipe["pruner_name"]
        foreign = set(option_fields(kind=kind)) - set(own.options)
        recipe = {flag: value for flag, value in recipe.items() if flag not in foreign}
        rising |= foreign & set(SHARED)
    elif given.get("pruner_name"):  # of another kind
        recipe["pruner"] = recipe.pop("pruner_name")
    if {"optimizer", "optim"} & set(given):  # of the user's choice, with its own settings
        recipe = {flag: value for flag, value in recipe.items() if flag not in _ADAMAX}
    if rising & set(given):
        recipe.pop("optimizer_warmup_steps", None)
    added = {flag: value for flag, value in recipe.items() if flag not in given}
    given.update(added)
    notes.append(f"--preset {name.lower()} adds " + " ".join(f"--{flag} {value}" for flag, value in added.items()))
