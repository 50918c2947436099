"""A search in place of a grid: Optuna proposes the values of the next cell from what the others measured."""

from __future__ import annotations

import concurrent.futures
import math
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from ..compact.shapes import Number
from ..errors import HeadPruningError
from ..files import read_json, write_json
from ..report.runs import lower_is_better
from .cell import Job
from .plan import Plan

# So many proposals in a row that were measured before say that there are no others.
_REPEATS = 100


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
    proposed: Path,
    finished: Sequence[Mapping[str, Any]],
    run: Callable[[Job], dict[str, Any]],
    jobs: int,
    tell: Callable[[str], Any],
    write: Callable[[dict[str, Any]], Any],
    stop: Callable[[], None],
) -> dict[str, Any]:
    """Run cells until ``trials`` of them have been measured, those of earlier calls among them; the best of all.

    No cell is measured twice. What was running when an earlier call was killed is proposed again, first of all.

    Args:
        plan: with ``search``.
        trials: finished cells.
        job_of: parameters to their cell.
        proposed: folder that holds the parameters of the cells that are running.
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
    # Another seed for each call: the same would propose what was measured.
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=len(finished), constant_liar=True))
    done = [dict(each) for each in finished]
    for each in finished:  # what is finished is known from its file: there is no other memory of a search
        parameters = {name: each["values"][name] for name in spaces}
        value = loss_of(plan, each)
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=spaces, value=value))
    known = {each["name"] for each in finished}
    for path in sorted(proposed.glob("*.json")):
        parameters = read_json(path, {name: Number() for name in spaces}, cure="delete it")
        inside = all(space["low"] <= parameters[name] <= space["high"] for name, space in plan.search.items())
        if inside and path.stem not in known:
            study.enqueue_trial(parameters)
        else:
            path.unlink()

    def propose() -> Any:
        """A trial and the cell of its parameters, which is another than those before; None: there is no other."""
        for _ in range(_REPEATS):
            trial = study.ask(spaces)
            job = job_of(trial.params)
            if job.cell.name not in known:
                known.add(job.cell.name)
                write_json(proposed / f"{job.cell.name}.json", trial.params)
                return trial, job
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    failed, more = 0, True
    running: dict[concurrent.futures.Future, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            while len(done) < trials and failed < trials:
                while more and len(running) < min(jobs, trials - len(done)):
                    found = propose()
                    more = found is not None
                    if more:
                        running[pool.submit(run, found[1])] = found
                if not running:
                    break
                ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    (trial, job), found = running.pop(future), future.result()
                    (proposed / f"{job.cell.name}.json").unlink(missing_ok=True)
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
    if done and not more:
        tell(f"only {len(done)} of {trials}: nothing else is proposed that was not measured before")
    elif len(done) < trials:
        raise HeadPruningError(f"{failed} cells failed, so the search was given up; see above for the cause.")
    return min(done, key=lambda each: loss_of(plan, each))
