"""IWSLT'14 German-English as fairseq's prepare-iwslt14.sh makes it.

    python -m prepare.iwslt14                       # downloads the archive
    python -m prepare.iwslt14 --archive de-en.tgz   # or uses one at hand, or an unpacked folder

Writes orig/ and iwslt14.tokenized.de-en/{train,valid,test}.{de,en}, with ``code`` (the BPE
merges), ``manifest.json`` and tmp/ beside them, below the current directory. A run that was
stopped goes on where it was; what the manifest's checksums confirm is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from prepare import bpe, moses, ted
from prepare.archive import find_members, unpack
from prepare.command import run
from prepare.download import check_sha256, download
from prepare.files import PrepareError, read_lines, write_lines
from prepare.parallel import default_workers, map_lines
from prepare.stages import Stages, only_run

URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
LANGS = ("de", "en")
OUTPUT = "iwslt14.tokenized.de-en"
TRAIN = "train.tags.de-en"
# The test set is these, in this order.
TEST_SETS = tuple(
    f"IWSLT14.{name}.de-en" for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
)
RATIO, SHORTEST, LONGEST, VALID_EVERY = 1.5, 1, 175, 23


@dataclass(frozen=True)
class Options:
    """What a run is asked to do.

    ``base``: the folder that orig/ and the output folder are made in. ``archive``: a tar file or
    an unpacked folder, None to download ``url``. ``sha256``: the checksum the archive must have,
    None to accept any. ``workers``: processes. ``operations``: BPE merges. ``force``: forget what
    earlier runs did. ``quiet``: no progress.
    """

    base: Path
    archive: Path | None = None
    url: str = URL
    sha256: str | None = None
    workers: int = 1
    operations: int = 10000
    force: bool = False
    quiet: bool = False


def source_names() -> list[str]:
    """The 12 file names that the archive must hold: training text, then the test sets."""
    return [f"{TRAIN}.{lang}" for lang in LANGS] + [f"{name}.{lang}.xml" for name in TEST_SETS for lang in LANGS]


def same_length(de: Sequence[str], en: Sequence[str], what: str) -> None:
    """PrepareError, naming ``what``, unless both sides have the same number of lines and at least one."""
    if len(de) != len(en):
        raise PrepareError(f"{what} has {len(de)} German but {len(en)} English lines, so they do not pair.")
    if not de:
        raise PrepareError(f"{what} has no text lines.")


def prepare(options: Options) -> Path:
    """Run all steps and return the output folder; PrepareError if one of them fails."""
    output = options.base / OUTPUT
    with only_run(output / ".lock"):
        manifest = output / "manifest.json"
        if options.force:
            manifest.unlink(missing_ok=True)
        log = (lambda line: None) if options.quiet else partial(print, file=sys.stderr)
        stages = Stages(manifest, options.base, log)
        sources = locate_sources(options, stages)
        for steps in (tokenize_train, clean_train, tokenize_tests, split_sets, encode_sets):
            steps(options, stages, sources, output)
    return output


def locate_sources(options: Options, stages: Stages) -> dict[str, Path]:
    """The source files by name, downloaded and unpacked to orig/de-en as far as need be.

    The archive's SHA-256 goes into the manifest; a later run with another archive at the same
    place is refused (PrepareError) unless ``options.force``.
    """
    names = source_names()
    if options.archive is not None and options.archive.is_dir():
        if options.sha256:
            raise PrepareError(f"--sha256 is for an archive file, but {options.archive} is a folder.")
        return dict(zip(names, find_members(options.archive, names, str(options.archive)), strict=True))

    archive = options.archive or options.base / "orig" / "de-en.tgz"
    known = stages.record["archive"]
    if options.archive is None and not archive.exists():
        stages.log(f"downloading {options.url}")
        download(options.url, archive, options.sha256, options.quiet)
    if not archive.is_file():
        raise PrepareError(f"{archive} does not exist.")
    found = check_sha256(archive, options.sha256)
    if known and known["sha256"] != found:
        raise PrepareError(
            f"{archive} has SHA-256 {found}, but {stages.manifest} was made from {known['sha256']}; "
            "give --force to start over with it."
        )
    paths = [options.base / "orig" / "de-en" / name for name in names]
    try:
        stages.run("unpack", [archive], paths, lambda parts: unpack(archive, names, parts))
    except PrepareError as error:
        if options.archive is not None:
            raise
        raise PrepareError(f"{str(error).rstrip('.')}; delete it to have it downloaded again.") from None
    # Recorded only now: an archive that cannot be unpacked must not stand in the way of a good one.
    origin = options.archive.name if options.archive else options.url
    stages.record["archive"] = {"sha256": found, "bytes": archive.stat().st_size, "origin": origin}
    stages.save()
    return dict(zip(names, paths, strict=True))


def tokenize_train(options: Options, stages: Stages, sources: dict[str, Path], output: Path) -> None:
    """Training text without tags, tokenised: tmp/train.tags.de-en.tok.{de,en}."""
    for lang in LANGS:
        source = sources[f"{TRAIN}.{lang}"]
        target = output / "tmp" / f"{TRAIN}.tok.{lang}"
        _tokenize_stage(options, stages, source, target, lang, ted.training_text, lower=False)


def tokenize_tests(options: Options, stages: Stages, sources: dict[str, Path], output: Path) -> None:
    """The test sets' XML as tokenised lower-case text: tmp/IWSLT14.*.de-en.{de,en}."""
    for name in TEST_SETS:
        for lang in LANGS:
            source, target = sources[f"{name}.{lang}.xml"], output / "tmp" / f"{name}.{lang}"
            _tokenize_stage(options, stages, source, target, lang, ted.segment_text, lower=True)


def _tokenize_stage(
    options: Options,
    stages: Stages,
    source: Path,
    target: Path,
    lang: str,
    extract: Callable[[list[str]], list[str]],
    lower: bool,
) -> None:
    def work(parts: list[Path]) -> None:
        tokens = map_lines(
            partial(moses.tokenize_lines, lang=lang, lower=lower),
            extract(read_lines(source)),
            options.workers,
            target.name,
            options.quiet,
        )
        write_lines(parts[0], tokens)

    settings = {"lang": lang, "lower": lower, "sacremoses": version("sacremoses")}
    stages.run(f"tokenize {target.name}", [source], [target], work, **settings)


def clean_train(options: Options, stages: Stages, sources: dict[str, Path], output: Path) -> None:
    """Pairs of fitting length (tmp/train.tags.de-en.clean.*), lower-cased (tmp/train.tags.de-en.*)."""
    tmp = output / "tmp"
    inputs = [tmp / f"{TRAIN}.tok.{lang}" for lang in LANGS]
    outputs = [tmp / f"{TRAIN}.clean.{lang}" for lang in LANGS] + [tmp / f"{TRAIN}.{lang}" for lang in LANGS]

    def work(parts: list[Path]) -> None:
        de, en = map(read_lines, inputs)
        same_length(de, en, TRAIN)
        kept = list(moses.clean_pairs(zip(de, en, strict=True), RATIO, SHORTEST, LONGEST))
        for side in range(2):
            lines = [pair[side] for pair in kept]
            write_lines(parts[side], lines)
            write_lines(parts[side + 2], map(moses.lowercase, lines))

    stages.run("clean", inputs, outputs, work, ratio=RATIO, shortest=SHORTEST, longest=LONGEST)


def split_sets(options: Options, stages: Stages, sources: dict[str, Path], output: Path) -> None:
    """tmp/{train,valid,test}.{de,en} and tmp/train.en-de, the text that BPE is learnt on."""
    tmp = output / "tmp"
    inputs = [tmp / f"{TRAIN}.{lang}" for lang in LANGS]
    outputs = [tmp / f"{name}.{lang}" for name in ("train", "valid") for lang in LANGS] + [tmp / "train.en-de"]

    def split(parts: list[Path]) -> None:
        de, en = map(read_lines, inputs)
        same_length(de, en, "The cleaned training text")
        (train_de, valid_de), (train_en, valid_en) = (ted.split_valid(side, VALID_EVERY) for side in (de, en))
        sets = train_de, train_en, valid_de, valid_en, train_de + train_en
        for part, lines in zip(parts, sets, strict=True):
            write_lines(part, lines)

    stages.run("split", inputs, outputs, split, every=VALID_EVERY)
    tests = [tmp / f"{name}.{lang}" for lang in LANGS for name in TEST_SETS]

    def join(parts: list[Path]) -> None:
        texts = [read_lines(path) for path in tests]
        for de, en, name in zip(texts, texts[len(TEST_SETS) :], TEST_SETS, strict=False):
            same_length(de, en, name)
        for side, part in enumerate(parts):
            mine = texts[side * len(TEST_SETS) : (side + 1) * len(TEST_SETS)]
            write_lines(part, [line for lines in mine for line in lines])

    stages.run("test set", tests, [tmp / f"test.{lang}" for lang in LANGS], join)


def encode_sets(options: Options, stages: Stages, sources: dict[str, Path], output: Path) -> None:
    """``code``, learnt on the training text of both languages, and the six encoded files."""
    text, code = output / "tmp" / "train.en-de", output / "code"
    library = version("subword-nmt")

    def learn(parts: list[Path]) -> None:
        write_lines(parts[0], bpe.learn(read_lines(text), options.operations, options.quiet))

    stages.run("learn BPE", [text], [code], learn, operations=options.operations, library=library)
    for lang in LANGS:
        for name in ("train", "valid", "test"):
            plain, target = output / "tmp" / f"{name}.{lang}", output / f"{name}.{lang}"

            def encode(parts: list[Path], plain: Path = plain, label: str = target.name) -> None:
                codes, lines = read_lines(code), read_lines(plain)
                write_lines(parts[0], bpe.apply(codes, lines, options.workers, label, options.quiet))

            stages.run(f"apply BPE {target.name}", [plain, code], [target], encode, library=library)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line (default: that of the process); leaves with 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="prepare-iwslt14", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--archive", type=Path, help="a de-en.tgz or its unpacked folder (default: download it)")
    parser.add_argument("--url", default=URL, help="where to download from (default: %(default)s)")
    parser.add_argument("--sha256", help="the checksum that the archive must have (default: any)")
    parser.add_argument("--base", type=Path, default=Path("."), help="folder to work in (default: the current one)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    parser.add_argument("--bpe-operations", type=int, default=10000, help="merges (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="do all steps again")
    parser.add_argument("--quiet", action="store_true", help="no progress, only errors")
    given = parser.parse_args(arguments)
    if given.workers < 1 or given.bpe_operations < 1:
        parser.error("--workers and --bpe-operations must be at least 1")
    if given.sha256 and not (len(given.sha256) == 64 and set(given.sha256.lower()) <= set("0123456789abcdef")):
        parser.error("--sha256 takes 64 hexadecimal digits")
    return Options(
        base=given.base.resolve(),
        archive=given.archive,
        url=given.url,
        sha256=given.sha256,
        workers=given.workers,
        operations=given.bpe_operations,
        force=given.force,
        quiet=given.quiet,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 after an error (one sentence on stderr), 130 if interrupted."""
    options = parse(arguments)
    return run("prepare-iwslt14", lambda: [prepare(options)], quiet=options.quiet)


if __name__ == "__main__":
    sys.exit(main())
