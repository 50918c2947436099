"""Learning-rate schedules that begin anew within a run."""

from typing import Any, Optional

from fairseq.optim import lr_scheduler
from omegaconf import OmegaConf

# What fairseq's schedules call the update at which they end.
_ENDS = ("total_num_update", "max_update")


def restart_schedule(trainer: Any, begin: int, end: Optional[int]) -> None:
    """Have the learning-rate schedule of fairseq's trainer count updates from ``begin`` and end at ``end``.

    Args:
        trainer: which has just built it.
        begin: the update that is its first one, warm-up included.
        end: None: where its own options say.
    """
    if not begin and end is None:
        return
    settings: Any = OmegaConf.to_container(trainer.cfg, resolve=True)
    options: Any = OmegaConf.create(settings["lr_scheduler"])
    for name in _ENDS:
        own = options.get(name)
        if own:
            options[name] = max(1, (own if end is None else min(own, end)) - begin)
    schedule = trainer._lr_scheduler = lr_scheduler.build_lr_scheduler(options, trainer.optimizer)
    step_update = schedule.step_update
    schedule.step_update = lambda num_updates: step_update(max(0, num_updates - begin))
    schedule.step_update(trainer.get_num_updates())


def linear_warmup(cfg: Any) -> Optional[int]:
    """Updates in which the learning rate rises, where it falls linearly to 0 by the end of training; else None.

    Args:
        cfg: the trainer's configuration.
    """
    schedule = cfg.lr_scheduler
    linear = getattr(schedule, "_name", None) == "polynomial_decay" and schedule.power == 1
    if not linear or schedule.end_learning_rate or schedule.total_num_update != cfg.optimization.max_update:
        return None
    return int(schedule.warmup_updates)
