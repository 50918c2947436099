"""prepare.iwslt14: every step by itself, the whole run on a small archive, and its bad inputs."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("sacremoses")
pytest.importorskip("subword_nmt")

from prepare import bpe, iwslt14, moses, ted
from prepare.download import download
from prepare.files import PrepareError, read_lines, sha256_file, write_lines
from prepare.parallel import map_lines
from prepare.stages import Stages, only_run
from tests.few import few

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data"
TALKS = 3
LINES = 40  # text lines per talk


def train_tags(lang: str) -> str:
    """A train.tags file: three talks with meta data, 40 lines each, every 10th pair badly matched."""
    out = []
    for talk in range(TALKS):
        out += [f"<url>http://talks/{talk}</url>", "<keywords>talks, x</keywords>", "<speaker>A B</speaker>"]
        out += [f"<talkid>{talk}</talkid>", f"<title>A B: Title {talk}</title>", "<reviewer></reviewer>"]
        out += [f"<description>Talk number {talk}, described.</description>"]
        for line in range(LINES):
            word = f"{'Wort' if lang == 'de' else 'Word'}{talk * LINES + line}"
            extra = " far too many words" * 5 if lang == "en" and line % 10 == 9 else ""
            out.append(f' {word}, it\'s "good"; low-lying Äpfel & U.S.{extra} ')
    return "\n".join(out) + "\n"


def xml_of(name: str, lang: str) -> str:
    """A dev/test file of four segments."""
    rows = [f'<seg id="{i}">  {name} {lang}: it’s No. {i}. </seg>' for i in range(1, 5)]
    return "\n".join(
        ["<?xml version='1.0'?>", f'<refset srclang="{lang}">', "<title>Gone</title>", *rows, "</refset>"]
    )


def contents() -> dict[str, str]:
    """The files of a small archive in the original layout, by their path in it."""
    files = {f"de-en/{iwslt14.TRAIN}.{lang}": train_tags(lang) for lang in iwslt14.LANGS}
    for name in iwslt14.TEST_SETS:
        files |= {f"de-en/{name}.{lang}.xml": xml_of(name, lang) for lang in iwslt14.LANGS}
    return files | {"de-en/README": "not needed"}


def write_archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            raw = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "small.tgz", contents())


def run(base: Path, *arguments: object) -> int:
    return iwslt14.main(["--base", str(base), "--workers", "1", "--bpe-operations", "60", *map(str, arguments)])


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "manifest.json"))
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


# --- single steps ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lang", "raw", "tokens"),
    [
        ("en", "It's the '90s, isn't it?", "It &apos;s the &apos; 90s , isn &apos;t it ?"),
        ("en", "the 1990's and 5,300 of A,B", "the 1990 &apos;s and 5,300 of A , B"),
        ("en", 'He said: "Mr. Smith, No. 5." [x|y] <b> & c', None),
        ("en", "I live in the U.S.", "I live in the U.S ."),
        ("en", "in the U.S. we do", "in the U.S. we do"),
        ("en", "wait... what...", "wait ... what ..."),
        ("en", "low-lying — well-known", "low-lying — well-known"),
        ("de", "Z.B. Nr. 5 am 3. Mai usw.", "Z.B. Nr. 5 am 3. Mai usw ."),
        ("de", "das geht's nicht", "das geht &apos; s nicht"),
    ],
)
def test_tokens_are_those_of_moses(lang: str, raw: str, tokens: str | None) -> None:
    if tokens is None:
        tokens = "He said : &quot; Mr. Smith , No. 5 . &quot; &#91; x &#124; y &#93; &lt; b &gt; &amp; c"
    assert moses.tokenize(raw, lang) == tokens


def test_control_characters_and_blank_lines() -> None:
    assert moses.tokenize("a \x1c b\x01c\u2028d\x85e", "en") == "a bc d e"
    # Moses passes lines of white space through, so that both sides keep their line numbers.
    assert [moses.tokenize(line, "en") for line in ("", "  ", "\x01")] == ["", "  ", ""]


def test_lowercase_has_no_final_sigma() -> None:
    assert moses.lowercase("ÄÖÜ ΟΔΟΣ &APOS;") == "äöü οδοσ &apos;"


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ("a b c", "a b", True),  # exactly 1.5
        ("a b c d", "a b c d e f g", False),
        ("a b c d e f g", "a b c d", False),
        ("", "a", False),
        (" \u2028", "a", False),
        ("a " * 175, "a " * 175, True),
        ("a " * 176, "a " * 175, False),
        ("a" * 1000, "b", True),
        ("a" * 1001, "b", False),
    ],
)
def test_length_filter(source: str, target: str, kept: bool) -> None:
    assert moses.keep_pair(source, target) is kept
    assert list(moses.clean_pairs([(source, target)])) == ([(source.strip(), target.strip())] if kept else [])


def test_training_text_drops_meta_data_and_unwraps_titles() -> None:
    lines = [
        "<url>http://x</url>",
        "<talkid>1</talkid>",
        "<keywords>a</keywords>",
        "<speaker>A</speaker>",
        '<reviewer href="x">R</reviewer>',
        "<translator></translator>",
        '<doc docid="1">',
        "</doc>",
        "<title>A: B</title>",
        "<description>TED <url> here</description>",
        "<description>C</description>",
        " Text about a <speaker> tag. ",
    ]
    assert ted.training_text(lines) == ["A: B", "C", " Text about a <speaker> tag. "]


def test_segment_text() -> None:
    lines = [
        "<doc>",
        '<seg id="1"> It’s &amp; </seg>',
        '  <seg id="12">x </seg> ',
        "<seg>no id</seg>",
        '<seg id="3"></seg>',
    ]
    assert ted.segment_text(lines) == ["It's &amp;", "  x", ""]


@pytest.mark.parametrize("count", [0, 22, 23, 46, 100])
def test_every_23rd_line_is_valid(count: int) -> None:
    train, valid = ted.split_valid([str(i) for i in range(1, count + 1)])
    assert valid == [str(i) for i in range(23, count + 1, 23)]
    assert train == [str(i) for i in range(1, count + 1) if i % 23]


def test_bpe_learns_and_applies() -> None:
    codes = bpe.learn(["low low low lower newest newest widest"], 8, quiet=True)
    assert codes[0] == "#version: 0.2"
    assert "l o" in codes and len(codes) <= 9
    encoded = bpe.apply(codes, ["lower  low", "", "xyz"], quiet=True)
    assert [line.replace("@@ ", "") for line in encoded] == ["lower low", "", "xyz"]
    with pytest.raises(PrepareError, match="No BPE"):
        bpe.learn(["a b", ""], 8, quiet=True)
    with pytest.raises(PrepareError, match="two symbols"):
        bpe.apply(["#version: 0.2", "a b c"], ["abc"], quiet=True)


def test_processes_do_not_change_the_result() -> None:
    lines = [f"Line {i}, isn't it?" for i in range(2500)]
    assert map_lines(_tokenize, lines, workers=2, quiet=True) == map_lines(_tokenize, lines, workers=1, quiet=True)


def _tokenize(lines: list[str]) -> list[str]:
    return moses.tokenize_lines(lines, "en", lower=True)


SLOW_WORKERS = """
import os, sys, time
from pathlib import Path
from prepare.parallel import map_lines
from prepare.stages import only_run
def work(lines):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(60)
with only_run(Path(sys.argv[1], ".lock")):
    map_lines(work, ["x"] * 2000, workers=2, quiet=True)
"""


def test_a_kill_leaves_no_worker_and_no_lock(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", SLOW_WORKERS, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("[0-9]*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    while time.monotonic() < deadline:
        try:
            with only_run(tmp_path / ".lock"):
                return
        except PrepareError:
            time.sleep(0.01)
    pytest.fail("a worker has outlived its parent")


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    lines = ["a\u2028b", "c\rd", "", "e\x0cf"]
    write_lines(tmp_path / "x", lines)
    assert read_lines(tmp_path / "x") == lines
    (tmp_path / "y").write_bytes(b"caf\xe9\n")
    with pytest.raises(PrepareError, match="not valid UTF-8"):
        read_lines(tmp_path / "y")


# --- the whole run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("made")
    assert run(base, "--archive", write_archive(base / "a.tgz", contents()), "--quiet") == 0
    return base


def test_whole_run(made: Path) -> None:
    output = made / iwslt14.OUTPUT
    names = {f"{name}.{lang}" for name in ("train", "valid", "test") for lang in iwslt14.LANGS}
    assert {path.name for path in output.iterdir()} == names | {"code", "manifest.json", "tmp", ".lock"}
    tmp = output / "tmp"
    cleaned = [read_lines(tmp / f"{iwslt14.TRAIN}.{lang}") for lang in iwslt14.LANGS]
    # Per talk: title, description, 40 lines less 4 that are too long on one side.
    assert [len(side) for side in cleaned] == [TALKS * (2 + LINES - LINES // 10)] * 2
    for side, lang in zip(cleaned, iwslt14.LANGS, strict=True):
        assert read_lines(tmp / f"valid.{lang}") == [line for i, line in enumerate(side, 1) if i % 23 == 0]
        assert read_lines(tmp / f"train.{lang}") == [line for i, line in enumerate(side, 1) if i % 23]
        apostrophe = "it &apos;s" if lang == "en" else "it &apos; s"
        word = "word" if lang == "en" else "wort"
        assert side[:2] == ["a b : title 0", "talk number 0 , described ."]
        assert side[2] == f"{word}0 , {apostrophe} &quot; good &quot; ; low-lying äpfel &amp; u.s ."
        test = read_lines(tmp / f"test.{lang}")
        assert len(test) == 4 * len(iwslt14.TEST_SETS)
        assert test[0] == f"iwslt14.ted.dev2010.de-en {lang} : {apostrophe} no. 1 ."
        order = [re.search(r"(dev|tst)20\d\d", line)[0] for line in test[::4]]
        assert order == ["dev2010", "dev2012", "tst2010", "tst2011", "tst2012"]
        for name in ("train", "valid", "test"):
            encoded = [line.replace("@@ ", "") for line in read_lines(output / f"{name}.{lang}")]
            assert encoded == read_lines(tmp / f"{name}.{lang}")
    assert read_lines(tmp / "train.en-de") == read_lines(tmp / "train.de") + read_lines(tmp / "train.en")
    assert not list(made.rglob("*.part*")) and not list(made.rglob("*.unpacked"))
    archive = json.loads((output / "manifest.json").read_text())["archive"]
    assert archive["sha256"] == sha256_file(made / "a.tgz")


def test_second_run_does_nothing_and_repairs_what_was_harmed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = made / iwslt14.OUTPUT
    before = tree(output)
    assert run(made, "--archive", made / "a.tgz") == 0
    steps = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("done:")]
    assert steps and all(line.endswith("already done") for line in steps)

    # As after a kill: a file gone, one cut short, one changed at the same length, rubbish in a temporary one.
    (output / "tmp" / "train.en").unlink()
    text = (output / "valid.de").read_bytes()
    (output / "valid.de").write_bytes(text[: len(text) // 2])
    text = (output / "code").read_bytes()
    (output / "code").write_bytes(text[:-2] + b"x\n")
    (output / "test.en.part").write_text("rubbish")
    assert run(made, "--archive", made / "a.tgz") == 0
    again = {line for line in capsys.readouterr().err.splitlines() if not line.endswith("already done")}
    assert {"split", "learn BPE", "apply BPE valid.de"} <= again
    assert not any(line.startswith(("tokenize", "unpack", "clean")) for line in again)
    (output / "test.en.part").unlink(missing_ok=True)
    assert tree(output) == before


def test_unpacked_folder_gives_the_same(made: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--archive", made / "orig" / "de-en", "--quiet") == 0
    assert tree(tmp_path / iwslt14.OUTPUT) == tree(made / iwslt14.OUTPUT)


def test_other_settings_redo_their_step_only(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--archive", made / "orig" / "de-en", "--quiet")
    assert run(tmp_path, "--archive", made / "orig" / "de-en", "--bpe-operations", "20") == 0
    again = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("learn BPE", "split", "clean"))]
    assert again == ["clean: already done", "split: already done", "learn BPE"]
    assert len(read_lines(tmp_path / iwslt14.OUTPUT / "code")) == 21


@pytest.mark.slow
def test_script_survives_a_kill(archive: Path, tmp_path: Path, made: Path) -> None:
    """The shell entry, killed in the middle, then run again from the same current directory."""
    base = tmp_path / "with space"
    base.mkdir()
    command = [str(REPO / "prepare" / "prepare-iwslt14.sh"), "--archive", str(archive), "--workers", "1"]
    command += ["--bpe-operations", "60"]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": ""}
    (base / "prepare").mkdir()
    (base / "prepare" / "__init__.py").write_text("raise SystemExit('wrong package')")
    process = subprocess.Popen(command, cwd=base, env=environment, stderr=subprocess.DEVNULL)
    waited = base / iwslt14.OUTPUT / "tmp" / f"{iwslt14.TRAIN}.tok.de"
    while not waited.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Not meant to fail on a fast machine that was done before the kill.
    assert process.returncode in (-signal.SIGKILL, 0)
    done = subprocess.run(command, check=False, cwd=base, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"tokenize {iwslt14.TRAIN}.tok.de: already done" in done.stderr or "unpack: already done" in done.stderr
    assert tree(base / iwslt14.OUTPUT) == tree(made / iwslt14.OUTPUT)


# --- bad input ------------------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], base: Path, *arguments: object) -> str:
    """Run, expect status 1, and return the one line of error."""
    assert run(base, "--quiet", *arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prepare-iwslt14: error: ") and lines[0].endswith(".")
    assert not (base / iwslt14.OUTPUT / "train.de").exists()
    return lines[0]


def test_missing_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in fails(capsys, tmp_path, "--archive", tmp_path / "none.tgz")


@pytest.mark.parametrize("damage", few(["cut", "flipped", "no tar", "checksum"], "flipped", "checksum"))
def test_damaged_archive(damage: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(archive.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    elif damage == "checksum":
        raw[-8] ^= 0xFF
    else:
        raw = bytearray(b"<html>not found</html>")
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(raw)
    assert "is damaged or is no tar archive" in fails(capsys, tmp_path, "--archive", broken)
    # A good archive is not refused afterwards.
    assert run(tmp_path, "--archive", archive, "--quiet") == 0


def test_missing_and_doubled_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = contents()
    del files["de-en/IWSLT14.TED.tst2011.de-en.en.xml"]
    small = write_archive(tmp_path / "a.tgz", files)
    assert "lacks IWSLT14.TED.tst2011.de-en.en.xml" in fails(capsys, tmp_path, "--archive", small)
    twice = write_archive(tmp_path / "b.tgz", contents() | {"other/train.tags.de-en.de": "x"})
    assert "train.tags.de-en.de more than once" in fails(capsys, tmp_path, "--archive", twice)


def test_unsafe_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = write_archive(tmp_path / "a.tgz", contents() | {"../../evil": "x"})
    assert "unsafe path" in fails(capsys, tmp_path, "--archive", evil)
    assert not list(tmp_path.parent.glob("evil"))


def test_unequal_line_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = contents()
    files["de-en/train.tags.de-en.en"] += "one more\n"
    message = fails(capsys, tmp_path, "--archive", write_archive(tmp_path / "a.tgz", files))
    assert "train.tags.de-en has 126 German but 127 English lines" in message
    files = contents()
    files["de-en/IWSLT14.TED.tst2012.de-en.de.xml"] += '\n<seg id="5">x</seg>'
    message = fails(capsys, tmp_path, "--force", "--archive", write_archive(tmp_path / "b.tgz", files))
    assert "IWSLT14.TED.tst2012.de-en has 5 German but 4 English lines" in message


def test_another_archive_is_refused(tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "was expected" in fails(capsys, tmp_path, "--archive", archive, "--sha256", "0" * 64)
    assert run(tmp_path, "--archive", archive, "--sha256", sha256_file(archive).upper(), "--quiet") == 0
    other = write_archive(tmp_path / "other.tgz", contents() | {"de-en/extra": "x"})
    assert run(tmp_path, "--archive", other, "--quiet") == 1
    assert "--force" in capsys.readouterr().err
    assert run(tmp_path, "--archive", other, "--quiet", "--force") == 0


def test_bad_manifest_and_second_run_at_once(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / iwslt14.OUTPUT
    with only_run(output / ".lock"):
        assert "Another run" in fails(capsys, tmp_path, "--archive", archive)
    (output / "manifest.json").write_text("[1]")
    assert "is not a manifest" in fails(capsys, tmp_path, "--archive", archive)


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--sha256", "abc"], ["--bpe-operations", "-1"]])
def test_bad_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        iwslt14.parse(arguments)
    assert leave.value.code == 2


def test_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "m.json", tmp_path)

    def work(parts: list[Path]) -> None:
        parts[0].write_text("half")
        raise PrepareError("broken.")

    with pytest.raises(PrepareError):
        stages.run("s", [], [tmp_path / "x", tmp_path / "y"], work)
    assert list(tmp_path.iterdir()) == []


# --- download -------------------------------------------------------------------------------


class Server:
    """A local HTTP server of one file, with what the tests need to steer and to see."""

    def __init__(self, body: bytes) -> None:
        self.body, self.tag = body, '"v1"'
        self.break_after: int | None = None  # bytes of an answer after which the connection ends
        self.ranges, self.status = True, None
        self.requests: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.requests.append(asked)
                if outer.status:
                    return self.send_error(outer.status)
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and outer.ranges else 0
                if self.headers.get("If-Range", outer.tag) != outer.tag:
                    start = 0
                if start and start >= len(outer.body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(outer.body)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                rest = outer.body[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.body) - 1}/{len(outer.body)}")
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("ETag", outer.tag)
                self.end_headers()
                self.wfile.write(rest if outer.break_after is None else rest[: outer.break_after])

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/de-en.tgz"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(archive: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    started = Server(archive.read_bytes())
    yield started
    started.server.shutdown()
    started.server.server_close()


def fetch(server: Server, target: Path, **options) -> str:
    return download(server.url, target, quiet=True, pause=0, timeout=5, **options)


def test_download_resumes(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "d" / "x.tgz"
    server.break_after = 500
    with pytest.raises(PrepareError, match="run again to resume"):
        fetch(server, target, attempts=2)
    assert not target.exists() and (tmp_path / "d" / "x.tgz.part").stat().st_size == 1000
    server.break_after = None
    digest = hashlib.sha256(server.body).hexdigest()
    assert fetch(server, target, sha256=digest) == digest
    assert server.requests == [None, "bytes=500-", "bytes=1000-"]
    assert target.read_bytes() == server.body
    assert [path.name for path in target.parent.iterdir()] == ["x.tgz"]


@pytest.mark.parametrize("change", ["file", "no ranges", "complete", "too long", "other url"])
def test_download_with_an_old_part(change: str, server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.tgz"
    server.break_after = 300
    with pytest.raises(PrepareError):
        fetch(server, target, attempts=1)
    server.break_after = None
    part = tmp_path / "x.tgz.part"
    if change == "file":
        server.body, server.tag = server.body[::-1], '"v2"'
    elif change == "no ranges":
        server.ranges = False
    elif change == "complete":
        part.write_bytes(server.body)
    elif change == "too long":
        part.write_bytes(server.body + b"more")
    else:
        server.url += "?2"
    fetch(server, target)
    assert target.read_bytes() == server.body


def test_download_errors(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.tgz"
    with pytest.raises(PrepareError, match="discarded"):
        fetch(server, target, sha256="0" * 64)
    assert not list(tmp_path.glob("x.tgz*"))
    server.status = 404
    with pytest.raises(PrepareError, match="HTTP 404"):
        fetch(server, target)
    assert len(server.requests) == 2  # a 404 is not tried again
    server.status = 503
    with pytest.raises(PrepareError, match="HTTP 503"):
        fetch(server, target, attempts=3)
    assert len(server.requests) == 5
    with pytest.raises(PrepareError, match="broke off"):
        download("http://127.0.0.1:9/x", target, quiet=True, attempts=1)


def test_whole_run_with_download(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--url", server.url, "--quiet") == 0
    assert (tmp_path / "orig" / "de-en.tgz").read_bytes() == server.body
    assert run(tmp_path, "--url", server.url, "--quiet") == 0
    assert len(server.requests) == 1
    (tmp_path / "orig" / "de-en.tgz").write_bytes(server.body[:-1])
    assert run(tmp_path, "--url", server.url, "--quiet") == 1
    assert "was made from" in capsys.readouterr().err


# --- the published files --------------------------------------------------------------------


@pytest.mark.skipif(
    not (DATA / "iwslt14-de-en").is_dir(), reason="shared/data/iwslt14-de-en is not beside the repository"
)
def test_published_files_come_out() -> None:
    from benchmarks import iwslt14_parity

    folder = DATA / "iwslt14-de-en"
    rows = {row.check: row for row in iwslt14_parity.bpe_rows(folder, 0) + iwslt14_parity.token_rows(folder, 0)}
    for name in ("valid", "test"):
        for lang in iwslt14.LANGS:
            assert rows[f"apply BPE, {name}.{lang}"].share == 1
            assert rows[f"tokenise again, {name}.{lang}"].share > 0.999
    assert rows["  the others: lower-cased abbreviations only"].share == 1
    assert all(row.share == 1 for row in iwslt14_parity.last_stop_rows(folder))
    assert all(row.share == 1 for row in iwslt14_parity.clean_rows(folder) if not row.check.endswith("test"))
    if (DATA / "mt-mix-de-en").is_dir():
        rows = iwslt14_parity.raw_rows(DATA, 0)
        assert rows[1].share > 0.99 and rows[2].share == 1
