"""A search in place of a grid: Optuna proposes the values of the next cell from what the others measured."""

from __future__ import annotations

import concurrent.futures
import math
from typing import Any, Callable, Mapping, Sequence

from ..errors import HeadPruningError
from ..report.runs import lower_is_better
from .cell import Job
from .plan import Plan


def loss_of(plan: Plan, found: Mapping[str, Any]) -> float:
    """What a search makes small: how far a finished cell's numbers are from the plan's aim, or else its score, turned.

    Raises:
        HeadPruningError: the cell did not measure it.
    """
    numbers = found["numbers"]
    missing = [name for name in (plan.aim or ("score",)) if name not in numbers]
    if missing:
        raise HeadPruningError(f"The cell {found['name']} has no {missing[0]}; add it to measure, or aim elsewhere.")
    if plan.aim:
        return math.fsum(abs(numbers[name] - wanted) for name, wanted in plan.aim.items())
    return numbers["score"] if lower_is_better(found["score_name"]) else -numbers["score"]


def run_search(
    plan: Plan,
    trials: int,
    *,
    job_of: Callable[[Mapping[str, Any]], Job],
    finished: Sequence[Mapping[str, Any]],
    run: Callable[[Job], dict[str, Any]],
    jobs: int,
    tell: Callable[[str], Any],
    write: Callable[[dict[str, Any]], Any],
    stop: Callable[[], None],
) -> dict[str, Any]:
    """Run cells until ``trials`` of them have been measured, those of earlier calls among them; the best of all.

    Args:
        plan: with ``search``.
        trials: finished cells.
        job_of: parameters to their cell.
        finished: what earlier calls measured.
        run: measures a cell; ``error`` in what it returns is a failure.
        jobs: cells at a time.
        tell: is given a line about each cell.
        write: is given what each finished cell measured.
        stop: ends what is running.

    Raises:
        HeadPruningError: Optuna is not installed, the plan has no ``search``, or as many cells as asked for failed.
    """
    try:
        import optuna
    except ImportError as error:
        raise HeadPruningError(f"Optuna cannot be imported ({error}); pip install 'head-pruning[optuna]'.") from error
    if not plan.search:
        raise HeadPruningError("The plan has no search, so nothing can vary; name its parameters and their ranges.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {
        name: (optuna.distributions.IntDistribution if space.get("whole") else optuna.distributions.FloatDistribution)(
            space["low"], space["high"], log=space.get("log", False)
        )
        for name, space in plan.search.items()
    }
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True))
    done = [dict(each) for each in finished]
    for each in finished:  # what is finished is known from its file: there is no other memory of a search
        parameters = {name: each["values"][name] for name in spaces}
        value = loss_of(plan, each)
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=spaces, value=value))
    failed = 0
    running: dict[concurrent.futures.Future, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            while len(done) < trials and failed < trials:
                while len(running) < min(jobs, trials - len(done)):
                    trial = study.ask(spaces)
                    running[pool.submit(run, job_of(trial.params))] = trial
                ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    trial, found = running.pop(future), future.result()
                    if "error" in found:
                        failed += 1
                        study.tell(trial, state=optuna.trial.TrialState.FAIL)
                        tell(f"error: {found['error']}")
                        continue
                    value = loss_of(plan, found)
                    study.tell(trial, value)
                    done.append(found)
                    write(found)
                    tell(f"{len(done)} of {trials}: {found['name']}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
    if len(done) < trials:
        raise HeadPruningError(f"{failed} cells failed, so the search was given up; see above for the cause.")
    return min(done, key=lambda each: loss_of(plan, each))
