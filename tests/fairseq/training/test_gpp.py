"""GPP and DFD in fairseq: heads and feed-forward units fade out together, runs that were stopped, what is left."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.dataclass import FairseqDataclass

from fairseq_plugin.exporting.checkpoints import export_compact, export_masked
from fairseq_plugin.host import load
from fairseq_plugin.options import pruning_config, refuse_other_options
from head_pruning import HeadPruningError
from head_pruning.surgery.remaining import heads_left
from tests.fairseq.command_lines import decoded, same_decoding
from tests.fairseq.files import mask_beside, read, same, same_training_state, session_of, weights_of
from tests.fairseq.runner import Runner, logged
from tests.fairseq.training.test_distillation import write
from tests.fairseq.training.test_two_ranks import WEIGHTS, record, run_two

EPOCH = 16  # updates
#: Pruning begins with update 2 and ends with update 6 of 8.
GPP = f"--pruner gpp --target-sparsity 0.5 --prepruning-finetune-epochs {2 / EPOCH} --prune-epochs {4 / EPOCH} \
    --retrain-lr-factor 0.5 --save-interval-updates 1 --keep-interval-updates 9"


def learning(translation, folder) -> str:
    """Options that learn from a teacher, which is written."""
    teacher = write(translation.train(folder, "--seed 5"), folder / "teacher.pt")
    return f"--distill dfd --teacher-path {teacher} --window-size 2"


@pytest.fixture(scope="module")
def whole(translation, tmp_path_factory):
    """The folder of a run with a teacher, its options and its output."""
    folder = tmp_path_factory.mktemp("gpp")
    options = f"{GPP} {learning(translation, folder)}"
    done = Runner(folder).run("train", translation.train(folder / "run", options))
    return folder / "run", options, done.out


def test_a_half_that_earlier_versions_stored_as_0():
    options = vars(pruning_config(FairseqDataclass, "Options", __name__)()) | {"pruner": "gpp"}
    stored = {"target_sparsity": 0.0}
    refuse_other_options("last.pt", ["gpp"], stored, SimpleNamespace(**options))
    with pytest.raises(HeadPruningError, match="last.pt was pruned with --target-sparsity 0.0, this run has .* 0.5"):
        refuse_other_options("last.pt", ["gpp"], stored, SimpleNamespace(**options | {"target_sparsity": 0.5}))


def test_sums_of_the_published_gradients_are_refused_before_training(runner, translation, tmp_path):
    words = translation.train(tmp_path / "run", f"{GPP} --published-gradients")
    assert "--published-gradients adds up gradients of a mean loss that is not scaled" in runner.fail("train", words)
    assert not list((tmp_path / "run").glob("*.pt"))  # an error in an update leaves a crash checkpoint


def test_three_phases(whole):
    folder, _, out = whole
    seen = [session_of(folder / f"checkpoint_1_{update}.pt") for update in range(1, 9)]
    fading = [int((state["gpp.z"] < 1).sum()) for state in seen]
    assert fading[:3] == [0, 0, 0] and 0 < fading[4] < fading[6] == fading[7] == 12 + 48
    assert [int(state["gpp.steps_above_0"].max()) for state in seen] == [0, 0, 1, 2, 3, 4, 5, 5]
    assert logged(out, "sparsity")[-2:] == [0.5, 0.5] and logged(out, "lr_factor")[-3:] == [1.0, 0.5, 0.5]
    lost = logged(out, "dfd_hidden_loss")
    assert len(lost) >= 7 and 0 < lost[-1] < lost[0]


def test_a_run_from_the_weights_of_another_prunes_anew(whole, translation, runner, tmp_path):
    """By its own options: neither the sums nor the schedule of the run before are gone on with."""
    start = f"--pruner gpp --prune-epochs {2 / EPOCH} --finetune-from-model {whole[0] / 'checkpoint_last.pt'}"
    runner.run("train", translation.train(tmp_path / "run", start, updates=4))
    state = session_of(tmp_path / "run" / "checkpoint_last.pt")
    assert state["gpp.place"].tolist() == [3, 0.5, 0, 2] and state["gpp.steps_above_0"].max() == 3


@pytest.mark.parametrize(
    "stopped", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_in_any_phase_ends_bit_equal(whole, translation, runner, tmp_path, stopped):
    folder, options, _ = whole
    (tmp_path / "run").mkdir()
    shutil.copy(folder / f"checkpoint_1_{stopped}.pt", tmp_path / "run" / "checkpoint_last.pt")
    runner.run("train", translation.train(tmp_path / "run", options))
    last = [place / "checkpoint_last.pt" for place in (folder, tmp_path / "run")]
    same_training_state(*last)
    first, second = (read(path)["extra_state"]["head_pruning"] for path in last)
    same(first, second)


@pytest.mark.slow
def test_what_is_left_is_exported(whole, translation, runner, tmp_path):
    last = whole[0] / "checkpoint_last.pt"
    mask = mask_beside(last)
    assert mask.counts() == {"heads": (12, 24), "units": (48, 96)}
    export_masked(last, tmp_path / "masked.pt")
    export_compact(last, tmp_path / "compact.pt")
    small = load(tmp_path / "compact.pt").model
    assert np.array_equal(heads_left(small).keep, mask.keep)
    ours, theirs, gated = (
        decoded(runner.run("generate", translation.generate(path)).out)
        for path in (tmp_path / "compact.pt", tmp_path / "masked.pt", last)
    )
    same_decoding(ours, theirs)
    same_decoding(ours, gated)
    fc1 = torch.load(last, weights_only=True)["model"]["encoder.layers.0.fc1.weight"]
    assert len(fc1) == 24 > small.encoder.layers[0].fc1.out_features


@pytest.mark.slow
def test_two_ranks_are_as_one(translation, runner, tmp_path):
    gpp = "--pruner gpp --prepruning-finetune-epochs 0.25 --prune-epochs 0.5 --retrain-lr-factor 0.5"
    options, updates = f"{gpp} {learning(translation, tmp_path)} --dropout 0", 8
    watched = f"{options} --user-dir {WEIGHTS} --task translation_watched_weights"
    run_two(runner, translation.train(tmp_path / "two", watched, updates=updates), tmp_path / "watch")
    for update in range(updates):
        mine, other = (record(tmp_path / "watch", rank, update) for rank in (0, 1))
        assert mine.keys() == other.keys() and all(np.array_equal(mine[name], other[name]) for name in mine), update
    runner.run("train", translation.train(tmp_path / "one", options, "--update-freq 2", updates=updates))
    two, one = (tmp_path / name / "checkpoint_last.pt" for name in ("two", "one"))
    ours, theirs = session_of(two), session_of(one)
    assert set(ours["gpp.z"]) == {0.0, 1.0} and np.array_equal(ours["gpp.z"], theirs["gpp.z"])
    np.testing.assert_allclose(ours["gpp.learnt"], theirs["gpp.learnt"], rtol=1e-3, atol=1e-4)
    weights = weights_of(one)
    for name, value in weights_of(two).items():
        np.testing.assert_allclose(value, weights[name], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("method, kept", [
    ("head_sensitivity --num-of-heads 40 --joint-pruning --count-schedule 0:2", 40),
    pytest.param("subset --num-of-heads 40 --joint-pruning --count-schedule 0:2", 40, marks=pytest.mark.slow),
    pytest.param("ste --num-of-heads 40 --joint-pruning", 40, marks=pytest.mark.slow),
])  # fmt: skip
def test_other_methods_prune_units_as_they_do_heads(method, kept, translation, runner, tmp_path):
    runner.run("train", translation.train(tmp_path, f"--pruner {method} --prune-units both", updates=3))
    counts = mask_beside(tmp_path / "checkpoint_last.pt").counts()
    assert all(0 < count < total for count, total in counts.values()) and len(counts) == 2
    assert sum(count for count, _ in counts.values()) == kept
