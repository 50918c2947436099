"""``head-pruning sweep``: run the cells of a plan, or go on with them; see :mod:`head_pruning.sweep.plan`."""

import argparse
import contextlib
import dataclasses
import re
import signal
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, Mapping, Sequence

from ..errors import HeadPruningError, one_line
from ..files import alone_in, read_json
from ..report.runs import CELL, CELLS_FOLDER
from ..sweep.cell import Job
from ..sweep.launchers import Launcher, open_launcher
from ..sweep.plan import Cell, Cells, Plan, read_plan
from ..sweep.results import RESULTS, state_table, told, write_csv, write_parquet
from ..sweep.runner import run_cells
from ..sweep.search import run_search
from ..yaml_text import parse_yaml

SHOW = "show"


def run(args: argparse.Namespace) -> None:
    """The command."""
    *words, name = args.plan
    if words not in ([], [SHOW]):
        raise HeadPruningError(f"A sweep has one plan; {words[0]} is one too many.")
    _check(args, words)
    plan = read_plan(name, dict(_option(text, "--set") for text in args.set))
    if args.threads:
        plan = dataclasses.replace(plan, threads=args.threads)
    work = Path(args.out or f"{Path(name).stem}-sweep")
    if args.optuna is not None:
        with alone_in(work):
            _search(args, plan, work)
        return
    cells = plan.cells(work)
    every = jobs_of(plan, cells, work, {start for cell in cells for start in cell.after})
    jobs = [job for job in every if not args.only or re.search(args.only, job.cell.name)]
    if not jobs:
        raise HeadPruningError(f"The plan {name} has no cell here; look at its grid, exclude and --only.")
    if args.dry_run:
        shown = (job.cell for job in jobs)
        print("\n".join(f"{cell.name}\n" + "\n".join(f"    {line}" for line in cell.lines) for cell in shown))
    elif words:
        print(state_table(jobs))
    else:
        with alone_in(work):
            _run(args, plan, jobs, every, work)


def _check(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Raise HeadPruningError for flags that cannot be, and for those that a search would not heed."""
    for flag, least in (("jobs", 0), ("threads", 1), ("optuna", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise HeadPruningError(f"--{flag} is {value}; give {least} or more.")
    try:
        re.compile(args.only or "")
    except re.error as error:
        raise HeadPruningError(f"--only is no regular expression ({error}); correct it.") from error
    _launcher_options(args)
    idle = [flag for flag in ("dry_run", "only", "parquet") if getattr(args, flag)] + list(words)
    if args.optuna is not None and idle:
        raise HeadPruningError(
            f"{'' if idle[0] == SHOW else '--'}{idle[0].replace('_', '-')} is about the cells of a grid, which "
            "--optuna has not; drop one of them."
        )


def jobs_of(plan: Plan, cells: Sequence[Cell], work: Path, started_from: Collection[str] = ()) -> list[Job]:
    """What runs each cell; models of cells in ``started_from`` stay."""
    return [
        Job(
            cell=cell,
            work=work.absolute(),
            here=Path.cwd(),
            scores=plan.scores,
            score_pattern=plan.score_pattern,
            measure=plan.measure,
            env=plan.env,
            threads=plan.threads,
            go_on=plan.go_on,
            keep_model=plan.keep_models or cell.name in started_from,
        )
        for cell in cells
    ]


def _run(args: argparse.Namespace, plan: Plan, jobs: Sequence[Job], every: Sequence[Job], work: Path) -> None:
    """Run ``jobs``, and collect what all of ``every`` have measured that the plan, as it is now, measures so."""
    by_name = {job.cell.name: job for job in every}
    done = {job.cell.name: found for job in jobs if (found := job.finished()) is not None}
    left = [job.cell for job in jobs if job.cell.name not in done]
    for name in by_name.keys() - {job.cell.name for job in jobs}:
        with contextlib.suppress(HeadPruningError):  # of a --set that these do not need
            if (found := by_name[name].finished()) is not None:
                done[name] = found
    print(f"{len(jobs) - len(left)} of {len(jobs)} cells are finished", flush=True)

    def write(found: Sequence[dict[str, Any]]) -> None:
        done.update((each["name"], each) for each in found)
        write_csv([done[name] for name in by_name if name in done], work / RESULTS)

    write([])
    try:
        with _launcher(args, plan) as (launch, jobs_at_a_time, stop):
            run_cells(
                left,
                lambda cell: _succeeded(launch(by_name[cell.name])),
                jobs=jobs_at_a_time,
                ready=lambda cell: all((work / CELLS_FOLDER / f"{name}.json").is_file() for name in cell.after),
                tell=told,
                write=write,
                stop=stop,
            )
    finally:
        if args.parquet and done:
            write_parquet([done[name] for name in by_name if name in done], (work / RESULTS).with_suffix(".parquet"))
        print(f"The results are in {work / RESULTS}; head-pruning report {work} draws them.")


def _search(args: argparse.Namespace, plan: Plan, work: Path) -> None:
    starts = list(plan.combinations())
    if len(starts) != 1:
        raise HeadPruningError(
            f"A search needs a grid with one cell, not {len(starts)}; give its axes one value each."
        )

    def job_of(parameters: Mapping[str, Any]) -> Job:
        (job,) = jobs_of(plan, [Cells(plan, work).cell({**starts[0], **parameters})], work)
        return job

    found = [read_json(path, CELL, cure="delete it") for path in sorted((work / CELLS_FOLDER).glob("*.json"))]
    other = next((each["name"] for each in found if not plan.search.keys() <= each["values"].keys()), None)
    if other is not None:
        raise HeadPruningError(f"{work} holds the cell {other}, which is none of this search; choose another --out.")
    jobs = [job_of({name: each["values"][name] for name in plan.search}) for each in found]
    done = [each for job in jobs if (each := job.finished()) is not None]

    def write(each: dict[str, Any]) -> None:
        write_csv([*done, each], work / RESULTS)
        done.append(each)

    with _launcher(args, plan) as (launch, jobs_at_a_time, stop):
        best = run_search(
            plan,
            args.optuna,
            job_of=job_of,
            proposed=work / "proposed",
            finished=done,
            run=launch,
            jobs=jobs_at_a_time,
            tell=lambda line: print(line, flush=True),
            write=write,
            stop=stop,
        )
    print(f"The best of {len(done)}: {best['name']}: {told(best)}")


@contextlib.contextmanager
def _launcher(args: argparse.Namespace, plan: Plan) -> Iterator[tuple[Launcher, int, Callable[[], None]]]:
    """The launcher that the command line asks for; SIGTERM ends the block as Ctrl-C does."""
    options = _launcher_options(args)
    place = {"jobs": args.jobs, "threads": plan.threads, "gpus": plan.gpus, "options": options}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with open_launcher(args.launcher, **place) as found:
            signal.signal(signal.SIGTERM, lambda number, frame: _stop(number))  # Ray has put its own in our place
            yield found
    finally:
        signal.signal(signal.SIGTERM, before)


def _launcher_options(args: argparse.Namespace) -> dict[str, Any]:
    """Their values are YAML. Raises HeadPruningError for those that are none."""
    found = {}
    for text in args.launcher_option:
        name, value = _option(text, "--launcher-option")
        try:
            found[name] = parse_yaml(value)
        except ValueError as error:
            raise HeadPruningError(
                f"--launcher-option {text} has no value of YAML ({one_line(error):.300}); correct it or quote it."
            ) from error
    return found


def _succeeded(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        raise HeadPruningError(found["error"])
    return found


def _stop(number: int) -> None:
    raise SystemExit(128 + number)


def _option(text: str, flag: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise HeadPruningError(f"{flag} {text} has no value; write it as NAME=VALUE.")
    return name, value
