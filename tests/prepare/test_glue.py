"""Preparing GLUE: from the hub's layout and from copies, into the official files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import DatasetDict

from hf_plugin.glue.reading import read_split
from hf_plugin.glue.tasks import find_task
from prepare import glue
from prepare.files import PrepareError
from prepare.stages import only_run
from tests.hf.glue_files import FOLDERS, HUB, OFFICIAL, hub_name, hub_table, write_official, write_repository

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "glue"
FEW = "has 6 rows where GLUE has"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    place = tmp_path_factory.mktemp("official")
    for folder in FOLDERS:
        write_official(place, folder)
    return place


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "glue")


def _files(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def _error(capsys) -> str:
    """The one error line on standard error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare-glue: error: ")]
    message = line.removeprefix("prepare-glue: error: ")
    assert message.endswith(".") and ". " not in message, message
    return message


def _same_rows(made: Path, official: Path, folder: str):
    task = find_task(folder)
    for split in task.splits:
        rows, expected = (read_split(task, split, place / folder).to_dict() for place in (made, official))
        # A carriage return within a text cannot be kept in every reader of such files.
        expected = {
            name: [value.replace("\r", " ") if isinstance(value, str) else value for value in values]
            for name, values in expected.items()
        }
        assert rows == expected


def test_all_tasks_of_the_hub_are_written_in_the_official_layout(repository, official, tmp_path, capfd):
    data = tmp_path / "data"
    arguments = ["--data_dir", str(data), "--repository", str(repository), "--cache_dir", str(tmp_path / "cache")]
    assert glue.main(arguments) == 0
    assert sorted(path.name for path in data.iterdir() if path.is_dir()) == sorted(FOLDERS)
    for folder in FOLDERS:
        assert {path.stem for path in (data / folder).iterdir()} == set(OFFICIAL[folder])
        for stem, (header, pattern) in OFFICIAL[folder].items():
            first, second = (data / folder / f"{stem}.tsv").read_text(encoding="utf-8").split("\n")[:2]
            if header is not None:
                assert first == header
            assert second.count("\t") == pattern.count("\t")
        _same_rows(data, official, folder)
    shown = capfd.readouterr().err
    assert shown.count(FEW) == sum(map(len, OFFICIAL.values())) and f"done: {data / 'CoLA'}, " in shown

    before = _files(data)
    assert glue.main(arguments) == 0
    assert _files(data) == before and f"{data / 'MNLI'}: there already" in capfd.readouterr().err


def test_the_command_line_of_the_manual(repository, official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        glue.main(["--data_dir", "data/", "--task", "MNLI", "--repository", str(repository), "--cache_dir", "c"]) == 0
    )
    assert [path.name for path in Path("data").iterdir() if path.is_dir()] == ["MNLI"]
    _same_rows(Path("data"), official, "MNLI")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--tasks", "MNLI", "CoLA"], ["mnli", "cola"]),
        (["--tasks", "sst2,STS-B", "cola", "SST-2"], ["sst-2", "sts-b", "cola"]),
        (["--task", "rte"], ["rte"]),
        ([], [folder.lower() for folder in FOLDERS]),
        (["--tasks", "all"], [folder.lower() for folder in FOLDERS]),
    ],
)
def test_tasks_are_named_in_any_way(arguments, names):
    assert [task.name for task in glue.parse(arguments).tasks] == names


@pytest.mark.parametrize("arguments", [["--tasks", "snli"], ["--tasks", ","]])
def test_other_tasks_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        glue.parse(arguments)
    assert "CoLA, SST-2, MRPC" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "renamed", "files"),
    [
        ("CoLA", "CoLA", {}),
        ("SST-2", "sst2", {"dev": "valid"}),
        ("STS-B", "sts", {"dev": "val"}),
        ("MNLI", "mnli", {"dev_matched": "valid_matched", "dev_mismatched": "validation_mismatched"}),
    ],
)
def test_tsv_copies_are_taken_over_byte_for_byte(official, tmp_path, folder, renamed, files):
    copy = tmp_path / "copies" / renamed
    shutil.copytree(official / folder, copy)
    (copy / "original").mkdir()
    (copy / "original" / "train.tsv").write_text("something else\n")
    for old, new in files.items():
        (copy / f"{old}.tsv").rename(copy / f"{new}.tsv")
    data = tmp_path / "data"
    assert glue.main(["--tasks", folder, "--data_dir", str(data), "--from", str(copy.parent)]) == 0
    for stem in OFFICIAL[folder]:
        name = f"{stem}.tsv"
        assert (data / folder / name).read_bytes() == (official / folder / name).read_bytes()
    # The folder of the task itself will do too.
    other = tmp_path / "other"
    assert glue.main(["--tasks", folder, "--data_dir", str(other), "--from", str(copy)]) == 0
    assert len(list((other / folder).iterdir())) == len(OFFICIAL[folder])


def _parquet(place, folder):
    for stem in OFFICIAL[folder]:
        table = hub_table(folder, stem)
        for part in range(2):
            table.shard(2, part).to_parquet(place / f"{hub_name(stem)}-{part:05}-of-00002.parquet")


def _saved(place, folder):
    DatasetDict({hub_name(stem): hub_table(folder, stem) for stem in OFFICIAL[folder]}).save_to_disk(place)


def _cached(place, folder):
    deep = place / "0.0.0" / "bcdcba79d07bc864"
    deep.mkdir(parents=True)
    for stem in OFFICIAL[folder]:
        saved = hub_table(folder, stem)
        saved.save_to_disk(place / "work")
        (place / "work" / "data-00000-of-00001.arrow").rename(deep / f"glue-{hub_name(stem)}.arrow")
        shutil.rmtree(place / "work")
    (deep / "cache-0123.arrow").write_bytes(b"tokenised")


@pytest.mark.parametrize("folder", ["CoLA", "MNLI", "STS-B", "QQP"])
@pytest.mark.parametrize("kind", [_parquet, _saved, _cached])
def test_copies_of_the_hubs_tables_are_converted(official, tmp_path, kind, folder):
    place = tmp_path / "copies" / HUB[folder][0]
    place.mkdir(parents=True)
    kind(place, folder)
    arguments = ["--tasks", folder, "--data_dir", str(tmp_path), "--from", str(place.parent)]
    assert glue.main(arguments) == 0
    _same_rows(tmp_path, official, folder)


def test_a_stopped_run_goes_on_where_it_was(official, tmp_path):
    data = tmp_path / "data"
    arguments = ["--tasks", "RTE", "--data_dir", str(data), "--from", str(official)]
    assert glue.main(arguments) == 0
    before = _files(data / "RTE")
    (data / "RTE" / "dev.tsv").unlink()
    assert glue.main(arguments) == 0
    after = _files(data / "RTE")
    assert after.keys() == before.keys()
    assert [path.name for path in after if after[path] != before[path]] == ["dev.tsv"]


def test_copies_without_test_files_are_enough(official, tmp_path, capsys):
    shutil.copytree(official / "CoLA", tmp_path / "CoLA")
    (tmp_path / "CoLA" / "test.tsv").unlink()
    assert glue.main(["--tasks", "CoLA", "--data_dir", str(tmp_path / "data"), "--from", str(tmp_path)]) == 0
    assert sorted(path.name for path in (tmp_path / "data" / "CoLA").iterdir()) == ["dev.tsv", "train.tsv"]
    assert "test.tsv: no copy, left out" in capsys.readouterr().err


def test_all_takes_the_copies_that_are_there(official, tmp_path, capsys):
    for folder in ("CoLA", "RTE", "MNLI"):
        shutil.copytree(official / folder, tmp_path / "copies" / folder)
    (tmp_path / "copies" / "MNLI" / "dev_mismatched.tsv").unlink()
    arguments = ["--quiet", "--data_dir", str(tmp_path / "data"), "--from", str(tmp_path / "copies")]
    assert glue.main(arguments) == 0
    assert {path.name for path in (tmp_path / "data").iterdir() if path.is_dir()} == {"CoLA", "RTE"}
    shown = capsys.readouterr().err
    assert shown.count("left out: ") == 7 and "neither dev_mismatched.tsv nor a parquet or arrow file" in shown
    assert shown.count(FEW) == 6 and "done" not in shown


def _nothing(place, official):
    (place / "other").mkdir()


def _another_task(place, official):
    shutil.copytree(official / "WNLI", place / "WNLI")


def _no_dev(place, official):
    shutil.copytree(official / "RTE", place / "RTE")
    (place / "RTE" / "dev.tsv").unlink()


def _bad_label(place, official):
    shutil.copytree(official / "RTE", place / "RTE")
    with open(place / "RTE" / "dev.tsv", "a") as handle:
        handle.write("6\ta\tb\tperhaps\n")


def _half_a_table(place, official):
    (place / "rte").mkdir()
    _parquet(place / "rte", "RTE")
    (place / "rte" / "train-00001-of-00002.parquet").unlink()


def _damaged(place, official):
    (place / "rte").mkdir()
    _parquet(place / "rte", "RTE")
    path = place / "rte" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:100])


def _damaged_arrow(place, official):
    _cached(place / "rte", "RTE")
    (path,) = (place / "rte").rglob("glue-train.arrow")
    path.write_bytes(b"no arrow")


@pytest.mark.parametrize(
    ("spoil", "tasks", "expected"),
    [
        (_nothing, ["RTE", "CoLA"], "has no folder of RTE; give --from"),
        (_nothing, ["RTE"], "neither train.tsv nor a parquet or arrow file of train"),
        (_nothing, ["all"], "has no whole copy of any task"),
        (_another_task, ["RTE"], "neither train.tsv nor a parquet or arrow file of train"),
        (_no_dev, ["RTE"], "neither dev.tsv nor a parquet or arrow file of validation"),
        (_bad_label, ["RTE"], "dev.tsv, line 8, has the label 'perhaps'"),
        (_half_a_table, ["RTE"], "is one of 2 parts, but 1 are there"),
        (_damaged, ["RTE"], "train-00001-of-00002.parquet is damaged or is no parquet file"),
        (_damaged_arrow, ["RTE"], "glue-train.arrow is damaged or is no arrow file"),
    ],
)
def test_bad_copies_give_one_sentence_and_no_spoilt_file(official, tmp_path, capsys, spoil, tasks, expected):
    place = tmp_path / "copies"
    place.mkdir()
    spoil(place, official)
    data = tmp_path / "data"
    assert glue.main(["--tasks", *tasks, "--data_dir", str(data), "--from", str(place)]) == 1
    assert expected in _error(capsys)
    assert not [path for path in _files(data) if path.name in ("dev.tsv", "dev.tsv.part", "train.tsv.part")]


def test_a_missing_folder_of_copies_gives_one_sentence(tmp_path, capsys):
    assert glue.main(["--data_dir", str(tmp_path), "--from", str(tmp_path / "none")]) == 1
    assert "There is no folder" in _error(capsys)


def test_two_runs_do_not_write_the_same_folder(official, tmp_path):
    with only_run(tmp_path / ".prepare-glue.lock"), pytest.raises(PrepareError, match="Another run"):
        glue.prepare(glue.Options((find_task("RTE"),), tmp_path, official))


def test_an_unreachable_hub_gives_one_sentence(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "prepare.glue", "--task", "RTE", "--data_dir", str(tmp_path / "data"), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("prepare-glue: error: RTE cannot be loaded from the hub's nyu-mll/glue (Couldn't reach")
    assert "give --data_dir" in line and "prepare.glue --tasks RTE --from" in line and ". " not in line


def test_real_copies_are_whole(tmp_path, capsys):
    if not (REAL / "RTE").is_dir():
        pytest.skip(f"there is no {REAL}")
    tasks = ["CoLA", "MRPC", "STS-B", "RTE", "WNLI"]
    assert glue.main(["--tasks", *tasks, "--data_dir", str(tmp_path), "--from", str(REAL), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    for folder in tasks:
        for path in (tmp_path / folder).iterdir():
            assert path.read_bytes() == (REAL / folder / path.name).read_bytes()
