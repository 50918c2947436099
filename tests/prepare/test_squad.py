"""Preparing SQuAD: from its makers' page, from the hub's tables and from copies."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_plugin.squad.reading import VERSIONS, read_squad
from prepare import squad
from prepare.files import PrepareError
from tests.hf.squad_files import write_squad

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "squad"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    place = tmp_path_factory.mktemp("official")
    return write_squad(write_squad(place, "1.1"), "2.0")


@pytest.fixture
def page(official):
    """A server of the official files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(official))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def table(official: Path, version: str, stem: str) -> Dataset:
    """A file as the hub has it."""
    data = json.loads((official / f"{stem}-v{version}.json").read_text())
    rows = [
        {
            "id": question["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [answer["answer_start"] for answer in question["answers"]],
            },
        }
        for article in data["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return Dataset.from_list(rows)


def hub_copy(place: Path, official: Path, version: str) -> Path:
    """The hub's repository of a version."""
    folder = place / ("squad" if version == "1.1" else "squad_v2")
    inside = folder / ("plain_text" if version == "1.1" else "squad_v2")
    inside.mkdir(parents=True)
    for stem, name in (("train", "train"), ("dev", "validation")):
        table(official, version, stem).to_parquet(inside / f"{name}-00000-of-00001.parquet")
    return folder


def same_questions(made: Path, official: Path, version: str) -> None:
    for name in VERSIONS[version].files:
        ours, theirs = (read_squad(place / name, version == "2.0").to_dict() for place in (made, official))
        assert ours == theirs


def error(capsys) -> str:
    """The one error line on standard error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare-squad: error: ")]
    message = line.removeprefix("prepare-squad: error: ")
    assert message.endswith(".") and ". " not in message, message
    return message


def test_the_makers_files_are_downloaded_and_checked(official, page, tmp_path, capsys):
    sums = [hashlib.sha256((official / name).read_bytes()).hexdigest() for name in VERSIONS["1.1"].files]
    version = replace(VERSIONS["1.1"], sha256=tuple(sums))
    options = squad.Options((version,), tmp_path / "data", page=page, quiet=True)
    made = squad.prepare(options)
    assert [path.name for path in made] == ["train-v1.1.json", "dev-v1.1.json"]
    assert all(path.read_bytes() == (official / path.name).read_bytes() for path in made)
    before = [path.stat().st_mtime_ns for path in made]
    assert squad.prepare(options) == made and [path.stat().st_mtime_ns for path in made] == before
    assert "has 32 questions where SQuAD has 87599." in capsys.readouterr().err


def test_other_files_than_the_makers_are_discarded(page, tmp_path, capsys):
    assert squad.main(["--data_dir", str(tmp_path / "data"), "--page", page, "--quiet"]) == 1
    assert "train-v1.1.json was discarded: " in error(capsys)
    assert not list((tmp_path / "data").glob("*.json"))


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_the_hubs_tables_become_the_makers_files(official, tmp_path, version):
    repository = hub_copy(tmp_path, official, version)
    data = tmp_path / "data"
    arguments = ["--versions", version, "--data_dir", str(data), "--repository", str(repository), "--quiet"]
    assert squad.main([*arguments, "--cache_dir", str(tmp_path / "cache")]) == 0
    same_questions(data, official, version)
    made, given = (json.loads((place / f"dev-v{version}.json").read_text()) for place in (data, official))
    for question in (q for article in given["data"] for p in article["paragraphs"] for q in p["qas"]):
        question.pop("plausible_answers", None)
    assert made == given


def _saved(place, official, version):
    tables = {"train": table(official, version, "train"), "validation": table(official, version, "dev")}
    DatasetDict(tables).save_to_disk(place / ("squad" if version == "1.1" else "squad_v2"))


def _cached(place, official, version):
    deep = place / ("squad" if version == "1.1" else "squad_v2") / "0.0.0"
    deep.mkdir(parents=True)
    for stem, name in (("train", "train"), ("dev", "validation")):
        table(official, version, stem).save_to_disk(place / "work")
        target = deep / f"squad{'_v2' if version == '2.0' else ''}-{name}.arrow"
        (place / "work" / "data-00000-of-00001.arrow").rename(target)
        shutil.rmtree(place / "work")


def _json(place, official, version):
    (place / "deep").mkdir(exist_ok=True)
    for name in VERSIONS[version].files:
        shutil.copy(official / name, place / "deep")


@pytest.mark.parametrize("kind", [hub_copy, _saved, _cached, _json])
def test_copies_are_converted(official, tmp_path, kind):
    place = tmp_path / "copies"
    place.mkdir()
    for version in VERSIONS:
        kind(place, official, version)
    arguments = ["--data_dir", str(tmp_path / "data"), "--from", str(place), "--quiet"]
    assert squad.main([*arguments, "--versions", "all"]) == 0
    for version in VERSIONS:
        same_questions(tmp_path / "data", official, version)


def test_a_copy_without_train_is_enough_to_evaluate(official, tmp_path, capsys):
    (tmp_path / "copies").mkdir()
    shutil.copy(official / "dev-v1.1.json", tmp_path / "copies")
    data = tmp_path / "data"
    assert squad.main(["--data_dir", str(data), "--from", str(tmp_path / "copies")]) == 0
    assert [path.name for path in data.glob("*.json")] == ["dev-v1.1.json"]
    assert "left out: " in capsys.readouterr().err


def _nothing(place, official):
    (place / "other").mkdir()


def _other_version(place, official):
    hub_copy(place, official, "2.0")


def _half(place, official):
    hub_copy(place, official, "1.1")
    path = place / "squad" / "plain_text" / "validation-00000-of-00001.parquet"
    path.rename(path.with_name("validation-00000-of-00002.parquet"))


def _damaged(place, official):
    hub_copy(place, official, "1.1")
    path = place / "squad" / "plain_text" / "validation-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])


def _damaged_json(place, official):
    text = (official / "dev-v1.1.json").read_text()
    (place / "dev-v1.1.json").write_text(text[:-10])


@pytest.mark.parametrize("spoil, sentence", [
    (_nothing, "has no copy of SQuAD v1.1 (train-v1.1.json and dev-v1.1.json, or the hub's parquet or arrow files)"),
    (_other_version, "has no copy of SQuAD v1.1"),
    (_half, "is one of 2 parts, but 1 are there"),
    (_damaged, "validation-00000-of-00001.parquet is damaged or is no parquet file"),
    (_damaged_json, "dev-v1.1.json is damaged (Expecting"),
])  # fmt: skip
def test_bad_copies_give_one_sentence_and_no_spoilt_file(official, tmp_path, capsys, spoil, sentence):
    place = tmp_path / "copies"
    place.mkdir()
    spoil(place, official)
    assert squad.main(["--data_dir", str(tmp_path / "data"), "--from", str(place), "--quiet"]) == 1
    assert sentence in error(capsys)
    assert not [path for path in (tmp_path / "data").iterdir() if "dev" in path.name]


def test_a_missing_folder_and_two_sources(tmp_path, capsys):
    assert squad.main(["--data_dir", str(tmp_path), "--from", str(tmp_path / "none")]) == 1
    assert "There is no folder" in error(capsys)
    with pytest.raises(SystemExit):
        squad.parse(["--from", "x", "--hub"])
    assert squad.parse([]).versions == (VERSIONS["1.1"],)
    assert squad.parse(["--versions", "all"]).versions == tuple(VERSIONS.values())


def test_two_runs_do_not_write_the_same_folder(official, tmp_path):
    with squad.only_run(tmp_path / ".prepare-squad.lock"), pytest.raises(PrepareError, match="Another run"):
        squad.prepare(squad.Options((VERSIONS["1.1"],), tmp_path, official))


@pytest.mark.slow
def test_an_unreachable_hub_gives_one_sentence(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "prepare.squad", "--hub", "--data_dir", str(tmp_path / "data"), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "prepare-squad: error: SQuAD v1.1 cannot be loaded from the hub's rajpurkar/squad (Couldn't"
    )
    assert "give --data_dir with train-v1.1.json and dev-v1.1.json" in line and ". " not in line


def test_real_copies(tmp_path, capsys):
    if not REAL.is_dir():
        pytest.skip(f"there is no {REAL}")
    arguments = ["--versions", "all", "--data_dir", str(tmp_path), "--from", str(REAL), "--quiet"]
    assert squad.main(arguments) == 0
    for name in ("dev-v1.1.json", "dev-v2.0.json"):
        assert (tmp_path / name).read_bytes() == (REAL / name).read_bytes()
    assert "warning" not in capsys.readouterr().err.replace("left out", "")
