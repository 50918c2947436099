"""--save-at in fairseq: many sizes from one training."""

import json
import shutil

import pytest
import torch

from fairseq_plugin.host import load
from head_pruning import HeadMask
from head_pruning.report.runs import find_runs
from head_pruning.surgery.remaining import heads_left
from tests.fairseq.command_lines import decoded, same_decoding
from tests.fairseq.files import read, same_training_state
from tests.fairseq.runner import PLUGIN, Runner, logged
from tests.fairseq.training.test_two_ranks import run_two
from tests.few import few

COUNTS = (24, 12, 4)
SIZES = "--num-of-heads 4 --joint-pruning --save-at 24,12,4 --finetune-updates 2 --save-interval-updates 1 \
    --keep-interval-updates 20"


@pytest.fixture(scope="module")
def whole(translation, tmp_path_factory):
    """The folder of a run, its command line, and its validation losses by the number of updates."""
    folder = tmp_path_factory.mktemp("sizes")
    line = [word for word in translation.train(folder / "run", SIZES, updates=12) if word != "--disable-validation"]
    out = Runner(folder).run("train", line).out
    return folder / "run", line, dict(zip(logged(out, "valid_num_updates"), logged(out, "valid_loss")))


def validate(translation, path):
    words = "--valid-subset valid --max-tokens 90 --cpu --num-workers 0 --log-format json"
    return [translation.data, "--path", path, "--user-dir", PLUGIN, "--task", "translation", *words.split()]


def weights(folder):
    return {count: read(folder / "sizes" / f"heads{count}" / "checkpoint_last.pt")["model"] for count in COUNTS}


def test_each_count_leaves_a_compact_checkpoint_that_decodes_and_was_scored(whole, translation, runner, tmp_path):
    folder, _, scores = whole
    masks = []
    for count, updates in zip(COUNTS, (2, 7, 12)):
        size = folder / "sizes" / f"heads{count}"
        results, report = (json.loads((size / name).read_text()) for name in ("all_results.json", "pruning.json"))
        assert results["heads_kept"] == report["heads_kept"] == count and results["updates"] == updates
        masks.append(HeadMask.load(size / "masks.safetensors").keep)
        state = read(size / "checkpoint_last.pt")
        assert state["optimizer_history"][-1]["num_updates"] == updates and "last_optimizer_state" not in state
        model = load(size / "checkpoint_last.pt").model
        assert heads_left(model).kept == count
        assert sum(each.numel() for each in model.parameters()) == report["sparsity"]["compact_parameters"]
        assert results["loss"] == scores[updates]
        if count != 12:
            continue
        # The masked checkpoint of the same update decodes and scores the same.
        masked = folder / f"checkpoint_1_{updates}.pt"
        lines = (translation.generate(path) for path in (masked, size / "checkpoint_last.pt"))
        same_decoding(*(decoded(runner.run("generate", line).out) for line in lines))
        lines = (validate(translation, path) for path in (masked, size / "checkpoint_last.pt"))
        losses = [logged(runner.run("validate", line).out, "valid_loss")[-1] for line in lines]
        assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert all((small <= large).all() for large, small in zip(masks, masks[1:]))
    runs = {run.folder.name: run for run in find_runs([folder])}
    assert {"run", "heads24", "heads12", "heads4"} <= runs.keys()


@pytest.mark.parametrize("stopped", few([1, 7, 9], 7))
def test_a_run_that_was_stopped_in_any_stage_leaves_the_same_sizes(whole, translation, runner, tmp_path, stopped):
    """At a count's last update too: its model is made when training goes on."""
    folder, line, _ = whole
    (tmp_path / "run").mkdir()
    shutil.copy(folder / f"checkpoint_1_{stopped}.pt", tmp_path / "run" / "checkpoint_last.pt")
    runner.run("train", [tmp_path / "run" if word == folder else word for word in line])
    same_training_state(folder / "checkpoint_last.pt", tmp_path / "run" / "checkpoint_last.pt")
    theirs = weights(folder)
    made = [count for count, updates in zip(COUNTS, (2, 7, 12)) if updates >= stopped]
    for count in made:
        mine = read(tmp_path / "run" / "sizes" / f"heads{count}" / "checkpoint_last.pt")["model"]
        assert mine.keys() == theirs[count].keys()
        assert all(torch.equal(mine[name], theirs[count][name]) for name in mine)
    assert len(list((tmp_path / "run" / "sizes").iterdir())) == len(made)


def test_nothing_can_be_saved_where_nothing_is_to_be_saved(translation, runner, tmp_path):
    line = translation.train(tmp_path / "run", SIZES, "--no-save", updates=12)
    assert "--save-at saves models and --no-save saves none; drop one of them" in runner.fail("train", line)


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param("--max-update 18 --patience 1 --validate-interval-updates 1 --lr 2", id="patience"),
        pytest.param(
            "--max-update 0 --max-epoch 1 --save-interval 2 --save-interval-updates 0",
            id="epochs",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_k_is_saved_however_training_ends(translation, runner, tmp_path, ends):
    line = [word for word in translation.train(tmp_path / "run", SIZES, ends) if word != "--disable-validation"]
    runner.run("train", line)
    found = tmp_path / "run" / "sizes" / "heads4"
    assert HeadMask.load(found / "masks.safetensors").kept == 4
    done = json.loads((found / "all_results.json").read_text())["updates"]
    assert done < 18 and heads_left(load(found / "checkpoint_last.pt").model).kept == 4


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [("", SIZES), (SIZES, ""), (SIZES, SIZES.replace("24,12", "20,10"))])
def test_a_run_from_the_weights_of_another_has_its_own_sizes(translation, runner, tmp_path, before, after):
    """Logits of gates are taken over, schedules are not."""
    ste = "--num-of-heads 4 --joint-pruning --use-ste"
    runner.run("train", translation.train(tmp_path / "first", f"{ste} {before}", updates=12))
    start = f"{ste} {after} --finetune-from-model {tmp_path / 'first' / 'checkpoint_last.pt'}"
    runner.run("train", translation.train(tmp_path / "second", start, updates=12))
    counts = {"": set(), SIZES: {"heads24", "heads12", "heads4"}}.get(after, {"heads20", "heads10", "heads4"})
    sizes = tmp_path / "second" / "sizes"
    assert {path.name for path in sizes.glob("*")} == counts


@pytest.mark.slow
def test_two_ranks_leave_the_same_sizes_as_one(translation, runner, tmp_path):
    run_two(runner, translation.train(tmp_path / "two", SIZES, "--dropout 0", updates=12), tmp_path / "watch")
    runner.run("train", translation.train(tmp_path / "one", SIZES, "--dropout 0 --update-freq 2", updates=12))
    masks = [
        [HeadMask.load(tmp_path / name / "sizes" / f"heads{count}" / "masks.safetensors") for count in COUNTS]
        for name in ("two", "one")
    ]
    assert masks[0] == masks[1]
    for count in COUNTS:
        mine, theirs = weights(tmp_path / "two")[count], weights(tmp_path / "one")[count]
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], atol=5e-3, rtol=1e-2)
