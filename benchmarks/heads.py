"""Which method keeps the better heads: all methods, several seeds, equal updates; the sweep of ``plans/heads.yaml``.

    python -m benchmarks.heads --work DIR [--data GLUE --model MODEL --wide-model WIDE] [--corpus CORPUS] [--jobs 2]

Without more, the task is that of ``make demo``, whose data are made in ``DIR/strings``. GLUE and MODEL, an encoder of
72 heads, add SST-2, CoLA, MRPC and MNLI; WIDE, one of 144, adds SST-2 with 12 of them; CORPUS (that of
``benchmarks.translation``) adds Multi30k from scratch. ``--only`` chooses among the cells of these.
"""

from pathlib import Path

from benchmarks.planned import call, parser, run
from benchmarks.translation import binarised

# The option that a task needs, by the beginning of its cells' names.
TASKS = {
    "ui-strings": "work",
    "sst-2-(?!wide)": "model",
    "cola": "model",
    "mrpc": "model",
    "mnli": "model",
    "sst-2-wide": "wide_model",
    "multi30k": "corpus",
}
PLACES = {"model": "model", "wide_model": "wide", "data": "data"}


def main() -> None:
    """Command line."""
    made = parser(__doc__)
    for flag, words in (
        ("--data", "folder of CoLA/, SST-2/, MRPC/ and MNLI/"),
        ("--model", "encoder of 72 heads"),
        ("--wide-model", "encoder of 144 heads"),
        ("--corpus", "folder of the BPE'd Multi30k"),
    ):
        made.add_argument(flag, metavar="DIR", type=Path, help=words)
    options = made.parse_args()
    if bool(options.model or options.wide_model) != bool(options.data):
        made.error("--data belongs to --model or --wide-model")
    work = options.work.resolve()
    given = {place: getattr(options, name).resolve() for name, place in PLACES.items() if getattr(options, name)}
    given["strings"] = work / "strings"
    if not options.dry_run and not (work / "strings" / "data-bin").exists():
        call("-m", "prepare.demo_data", "--dest", work / "strings")
    if options.corpus:
        binary = work / "data-bin" if options.dry_run else binarised(options.corpus.resolve(), work)
        given["binary"] = binary
    possible = "|".join(task for task, needed in TASKS.items() if getattr(options, needed))
    options.only = f"^(?=.*(?:{options.only or ''}))(?:{possible})"
    run("heads", given, options)


if __name__ == "__main__":
    main()
