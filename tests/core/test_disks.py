"""Files that appear whole, disks that are full, what killed processes leave, and folders that are one run's own."""

import fcntl
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from head_pruning import HeadPruningError
from head_pruning.files import alone_in, appearing_at_once, atomic_path, write_json
from head_pruning.progress import bar_options
from tests.disks import held, no_file_above, read_only

BIG = {"w": torch.zeros(10000)}


def by_handle(path):
    with open(path, "wb") as file:
        torch.save(BIG, file)


WRITERS = {
    "text": lambda path: path.write_text("x" * 40000, encoding="utf-8"),
    "torch": lambda path: torch.save(BIG, path),
    "torch file": by_handle,
    "safetensors": lambda path: save_file(BIG, str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, writer, in_folder):
    file = tmp_path / "weights.pt"
    file.write_text("older", encoding="utf-8")
    with pytest.raises(HeadPruningError) as error, no_file_above(20000):
        if in_folder:
            with appearing_at_once(tmp_path) as folder:
                WRITERS[writer](folder / file.name)
        else:
            with atomic_path(file) as temporary:
                WRITERS[writer](temporary)
    named = tmp_path if in_folder else file
    assert str(error.value).startswith(f"{named} cannot be written (") and "\n" not in str(error.value)
    assert file.read_text(encoding="utf-8") == "older" and os.listdir(tmp_path) == [file.name]


def test_folders_that_are_there_get_the_new_files_and_keep_theirs(tmp_path):
    for content in ("first", "second"):
        with appearing_at_once(tmp_path / "out") as folder:
            (folder / "in" / "side").mkdir(parents=True)
            for name in ("a", "in/a", "in/side/a", f"in/{content}"):
                (folder / name).write_text(content, encoding="utf-8")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    found = {path.relative_to(tmp_path / "out").as_posix(): path.read_text(encoding="utf-8") for path in files}
    new = dict.fromkeys(("a", "in/a", "in/side/a", "in/second"), "second")
    assert found == {**new, "in/first": "first"}


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_that_is_asked_for(tmp_path, mask):
    """safetensors makes private ones, which others on a cluster could not read."""
    old = os.umask(mask)
    try:
        with appearing_at_once(tmp_path / "out") as folder:
            (folder / "in").mkdir()
            for name in ("a", "in/a"):
                save_file(BIG, folder / name)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {"in": 0o777 & ~mask, "a": 0o666 & ~mask}
    assert (tmp_path / "out" / "in" / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    write_json(tmp_path / "a.json", {})
    with read_only(tmp_path), pytest.raises(HeadPruningError, match=r"a.json cannot be written \(Permission denied\)"):
        write_json(tmp_path / "a.json", {"more": 1})
    with pytest.raises(HeadPruningError, match="cannot be written"):
        write_json(tmp_path / "a.json" / "b.json", {})


def test_a_place_that_can_be_no_file_or_folder_is_named(tmp_path):
    """Not the temporary name that was to take its place."""
    (tmp_path / "x").mkdir()
    with pytest.raises(HeadPruningError, match=rf"^{tmp_path}/x cannot be written \(Is a directory\)"):
        write_json(tmp_path / "x", {})
    for name in ("/proc/none", "/proc/none/x"):
        with pytest.raises(HeadPruningError, match=rf"^{name} cannot be written \((No such file|Permission denied)"):
            with appearing_at_once(name):
                pass
        with pytest.raises(HeadPruningError, match=rf"^{name} cannot be written \((No such file|Permission denied)"):
            write_json(name, {})
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "a"):
        open(tmp_path / "other")
    assert os.listdir(tmp_path) == ["x"]


def test_other_errors_are_left_alone(tmp_path):
    for error in (FileNotFoundError(2, "no such file"), RuntimeError("shapes differ"), KeyError("w")):
        with pytest.raises(type(error)), atomic_path(tmp_path / "a"):
            raise error
    assert not os.listdir(tmp_path)


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path):
    (tmp_path / ".saving-abc-picture.png").write_text("half", encoding="utf-8")
    (tmp_path / ".saving-def").mkdir()
    (tmp_path / ".saving-def" / "model.safetensors").write_text("half", encoding="utf-8")
    (tmp_path / ".saving-of-another").write_text("being written", encoding="utf-8")
    with open(tmp_path / ".saving-of-another") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # which its writer lives to hold
        with atomic_path(tmp_path / "new") as first, appearing_at_once(tmp_path) as second:
            first.write_text("new", encoding="utf-8")
            write_json(tmp_path / "both.json", {})
            assert first.exists() and second.exists()
            expected = {first.name, second.name, ".saving-of-another", "both.json"}
            assert set(os.listdir(tmp_path)) == expected
    write_json(tmp_path / "last.json", {})
    assert set(os.listdir(tmp_path)) == {"new", "both.json", "last.json"}


def test_a_folder_is_one_run_s_own_until_it_is_dead(tmp_path):
    with held(tmp_path) as kill:
        with pytest.raises(HeadPruningError, match="Another run is writing to .*; wait for its end"):
            with alone_in(tmp_path):
                pass
        kill()  # what it has forked lives on
        with alone_in(tmp_path), alone_in(tmp_path):  # a process may take it again
            pass
    assert os.listdir(tmp_path) == []


def test_progress_comes_in_lines_where_nobody_watches(capsys, monkeypatch):
    options = bar_options()
    for _ in tqdm(range(3), desc="rounds", **{**options, "mininterval": 0}):
        pass
    for _ in tqdm(range(3), desc="inner", position=1, leave=False, **{**options, "mininterval": 0}):
        pass
    told = capsys.readouterr().err
    assert "\r" not in told and "\x1b" not in told
    assert [line for line in told.split("\n") if "3/3" in line][0].startswith("rounds: 100%")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert bar_options() == {}
