"""Weight pruners in fairseq-train, alone and beside head gates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_plugin.exporting.checkpoints import compact, export_compact, masked
from head_pruning import HeadMask, HeadPruningError
from head_pruning.cli import main
from head_pruning.schedules import cubic_density
from head_pruning.weights import load_weight_masks
from tests.fairseq.command_lines import DSP, PIPELINED, decoded
from tests.fairseq.exporting.test_export import _export, plain_user_dir
from tests.fairseq.files import read, same, same_training_state, session_of, weights_of, zeroed_by_hand
from tests.fairseq.in_process import in_process
from tests.fairseq.runner import PLUGIN, Runner, logged
from tests.fairseq.training import test_other_tasks
from tests.fairseq.training.test_precision_and_averaging import YAML
from tests.fairseq.training.test_training_output import validated
from tests.fairseq.training.test_two_ranks import record, run_two
from tests.few import few

# Of 14 updates: dense until 4, a mask every third until 10, at each from 11 on.
PLATON = "--weight-pruner platon --initial-threshold 1 --final-threshold 0.1 --warmup-steps 4 --initial-warmup 1 \
    --final-warmup 1 --beta1 0.85 --beta2 0.95 --deltaT 3"
UPDATES = 14
# Two layers each of width 16 and 24: 6 attentions and 4 feed-forward blocks, with biases.
PRUNED = 6 * 4 * (16 * 16 + 16) + 4 * (2 * 16 * 24 + 16 + 24)
KEPT = PRUNED - (int(PRUNED * 0.9) - 1)  # the weight at the threshold stays
# With 4 of 24 heads: those of the others do not count, and are zero.
LEFT = PRUNED - 20 * (4 * 4 * 16 + 3 * 4)
KEPT_OF_LEFT = LEFT - (int(LEFT * 0.9) - 1)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FOLDER = Path(__file__).parents[1] / "watched_weights"
WATCHED = f"{PLATON} --user-dir {FOLDER} --task translation_watched_weights --dropout 0"
english = test_other_tasks.text  # a fixture
SCHEDULE = "--initial-threshold 1 --final-threshold 0.2 --warmup-steps 6 --initial-warmup 1 --final-warmup 1"


def pruned_of(checkpoint) -> dict[str, torch.Tensor]:
    """The tensors that weight pruners choose by default."""
    return {name: value for name, value in weights_of(checkpoint).items() if name.split(".")[-2] in PROJECTIONS}


def nonzero(tensors: dict[str, torch.Tensor]) -> int:
    return sum(int(torch.count_nonzero(value)) for value in tensors.values())


def stored(checkpoint) -> dict:
    """What a checkpoint keeps of its weight pruners."""
    return read(checkpoint)["extra_state"]["head_pruning"]


@pytest.fixture(scope="module")
def platon(translation, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run with PLATON that saves and validates every 3 updates, and its output."""
    folder = tmp_path_factory.mktemp("platon")
    often = "--save-interval-updates 3 --validate-interval-updates 3"
    done = Runner(folder).run("train", validated(translation.train(folder / "run", PLATON, often, updates=UPDATES)))
    return folder / "run", done.out


def test_density_is_reached(platon):
    folder, out = platon
    last = folder / "checkpoint_last.pt"
    tensors = pruned_of(last)
    assert sum(value.numel() for value in tensors.values()) == PRUNED and nonzero(tensors) == KEPT
    others = {name: value for name, value in weights_of(last).items() if name not in tensors and "embed" in name}
    assert others and all(value[4:].all() for name, value in others.items() if name.endswith("tokens.weight"))
    expected = [cubic_density(t, initial=1.0, final=0.1, start=4, stop=10) for t in range(1, UPDATES + 1)]
    target = dict(zip(logged(out, "num_updates"), logged(out, "prune_target")))
    np.testing.assert_allclose([target[t + 1] for t in range(UPDATES)], expected, atol=1e-5)
    assert logged(out, "weights_kept")[-1] == pytest.approx(KEPT / PRUNED, abs=1e-6)


def test_best_checkpoint_is_one_at_the_target(platon):
    folder, out = platon
    # Update 9 has a mask of the cubic phase, and between masks the weights are all there.
    assert out.count("not a candidate for checkpoint_best") == 3
    assert nonzero(pruned_of(folder / "checkpoint_1_9.pt")) > KEPT
    assert nonzero(pruned_of(folder / "checkpoint_best.pt")) == KEPT


def test_files_beside_the_checkpoints(platon):
    folder, _ = platon
    masks, tensors = load_weight_masks(folder / "masks.safetensors"), pruned_of(folder / "checkpoint_last.pt")
    assert masks.keys() == tensors.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, tensors[name] != 0), name
    report = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
    assert report["weights"]["method"] == "platon" and report["weights"]["options"]["warmup_steps"] == 4
    assert report["weights"]["weights_kept"] == KEPT and report["weights"]["weights_total"] == PRUNED
    assert set(report) == {"method", "options", "sparsity", "history", "versions", "weights"}
    assert report["method"] == "platon" and {"head_pruning", "torch", "fairseq"} < set(report["versions"])
    assert [entry["updates"] for entry in report["history"]] == [6, 9, 12, 14]
    assert [entry["at_target"] for entry in report["history"]] == [False, False, True, True]
    assert f"{KEPT}" in (folder / "weight_density.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert (folder / "weight_density.png").stat().st_size > 10000


def test_inspect_tells_that_weights_were_pruned(platon, capsys):
    main(["inspect", str(platon[0] / "checkpoint_last.pt"), "--length", "5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "with pruned weights"
    kept = {"weights_kept": KEPT, "weights_total": PRUNED, "density": KEPT / PRUNED}
    assert found["weights"] == {"method": "platon", **kept}


@pytest.mark.slow
def test_plain_fairseq_decodes_checkpoint_and_export(platon, translation, runner, tmp_path):
    folder, _ = platon
    last, exported = folder / "checkpoint_last.pt", tmp_path / "masked.pt"
    assert f"{KEPT} of {PRUNED:,} weights" in masked(last, exported, None)
    same(read(exported)["model"], read(last)["model"])
    assert "head_pruning" not in read(exported)["extra_state"]
    assert read(exported)["cfg"]["task"]["_name"] == "translation"
    plain = translation.generate(last)
    plain[plain.index("--user-dir") + 1] = str(plain_user_dir(tmp_path / "plain_reader"))
    outputs = [runner.run("generate", line).out for line in (translation.generate(exported), plain)]
    assert decoded(outputs[0]) == decoded(outputs[1]) != {}

    # Between two masks the export is masked, and the checkpoint is not.
    between = shutil.copy(folder / "checkpoint_1_9.pt", tmp_path / "between.pt")
    state = read(between)
    state["model"]["encoder.layers.0.fc1.weight"] += 1.0
    del state["extra_state"]["head_pruning"]["norms"]  # which would tell
    torch.save(state, between)
    masked(between, exported, None)
    assert nonzero(pruned_of(exported)) == sum(
        int(np.unpackbits(mask.numpy()).sum()) for mask in stored(between)["masks"].values()
    )


@pytest.mark.slow
def test_validation_sees_masked_weights(runner, translation, platon, tmp_path):
    # Update 7 is between two masks: its checkpoint, and its export, must score what the log says.
    often = "--save-interval-updates 7 --validate-interval-updates 7"
    done = runner.run("train", validated(translation.train(tmp_path / "run", PLATON, often, updates=UPDATES)))
    checkpoint = tmp_path / "run" / "checkpoint_1_7.pt"
    assert nonzero(pruned_of(checkpoint)) == PRUNED
    masked(checkpoint, tmp_path / "masked.pt", None)
    losses = {}
    dense = zeroed_by_hand(checkpoint, tmp_path / "dense.pt")
    for name, path in (("pruned", checkpoint), ("masked", tmp_path / "masked.pt"), ("dense", dense)):
        line = translation.generate(path)
        options = "--valid-subset valid --max-tokens 90 --log-format json --task translation --cpu --num-workers 0"
        words = [translation.data, *line[line.index("--user-dir") :][:2], "--path", path, *options.split()]
        again = runner.run("validate", [*words, "--required-batch-size-multiple", "1"]).out
        losses[name] = logged(again, "valid_loss")[-1]
    assert logged(done.out, "valid_loss")[0] == losses["pruned"] == losses["masked"] != losses["dense"]
    # Validation leaves no trace in training.
    same(pruned_of(tmp_path / "run" / "checkpoint_last.pt"), pruned_of(platon[0] / "checkpoint_last.pt"))


@pytest.mark.parametrize(
    "options, stops",
    [
        # In the middle of a window.
        pytest.param(f"--weight-pruner platon {SCHEDULE} --beta2 0.95 --deltaT 3", (11,), id="platon"),
        pytest.param(
            f"--weight-pruner movement {SCHEDULE} --deltaT 2 --mask-policy nested {DSP}",
            (13,),
            id="nested",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--weight-pruner gradual_magnitude --target-sparsity 0.8 --pruning-frequency 4 --policy-end-step 15 "
            "--threshold-decay 0.1",
            (14,),
            id="retained",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resumed_run_ends_bit_equal(runner, translation, tmp_path, options, stops):
    whole = tmp_path / "whole"
    every = f"--save-interval-updates {stops[0]}"
    runner.run("train", translation.train(whole, options, every, updates=26))
    for stop in stops:
        again = f"{options} --restore-file {next(whole.glob(f'checkpoint_*_{stop}.pt'))}"
        runner.run("train", translation.train(tmp_path / str(stop), again, updates=26))
        first, second = whole / "checkpoint_last.pt", tmp_path / str(stop) / "checkpoint_last.pt"
        same_training_state(first, second)
        same(stored(first), stored(second))
        assert stored(first)["tensors"]


@pytest.mark.slow
def test_killed_run_goes_on(runner, translation, tmp_path):
    options = f"--weight-pruner platon {SCHEDULE} --deltaT 4"
    runner.run("train", translation.train(tmp_path / "whole", options, updates=26))
    line = translation.train(tmp_path / "killed", options, "--save-interval-updates 10", updates=26)
    report = tmp_path / "killed" / "weight_density.png"  # the last file written beside the checkpoint of update 10
    runner.start("train", line).kill_once(report.exists)
    assert stored(tmp_path / "killed" / "checkpoint_last.pt")["session"]["platon.progress"][0] == 10
    runner.run("train", line)
    first, second = (tmp_path / name / "checkpoint_last.pt" for name in ("whole", "killed"))
    same_training_state(first, second)
    same(stored(first), stored(second))


@pytest.mark.slow
def test_two_ranks_draw_the_same_masks(runner, translation, tmp_path):
    run_two(runner, translation.train(tmp_path / "two", WATCHED, updates=UPDATES), tmp_path / "watch")
    for update in range(UPDATES):
        mine, other = (record(tmp_path / "watch", rank, update) for rank in (0, 1))
        assert mine.keys() == other.keys() and "platon.average.decoder.layers.0.fc2.weight" in mine
        for name in mine:
            assert np.array_equal(mine[name], other[name]), (update, name)
    last = tmp_path / "two" / "checkpoint_last.pt"
    assert nonzero(pruned_of(last)) == KEPT

    one = translation.train(tmp_path / "one", PLATON, "--dropout 0 --update-freq 2", updates=UPDATES)
    runner.run("train", one)
    alone = pruned_of(tmp_path / "one" / "checkpoint_last.pt")
    differ = sum(int(((alone[name] != 0) != (value != 0)).sum()) for name, value in pruned_of(last).items())
    assert differ < 0.02 * PRUNED  # sums in another order


@pytest.mark.slow
def test_two_ranks_resume(runner, translation, tmp_path):
    first = translation.train(tmp_path / "two", WATCHED, "--save-interval-updates 7", updates=UPDATES)
    run_two(runner, first, tmp_path / "watch")
    again = f"{WATCHED} --restore-file {next((tmp_path / 'two').glob('*_7.pt'))}"
    run_two(runner, translation.train(tmp_path / "again", again, updates=UPDATES), tmp_path / "watch")
    last, resumed = (tmp_path / name / "checkpoint_last.pt" for name in ("two", "again"))
    same_training_state(last, resumed)
    same(stored(last), stored(resumed))


def test_heads_and_weights_in_one_run(runner, translation, tmp_path, capsys):
    average = "--store-ema --ema-decay 0.5"
    done = runner.run("train", translation.train(tmp_path / "run", DSP, PLATON, average, updates=UPDATES))
    last = tmp_path / "run" / "checkpoint_last.pt"
    mask = HeadMask.load(tmp_path / "run" / "masks.safetensors")
    assert mask.kept == 4 and nonzero(pruned_of(last)) == KEPT_OF_LEFT
    assert not any("platon" in name for name in session_of(last))
    report = json.loads((tmp_path / "run" / "pruning.json").read_text(encoding="utf-8"))
    assert report["heads_kept"] == 4 and report["method"] == "dsp+platon"
    numbers = {"weights_kept": KEPT_OF_LEFT, "weights_total": LEFT, "density": KEPT_OF_LEFT / LEFT}
    numbers |= {"weights_of_dense": PRUNED, "density_of_dense": KEPT_OF_LEFT / PRUNED}
    assert {name: report["weights"][name] for name in numbers} == numbers
    assert logged(done.out, "weights_kept")[-1] == pytest.approx(KEPT_OF_LEFT / LEFT, abs=1e-6)
    assert logged(done.out, "weights_kept_of_all")[-1] == pytest.approx(KEPT_OF_LEFT / PRUNED, abs=1e-6)
    last_line = next(line for line in reversed(done.out.splitlines()) if line.startswith("all ") and "." in line)
    assert last_line.split()[1:3] == [str(KEPT_OF_LEFT), str(LEFT)] and last_line.split()[4] == str(PRUNED)
    main(["inspect", str(last), "--length", "5", "--json"])
    assert json.loads(capsys.readouterr().out)["weights"] == {"method": "platon", **numbers}

    done = _export(last, tmp_path / "masked.pt")
    words = f"4 of 24 heads, {KEPT_OF_LEFT} of {LEFT:,} weights of what is left"
    assert done.returncode == 0 and words in done.stdout, done.stderr
    assert words in compact(last, tmp_path / "compact.pt", None)
    assert nonzero(pruned_of(tmp_path / "compact.pt")) == nonzero(pruned_of(tmp_path / "masked.pt")) == KEPT_OF_LEFT
    assert sum(value.numel() for value in pruned_of(tmp_path / "compact.pt").values()) == LEFT
    exported = read(tmp_path / "masked.pt")
    own = {n: v for n, v in exported["model"].items() if not n.endswith(("version", "output_projection.weight"))}
    assert nonzero(own) == report["weights"]["nonzero_parameters"]
    weights, masks = exported["extra_state"]["ema"], load_weight_masks(tmp_path / "run" / "masks.safetensors")
    assert not any(weights[name][~keep].any() for name, keep in masks.items())
    assert read(last)["extra_state"]["ema"]["encoder.layers.0.fc1.weight"][~masks["encoder.layers.0.fc1.weight"]].any()
    outputs = [runner.run("generate", translation.generate(path)).out for path in (last, tmp_path / "masked.pt")]
    assert decoded(outputs[0]) == decoded(outputs[1]) != {}


@pytest.mark.slow
def test_weights_of_a_compact_model(runner, translation, tmp_path):
    runner.run("train", translation.train(tmp_path / "heads", DSP, PLATON, updates=UPDATES))
    compact = tmp_path / "compact.pt"
    export_compact(tmp_path / "heads" / "checkpoint_last.pt", compact)
    left = sum(value.numel() for value in pruned_of(compact).values())
    assert left < PRUNED and 0 < nonzero(pruned_of(compact)) < KEPT
    options = f"{PLATON} --finetune-from-model {compact} --final-threshold 0.02"
    runner.run("train", translation.train(tmp_path / "run", options, updates=UPDATES))
    last = tmp_path / "run" / "checkpoint_last.pt"
    masks = load_weight_masks(tmp_path / "run" / "masks.safetensors")
    number = sum(mask.numel() for mask in masks.values())
    assert 0 < number <= left and nonzero(masks) == number - (int(number * 0.98) - 1)
    assert all(not pruned_of(last)[name][~keep].any() for name, keep in masks.items())


@pytest.mark.slow
def test_lock_keeps_the_zeros(runner, translation, platon, tmp_path):
    start = platon[0] / "checkpoint_last.pt"
    options = f"--finetune-from-model {start} --weight-pruner lock --save-interval-updates 4"
    runner.run("train", translation.train(tmp_path / "run", options, updates=8))
    before = pruned_of(start)
    for name, value in pruned_of(tmp_path / "run" / "checkpoint_last.pt").items():
        assert torch.equal(value != 0, before[name] != 0), name
    assert not torch.equal(value, before[name])
    again = options.replace(f"--finetune-from-model {start}", f"--restore-file {tmp_path}/run/checkpoint_1_4.pt")
    runner.run("train", translation.train(tmp_path / "again", again, updates=8))
    same_training_state(tmp_path / "run" / "checkpoint_last.pt", tmp_path / "again" / "checkpoint_last.pt")

    plain = f"--finetune-from-model {start}"
    done = runner.run("train", translation.train(tmp_path / "plain", plain, updates=2))
    assert "--weight-pruner lock keeps them" in done.out
    assert nonzero(pruned_of(tmp_path / "plain" / "checkpoint_last.pt")) > KEPT


@pytest.mark.slow
def test_short_schedule_still_ends_at_the_density(runner, translation, tmp_path):
    done = runner.run("train", translation.train(tmp_path / "run", PLATON, "--final-warmup 0", updates=UPDATES))
    assert "training ended before the schedule of platon did" in done.out
    assert nonzero(pruned_of(tmp_path / "run" / "checkpoint_last.pt")) == KEPT


class HalfPrecision:
    """fairseq-train's loop in this process, on a CPU that answers for a GPU where fairseq asks for one."""

    def __init__(self, monkeypatch, line) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # of a norm after an overflow
        self.trainer, epoch = in_process(line)
        self.session = self.trainer.task.session
        self.trainer.task.begin_epoch(1, self.trainer.get_model())
        self.batches = iter(epoch.next_epoch_itr(shuffle=False))

    def update(self) -> None:
        self.trainer.train_step([next(self.batches)])

    def masters(self) -> dict[str, torch.Tensor]:
        return {target.name: self.session.master_of(target.parameter) for target in self.session.pruners[0].targets}


@pytest.mark.parametrize("flags", few(["--fp16 --fp16-no-flatten-grads", "--fp16"], "--fp16"))
def test_half_precision_prunes_the_master_weights(monkeypatch, translation, tmp_path, flags):
    options = f"{PLATON} {flags} --fp16-init-scale 4 --min-loss-scale 1e-6 --clip-norm 0.5"
    run = HalfPrecision(monkeypatch, translation.train(tmp_path, options, updates=UPDATES))
    state = run.session.pruners[0].storage.state
    for t in range(1, UPDATES + 1):
        run.update()
        masters = run.masters()
        assert all(master.dtype == torch.float32 for master in masters.values())
        if t % 3 == 0 and t < 11:  # a new window; the scores are of the gradients that the optimizer used
            norm = torch.stack([master.grad.norm() for master in masters.values()]).norm()
            assert 0 < norm <= 0.5
        if t == 3:
            for name, master in masters.items():
                assert torch.equal(state["window"][name], (master * master.grad).abs()), name
    assert nonzero(masters) == KEPT
    for target in run.session.pruners[0].targets:
        assert torch.equal(masters[target.name].half(), target.parameter), target.name
    # These are the tensors that the optimizer steps.
    steps = run.trainer.optimizer.fp32_optimizer.params
    assert {master.untyped_storage().data_ptr() for master in masters.values()} <= {
        parameter.untyped_storage().data_ptr() for parameter in steps
    }


@pytest.mark.slow
def test_overflow_skips_the_pruner_too(monkeypatch, translation, tmp_path):
    options = f"{PLATON} --fp16 --fp16-no-flatten-grads --fp16-init-scale 1000000"
    run = HalfPrecision(monkeypatch, translation.train(tmp_path, options, updates=UPDATES))
    for _ in range(UPDATES):
        run.update()
    done = run.trainer.get_num_updates()
    assert 0 < done < UPDATES and run.session.pruners[0].t == done


@pytest.mark.parametrize("flags", few(["--memory-efficient-fp16", ""], "--memory-efficient-fp16"))
def test_other_precisions_reach_the_density(monkeypatch, translation, tmp_path, flags):
    line = translation.train(tmp_path, PLATON, flags, "--fp16-init-scale 4 --min-loss-scale 1e-6", updates=UPDATES)
    run = HalfPrecision(monkeypatch, line)
    for _ in range(UPDATES):
        run.update()
    assert run.session.master_of is None
    pruned = {target.name: target.parameter.detach() for target in run.session.pruners[0].targets}
    assert nonzero(pruned) <= KEPT and nonzero(run.session.pruners[0].weight_masks()) == KEPT


@pytest.mark.slow
def test_bfloat16_through_hydra(runner, translation, tmp_path):
    (tmp_path / "config").mkdir()
    config = YAML.format(plugin=PLUGIN, data=translation.data, save_dir=tmp_path / "run")
    (tmp_path / "config" / "prune.yaml").write_text(config.lstrip(), encoding="utf-8")
    place = ["--config-dir", tmp_path / "config", "--config-name", "prune", f"hydra.run.dir={tmp_path / 'hydra'}"]
    options = {"weight_pruner": "platon", "final_threshold": 0.1, "pruner_warmup_steps": 4, "final_warmup": 1}
    more = [f"+task.{name}={value}" for name, value in options.items()]
    runner.run("hydra-train", [*place, *more, "common.bf16=true", f"optimization.max_update={UPDATES}"])
    last = tmp_path / "run" / "checkpoint_last.pt"
    assert nonzero(pruned_of(last)) == KEPT_OF_LEFT and HeadMask.load(tmp_path / "run" / "masks.safetensors").kept == 4


@pytest.mark.slow
def test_language_model(runner, english, tmp_path):
    model = "--arch transformer_lm --decoder-layers 3 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 \
        --decoder-attention-heads 4 --share-decoder-input-output-embed"
    options = f"{PLATON} --no-prune-biases --weight-selection tensor --max-update {UPDATES}"
    runner.run(
        "train", test_other_tasks.command(english, tmp_path / "run", "language_modeling_head_pruning", model, options)
    )
    for name, value in pruned_of(tmp_path / "run" / "checkpoint_last.pt").items():
        if name.endswith("weight"):
            assert int((value == 0).sum()) == int(0.9 * value.numel()) - 1, name


@pytest.mark.parametrize(
    "options, words",
    [
        ("--final-threshold 0.1", "--final-threshold belongs to"),
        pytest.param("--warmup-steps 10", "--pruner-warmup-steps belongs to", marks=pytest.mark.slow),
        pytest.param(
            "--weight-pruner magnitude --beta1 0.5", "the pruner of weights is magnitude", marks=pytest.mark.slow
        ),
        pytest.param(
            "--weight-pruner lock --no-prune-biases --target-sparsity 0.5",
            "--target-sparsity belongs to",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--weight-pruner dsp",
            "dsp is none of the methods that prune weights; choose it with --pruner dsp",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--weight-pruner plato",
            "no pruner of weights plato; choose one of custom_mask, gradual_magnitude, lock",
            marks=pytest.mark.slow,
        ),
        pytest.param("--pruner PLATON", "choose it with --weight-pruner", marks=pytest.mark.slow),
        pytest.param(f"{PLATON} --final-threshold 10", "remaining ratio", marks=pytest.mark.slow),
        (f"{PLATON} --final-threshold 10 --encoder-attention-heads 5", "remaining ratio"),  # before a model is built
        (f"{PLATON} {PIPELINED}", "add --joint-pruning"),
        (f"{PLATON} --ddp-backend slowmo", "not pruned with --ddp-backend slowmo"),
        (f"{PLATON} --ddp-backend fully_sharded", "not pruned with --ddp-backend fully_sharded"),
        (f"{DSP} --ddp-backend fully_sharded", "not pruned with --ddp-backend fully_sharded"),
    ],
)
def test_bad_options(translation, tmp_path, options, words):
    with pytest.raises(HeadPruningError, match=words):
        in_process(translation.train(tmp_path / "run", options, updates=30))


@pytest.mark.parametrize(
    "options, words",
    [
        pytest.param("--weight-pruner lock", "no checkpoint was loaded", marks=pytest.mark.slow),
        (f"{PLATON} --restore-file HERE", "trained with movement, this run uses platon"),
        pytest.param(f"{DSP} --restore-file HERE", "this run uses no such method", marks=pytest.mark.slow),
    ],
)
def test_refused(runner, translation, platon, tmp_path, options, words):
    state = read(platon[0] / "checkpoint_last.pt")
    state["extra_state"]["head_pruning"]["pruners"] = ["movement"]
    torch.save(state, tmp_path / "other.pt")
    line = translation.train(tmp_path / "run", options.replace("HERE", str(tmp_path / "other.pt")), updates=30)
    assert words in runner.fail("train", line)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.slow
def test_pruned_heads_are_not_brought_back(runner, translation, tmp_path):
    runner.run("train", translation.train(tmp_path / "heads", DSP, updates=8))
    options = f"{PLATON} --finetune-from-model {tmp_path / 'heads' / 'checkpoint_last.pt'}"
    assert "would bring them back" in runner.fail("train", translation.train(tmp_path / "run", options))
    line = translation.train(tmp_path / "both", options, DSP, updates=UPDATES)
    runner.run("train", line)
    assert nonzero(pruned_of(tmp_path / "both" / "checkpoint_last.pt")) == KEPT_OF_LEFT


def test_flags_that_fairseq_has_too(translation, tmp_path):
    line = translation.train(
        tmp_path, PLATON, "--optimizer adafactor --lr-scheduler tri_stage --pruner-warmup-steps 3 --pruner-beta1 0.5"
    )
    gone = {"--adam-betas": 2, "--warmup-updates": 2}
    for flag, words in gone.items():
        del line[line.index(flag) : line.index(flag) + words]
    trainer, _ = in_process(line)
    config = trainer.task.session.pruners[0].config
    assert (config.warmup_steps, config.beta1, config.beta2, config.deltaT) == (3, 0.5, 0.95, 3)
    assert trainer.cfg.lr_scheduler.warmup_steps == 4 and trainer.cfg.optimizer.beta1 == 0.85
