"""kill -9 at random moments of a run in each host, resumed: is the end bit-equal to that of a run nobody killed?

    python -m tests.lanes.kill --host transformers --host fairseq --kills 50

Every run prunes heads (DSP) and weights (PLATON) and is a child forked from a process that has imported its host. A
third of the moments is drawn over the time of the run, a third over its updates, a third over the changes in its
output folder while checkpoints are written. A call goes on where one before it was ended: its work folder has what was
done.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

from tests.forked import Child
from tests.lanes.moments import count, moments, watch

RESULTS = Path(__file__).parent / "results"
SEED = 14
LIMIT = 600.0  # seconds that a run may take
TRIES = 5  # a run may end before it is killed where the machine is busy


class Host:
    """A short run in one host."""

    name: str

    def prepare(self, place: Path) -> None:
        """Write what the runs read, and import what they need."""
        raise NotImplementedError

    def run(self, place: Path, folder: Path) -> None:
        """Run the whole command, which resumes what it finds; its output goes to ``folder``/out."""
        raise NotImplementedError

    def content(self, folder: Path) -> dict[str, Any]:
        """By name what a run left, without times."""
        raise NotImplementedError


# How long something took; and what a Trainer tells of the updates since it was resumed, not of the run.
_TIMES = ("runtime", "per_second")
_OF_THE_CALL = ("train_loss", "num_train_epochs")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        left = (key for key in value if not key.endswith(_TIMES) and key not in _OF_THE_CALL)
        return {key: _timeless(value[key]) for key in left}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _content(path: Path) -> Any:
    """What a file says, without times."""
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".md":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if not any(f"{name} |" in line for name in _TIMES)]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files of a run, but for the temporary ones that a kill left behind."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not _temporary(p.relative_to(folder)))


def _temporary(path: Path) -> bool:
    return any(part.startswith(".") or part.endswith(".tmp") for part in path.parts)


def leftovers(folder: Path) -> list[str]:
    """The temporary files and folders of the killed run that are there, without what is random in their names."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    tops = {next(p for p in (*list(each.parents)[::-1], each) if _temporary(p)) for each in found if _temporary(each)}
    return sorted({re.sub(r"(?<=[.-])[a-z0-9_]{8}(?=\.|$)", "*", str(top)) for top in tops})


class Transformers(Host):
    """hf_plugin.run_dsp on a tiny BERT."""

    name = "transformers"
    LINE = """--pruner_name PLATON --final_threshold 0.2 --warmup_steps 2 --initial_warmup 1 --final_warmup 2
        --deltaT 3 --beta2 0.9 --annealing --cooldown_steps 10 --initial_temperature 1 --final_temperature 1e-4
        --max_steps 16 --save_steps 4 --save_total_limit 2 --logging_steps 2 --output_dir out""".split()

    def prepare(self, place):
        import torch._dynamo  # noqa: F401  (what a first optimizer imports)

        import hf_plugin.glue.run  # noqa: F401
        from tests.hf.script_runs import write_place

        if not (place / "data").exists():
            write_place(place)

    def run(self, place, folder):
        import sys

        from hf_plugin.run_dsp import main
        from tests.hf.manual_lines import JOINT_DSP
        from tests.hf.script_runs import TINY

        for name in ("data", "bert-base-uncased"):
            if not (folder / name).exists():
                (folder / name).symlink_to(place / name)
        os.chdir(folder)
        line = [word for word in JOINT_DSP if word != "--do_eval"]
        sys.argv = ["run_dsp", *line, *TINY, *self.LINE]
        main()

    def content(self, folder):
        return {str(path.relative_to(folder / "out")): _content(path) for path in _files(folder / "out")}


class Fairseq(Host):
    """fairseq-train on a tiny transformer."""

    name = "fairseq"
    LINE = """--weight-pruner platon --initial-threshold 1 --final-threshold 0.2 --warmup-steps 2 --initial-warmup 1
        --final-warmup 2 --beta1 0.85 --beta2 0.95 --deltaT 3 --cooldown-steps 8 --save-interval-updates 4
        --keep-interval-updates 1 --validate-interval-updates 8"""

    def prepare(self, place):
        import fairseq.trainer  # noqa: F401
        import hydra.experimental  # noqa: F401
        import torch._dynamo  # noqa: F401

        from tests.fairseq.conftest import write_corpus

        if not (place / "data-bin").exists():
            write_corpus(place)

    def run(self, place, folder):
        import logging
        import sys

        from tests.fairseq.command_lines import DSP, Translation

        logging.getLogger().handlers.clear()  # importing fairseq has set one; the command sets its own
        line = Translation(place / "data-bin").train("out", DSP, self.LINE, updates=10)
        line.remove("--disable-validation")
        os.chdir(folder)
        sys.argv = ["fairseq-train", *(str(word) for word in line)]
        from fairseq_cli.train import cli_main

        cli_main()

    def content(self, folder):
        from tests.fairseq.files import read

        found: dict[str, Any] = {}
        for path in _files(folder / "out"):
            name = str(path.relative_to(folder / "out"))
            if path.suffix == ".pt":
                state = read(path)
                extra = state["extra_state"]
                found[name] = {
                    "model": state["model"],
                    "optimizer": state.get("last_optimizer_state"),
                    "history": state["optimizer_history"][-1],
                    "iterator": extra["train_iterator"],
                    "weights": extra["head_pruning"],
                    "best": extra.get("best"),
                    "loss": extra["val_loss"],
                }
            else:
                found[name] = _content(path)
        return found


HOSTS: dict[str, type[Host]] = {"transformers": Transformers, "fairseq": Fairseq}


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two nests of dicts, lists, tensors and values differ, bit for bit."""
    import torch

    if isinstance(first, dict) and isinstance(second, dict):
        found = [f"{where}/{key}" for key in sorted(first.keys() ^ second.keys(), key=str)]
        return found + [
            each for key in first if key in second for each in differences(first[key], second[key], f"{where}/{key}")
        ]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [each for i, pair in enumerate(zip(first, second)) for each in differences(*pair, f"{where}/{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    return [] if first == second else [where]


class Trial:
    """One run of a host in a folder of its own."""

    def __init__(self, host: Host, place: Path, folder: Path) -> None:
        self.host, self.place, self.folder = host, place, folder
        self.log = folder / "moments"

    def begin(self) -> None:
        """Make the folder anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def start(self, last: Optional[int] = None) -> Child:
        """Start the run, or resume it; it kills itself at moment ``last``."""

        def work() -> None:
            watch(self.log, self.folder / "out", last)
            self.host.run(self.place, self.folder)

        return Child(work, self.folder / f"output-{len(list(self.folder.glob('output-*')))}")

    def finish(self) -> float:
        """Run to the end; returns the seconds."""
        began = time.monotonic()
        code = self.start().wait()
        if code != 0:
            last = max(self.folder.glob("output-*")).read_text(encoding="utf-8")
            raise RuntimeError(f"the run in {self.folder} ended with {code}:\n{last[-3000:]}")
        return time.monotonic() - began

    def kill_at(self, moment: int, delay: Optional[float]) -> bool:
        """Kill the run ``delay`` seconds after its moment number ``moment`` (None: at once); False if it had ended."""
        if delay is None:
            return self.start(moment).wait() < 0
        child, deadline = self.start(), time.monotonic() + LIMIT
        while count(self.log) <= moment and not child.ended() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(delay)
        child.kill()
        return child.wait() < 0


DRAWN = ("any time", "an update", "a checkpoint is written")


def plan(number: int, whole: list[tuple[float, str]]) -> tuple[int, Optional[float]]:
    """Moment and delay of one kill; what is written must meet it at once."""
    draw, drawn = random.Random(f"{SEED} {number}"), DRAWN[number % len(DRAWN)]
    gaps = [then[0] - now[0] for now, then in zip(whole, whole[1:])]
    updates = [i for i, (_, what) in enumerate(whole[:-1]) if what.startswith("update")]
    if drawn == "any time":
        moment = draw.choices(range(len(gaps)), weights=gaps)[0]
    elif drawn == "an update":
        moment = draw.choice(updates)
    else:
        return draw.choice([i for i in range(len(gaps)) if "checkpoint" in whole[i][1] and i not in updates]), None
    return moment, draw.random() * gaps[moment]


def kill_once(host: Host, place: Path, number: int) -> dict[str, Any]:
    """One row of the results."""
    whole = Trial(host, place, place / "whole")
    trial = Trial(host, place, place / f"kill-{number:03d}")
    times = moments(whole.log)
    moment, delay = plan(number, times)
    for again in range(TRIES):
        trial.begin()
        if trial.kill_at(moment, delay and delay / 2**again):
            break
    else:
        raise RuntimeError(f"{host.name} {number}: ended {TRIES} times before it was killed")
    happened = moments(trial.log)
    row: dict[str, Any] = {
        "number": number,
        "drawn": DRAWN[number % len(DRAWN)],
        "updates": sum(what.startswith("update") for _, what in happened),
        "after": happened[-1][1],
    }
    try:
        trial.finish()
    except RuntimeError as error:
        return {**row, "equal": False, "differs": [str(error)[-500:]]}
    mine, theirs = host.content(trial.folder), host.content(whole.folder)
    more = {name.partition("/")[0] for name in mine.keys() - theirs.keys()}  # a checkpoint that was to be removed
    found = differences(theirs, {name: value for name, value in mine.items() if name in theirs})
    resumed = moments(trial.log)[len(happened) :]
    row["resumed at"] = next((int(what.split()[1]) for _, what in resumed if what.startswith("update")), None)
    row |= {"equal": not found, "differs": found[:20], "leftovers": [*leftovers(trial.folder / "out"), *sorted(more)]}
    if not found:
        shutil.rmtree(trial.folder)
    return row


def table(rows: dict[str, list[dict]]) -> str:
    """The results as a page."""
    lines = ["# kill -9 at random moments", "", "`make test-kill` wrote this table.", ""]
    for host, found in rows.items():
        equal = sum(row["equal"] for row in found)
        lines += [f"## {host}: {equal} of {len(found)} ended bit-equal", ""]
        lines += [
            "| kill | drawn over | last thing before it | updates begun | resumed at | bit-equal | left behind |"
        ]
        lines += ["| ---: | --- | --- | ---: | ---: | --- | --- |"]
        for row in sorted(found, key=lambda row: row["number"]):
            verdict = "yes" if row["equal"] else "no: " + ", ".join(row["differs"])[:300].replace("\n", " ")
            resumed = "end" if row["resumed at"] is None else row["resumed at"]
            left = ", ".join(row.get("leftovers", [])) or "nothing"
            cells = (row["number"], row["drawn"], row["after"], row["updates"], resumed, verdict, left)
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def serve(name: str, work: Path, kills: int) -> None:
    """All kills of one host that were not done yet."""
    file = work / f"{name}.jsonl"
    done = {row["number"] for row in _read(file)}
    if set(range(kills)) <= done:
        return
    host, place = HOSTS[name](), work / name
    place.mkdir(parents=True, exist_ok=True)
    host.prepare(place)
    whole = Trial(host, place, place / "whole")
    if not (whole.folder / "ended").exists():
        whole.begin()
        print(f"{name}: a whole run took {whole.finish():.1f} s", flush=True)
        (whole.folder / "ended").touch()
    for number in range(kills):
        if number not in done:
            row = kill_once(host, place, number)
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(name, json.dumps(row), flush=True)


def main(line: Optional[list[str]] = None) -> int:
    """Command line; returns how many runs did not end bit-equal."""
    parser = argparse.ArgumentParser(description="kill -9 at random moments, resumed")
    parser.add_argument("--host", action="append", choices=list(HOSTS), help="default: both")
    parser.add_argument("--kills", type=int, default=50, help="per host")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "head-pruning-kill", help="folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    options = parser.parse_args(line)
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.host or HOSTS:
        # A process of its own, so that one host's imports do not disturb the other's.
        log = options.work / f"{name}.log"
        if Child(lambda name=name: serve(name, options.work, options.kills), log).wait() != 0:
            raise SystemExit(f"{name} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    rows = {name: _read(options.work / f"{name}.jsonl") for name in HOSTS}
    (options.results / "kill.md").write_text(table(rows), encoding="utf-8")
    return sum(not row["equal"] for found in rows.values() for row in found)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
