"""A tiny synthetic corpus, and fairseq's commands on it."""

import random
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

from tests.fairseq.command_lines import Translation  # noqa: E402
from tests.fairseq.runner import Runner  # noqa: E402


def _sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """German: random words, some split as BPE would. English: the mapped words in reverse order."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = [draw.randrange(16) for _ in range(draw.randint(3, 7))]
        german = [f"ge@@ w{word}" if word % 5 == 0 else f"w{word}" for word in words]
        english = [f"un@@ v{word}" if word % 4 == 0 else f"v{word}" for word in reversed(words)]
        pairs.append((" ".join(german), " ".join(english)))
    return pairs


@pytest.fixture
def runner(tmp_path) -> Runner:
    """Runs commands in the test's own folder."""
    return Runner(tmp_path)


def write_corpus(folder: Path) -> Path:
    """Write and binarise a corpus of 160 training pairs, 10 to validate and 10 to test on; returns its folder."""
    for split, count in (("train", 160), ("valid", 10), ("test", 10)):
        pairs = _sentences(count, seed=len(split) * 1000 + count)
        for side, language in enumerate(("de", "en")):
            lines = "".join(pair[side] + "\n" for pair in pairs)
            (folder / f"{split}.{language}").write_text(lines, encoding="utf-8")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    languages = ["--source-lang", "de", "--target-lang", "en"]
    Runner(folder).run("preprocess", [*languages, *prefixes, "--destdir", folder / "data-bin", "--workers", "1"])
    return folder / "data-bin"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The binarised corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def translation(data) -> Translation:
    """Command lines of translation runs on the corpus."""
    return Translation(data)
