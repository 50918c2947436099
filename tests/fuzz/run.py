"""``make test-fuzz``: so many damaged inputs of every kind, and a table of what became of them.

python -m tests.fuzz.run [--count 1000] [--seed 1] [--write docs/fuzzing.md] [--only KIND]
"""

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path

from head_pruning.report.tables import text_table

from .watch import Outcome, bounded_memory, try_input

ROOT = Path(__file__).resolve().parents[2]


def targets() -> dict:
    """All kinds of inputs by name."""
    from .core_targets import CORE
    from .fairseq_targets import FAIRSEQ
    from .hf_targets import HF

    return {**CORE, **HF, **FAIRSEQ}


def fuzz(kind: str, target, count: int, seed: int) -> Outcome:
    """Read ``count`` damaged inputs of one kind, the same ones for the same seed."""
    outcome, rng = Outcome(kind), random.Random(f"{seed} {kind}")
    with tempfile.TemporaryDirectory() as folder:
        inputs = target(Path(folder), rng)
        for number in range(count):
            read = next(inputs)
            with bounded_memory():
                try_input(outcome, Path(folder), f"{kind} {number}", read)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """One line for each kind."""
    header = ("kind", "inputs", "refused", "taken", "faults", "most memory, MB", "longest, s", "all, s")
    rows = [
        (o.kind, o.inputs, o.refused, o.inputs - o.refused - len(o.faults), len(o.faults))
        + (f"{o.megabytes:.0f}", f"{o.longest:.1f}", f"{o.seconds:.0f}")
        for o in outcomes
    ]
    return text_table(header, rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    parser.add_argument("--only", help="part of the name of a kind")
    args = parser.parse_args()
    outcomes = []
    for kind, target in targets().items():
        if args.only is None or args.only in kind:
            outcomes.append(fuzz(kind, target, args.count, args.seed))
            print(table(outcomes[-1:]).splitlines()[-1], flush=True)
            print("\n".join(dict.fromkeys(outcomes[-1].faults)), flush=True)
    print(table(outcomes))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        new = f"```text\n{table(outcomes)}\n```"
        args.write.write_text(re.sub(r"```text\n.*?\n```", lambda _: new, text, flags=re.DOTALL), encoding="utf-8")
    sys.exit(1 if any(outcome.faults for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
