"""Translation quality over heads kept: all methods on one corpus; the sweep of ``plans/translation.yaml``.

    python -m benchmarks.translation CORPUS --work DIR [--updates 1000] [--jobs 2]

CORPUS holds BPE'd ``train``, ``valid`` and ``test`` files with the endings ``.de`` and ``.en``; they are binarised
first, in ``DIR/data-bin``. 2000 updates are the setting in which the published code was recorded.
"""

from pathlib import Path

from benchmarks.planned import call, parser, run
from benchmarks.tables import asked

TABLES = {1000: "translation", 2000: "translation-recorded"}


def binarised(corpus: Path, work: Path) -> Path:
    """The folder of the binarised corpus; it is made where it is not there."""
    data = work / "data-bin"
    if not (data / "preprocess.log").exists():
        prefixes = [f"--{split}pref={corpus / split}" for split in ("train", "valid", "test")]
        call("-m", "fairseq_cli.preprocess", "-s", "de", "-t", "en", *prefixes, "--destdir", data)
    return data


def main() -> None:
    """Command line."""
    made = parser(__doc__, corpus="folder of the BPE'd corpus")
    made.add_argument("--updates", type=int, default=1000, choices=TABLES, help="of a training (default: %(default)s)")
    options = made.parse_args()
    work = options.work.resolve()
    binary = work / "data-bin" if options.dry_run else binarised(options.corpus.resolve(), work)
    name = TABLES[options.updates]
    run(name, {**asked(name)[2], "binary": binary}, options)


if __name__ == "__main__":
    main()
