"""Full and read-only disks, leftovers of killed runs, and two runs in one folder."""

import os

import pytest
from fairseq import checkpoint_utils

from head_pruning import HeadPruningError
from head_pruning.cli import main
from tests.disks import held, no_file_above, read_only
from tests.fairseq.command_lines import DSP
from tests.fairseq.in_process import in_process


@pytest.fixture(scope="module")
def run(translation, tmp_path_factory):
    """A trainer before its first update, its iterator, and the checkpoint that it has written."""
    folder = tmp_path_factory.mktemp("disks") / "run"
    trainer, iterator = in_process(translation.train(folder, DSP, "--save-interval-updates 1"))
    trainer.begin_epoch(1)
    iterator.next_epoch_itr(shuffle=False)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, None)
    return trainer, iterator, folder / "checkpoint_last.pt"


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_checkpoint_before(run):
    trainer, iterator, last = run
    before = contents(last.parent)
    with no_file_above(20000), pytest.raises(HeadPruningError, match="checkpoint_1_0.pt cannot be written") as error:
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, None)
    assert "\n" not in str(error.value) and contents(last.parent) == before


def test_a_copy_that_a_full_disk_cuts_off_leaves_the_checkpoint_before(run, tmp_path):
    _, _, last = run
    (tmp_path / "checkpoint_last.pt").write_text("older", encoding="utf-8")
    copy = str(tmp_path / "checkpoint_last.pt")
    with no_file_above(20000), pytest.raises(HeadPruningError, match="checkpoint_last.pt cannot be written"):
        checkpoint_utils.PathManager.copy(str(last), copy, overwrite=True)
    assert contents(tmp_path) == {"checkpoint_last.pt": b"older"}
    assert checkpoint_utils.PathManager.copy(str(last), copy, overwrite=True)
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == last.read_bytes()


@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_an_export_to_a_full_disk_is_told(run, tmp_path, kind):
    with (
        no_file_above(20000),
        pytest.raises(SystemExit, match=r"^error: .*out.pt cannot be written \(.*\); make room"),
    ):
        main(["export", str(run[2]), str(tmp_path / "out.pt"), "--to", kind])
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(HeadPruningError, match="cannot be written"):
            checkpoint_utils.verify_checkpoint_directory(str(folder))
    with read_only(tmp_path), pytest.raises(HeadPruningError, match=r"run cannot be written \(Permission denied\)"):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "run"))


def test_what_a_killed_run_left_goes_with_the_next_checkpoint(run):
    trainer, iterator, last = run
    (last.parent / ".saving-x-checkpoint_1_40.pt").write_text("half", encoding="utf-8")
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, None)
    assert not [name for name in os.listdir(last.parent) if name.startswith(".")]


def test_a_second_run_in_one_folder_is_refused(translation, runner, tmp_path):
    line = translation.train(tmp_path / "run", DSP)
    with held(tmp_path / "run"):
        assert "Another run is writing to" in runner.fail("train", line)
    assert os.listdir(tmp_path / "run") == []
