"""--save-at in the scripts of transformers: many sizes from one training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from head_pruning import HeadMask, HeadPruningError
from head_pruning.report.runs import find_runs
from hf_plugin.command_line.arguments import parse
from hf_plugin.glue.run import run
from hf_plugin.training.callback import HeadPruningCallback
from tests.few import few
from tests.hf.script_runs import TINY, write_place

LINE = "--task_name MNLI --data_dir data/MNLI --model_name_or_path bert-base-uncased --do_train --do_eval".split()
LINE += [*TINY, "--max_steps", "16", "--num_of_heads", "4", "--joint_pruning", "--save_steps", "3"]
LINE += ["--logging_steps", "1", "--save_at", "24,12,4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("sizes"))


def glue(folder, *more):
    return run(parse([*LINE, "--output_dir", folder, *more], "run_glue"))


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "sizes").rglob("*"))
        if path.suffix == ".safetensors"
    }


def test_each_count_leaves_a_compact_model_that_is_the_one_that_was_scored(here):
    glue("whole")
    masks, sizes = [], []
    for count in (24, 12, 4):
        folder = here / "whole" / "sizes" / f"heads{count}"
        results, report = (json.loads((folder / name).read_text()) for name in ("all_results.json", "pruning.json"))
        assert results["heads_kept"] == report["heads_kept"] == count and report["method"] == "head_sensitivity"
        mask = HeadMask.load(folder / "masks.safetensors")
        assert mask.kept == count
        masks.append(mask.keep)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        line = ["--model_name_or_path", str(folder), "--output_dir", f"again{count}", "--use_cpu"]
        again = run(parse([*LINE[:4], "--do_eval", *line], "run_glue"))
        for name in ("eval_loss", "eval_mm_loss", "eval_accuracy"):
            assert again[name] == pytest.approx(results[name], abs=1e-5)
    assert all((small <= large).all() for large, small in zip(masks, masks[1:]))
    assert sizes == sorted(set(sizes), reverse=True)
    found = {found.folder.name: found for found in find_runs(["whole"])}
    assert {"whole", "heads24", "heads12", "heads4"} <= found.keys() and found["heads24"].dense
    np.testing.assert_array_equal(HeadMask.load("whole/masks.safetensors").keep, masks[-1])
    # The learning rate falls to 0 for each.
    history = json.loads((here / "whole" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert len(rates) == 16 and [step for step in range(1, 16) if rates[step] > rates[step - 1]] == [5, 11]


@pytest.mark.parametrize("kill", few([5, 7], 5))
def test_a_run_killed_at_or_after_a_size_leaves_the_same_sizes(here, monkeypatch, kill):
    if not (here / "whole").exists():
        glue("whole")
    begin = HeadPruningCallback.on_step_begin

    def killed(self, args, state, control, **options):
        begin(self, args, state, control, **options)
        if state.global_step == kill:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HeadPruningCallback, "on_step_begin", killed)
        glue(f"killed{kill}")
    glue(f"killed{kill}")
    whole = files(here / "whole")
    assert len(whole) == 6 and files(here / f"killed{kill}") == whole


@pytest.mark.slow
def test_a_folder_that_is_used_anew_has_no_size_of_the_run_before(here):
    glue("anew", "--max_steps", "8")
    run(parse([*LINE[:-2], "--output_dir", "anew", "--overwrite_output_dir", "--max_steps", "2"], "run_glue"))
    assert not (here / "anew" / "sizes").exists()


def test_what_a_run_starts_from_and_learns_from_stays_in_a_folder_that_is_used_anew(here):
    if not (here / "whole").exists():
        glue("whole")
    shutil.copytree("whole/sizes", "used/sizes")
    start, teacher = "used/sizes/heads12", "used/sizes/heads24"
    for folder in (start, "used/sizes/heads4"):
        Path(folder, "notes.txt").write_text("mine", encoding="utf-8")
    line = [*LINE[:4], "--model_name_or_path", start, "--do_train", *TINY, "--max_steps", "1", "--distill", "logits"]
    line += ["--teacher_path", teacher, "--output_dir", "used", "--overwrite_output_dir", "--save_strategy", "no"]
    run(parse(line, "run_glue"))
    assert Path(start, "notes.txt").exists() and Path(teacher, "model.safetensors").exists()
    assert not Path("used/sizes/heads4").exists() and Path("used/model.safetensors").exists()


def test_distilled_sizes_learn_from_the_dense_model_between_the_falls(here):
    if not (here / "whole").exists():
        glue("whole")
    more = "--distill logits --max_steps 9 --finetune_updates 2 --teacher_path whole/sizes/heads24".split()
    glue("distilled", *more)
    assert json.loads((here / "distilled/sizes/heads12/pruning.json").read_text())["method"] == (
        "head_sensitivity+logits"
    )


def test_what_heads_cannot_be_cut_out_of_is_refused_before_training(here):
    with pytest.raises(HeadPruningError, match="stores as integers; quantize"):
        glue("qat", "--do_quantization")
    assert not (here / "qat" / "sizes").exists()


def test_sizes_need_updates_enough(here):
    with pytest.raises(
        HeadPruningError, match="take at least 32 updates with --finetune-updates 10, and training has 16"
    ):
        glue("short", "--finetune_updates", "10")


def test_models_of_ones_own_trainer_are_scored_on_its_validation_set(here):
    from transformers import TrainingArguments

    from hf_plugin import HeadPruningTrainer, pruner

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    rows = [{"input_ids": [2, 5 + i, 3], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(12)]
    trainer = HeadPruningTrainer(
        model=model,
        args=TrainingArguments("own", max_steps=8, report_to="none", use_cpu=True, per_device_train_batch_size=4),
        train_dataset=rows,
        eval_dataset=rows[:4],
        pruners=[pruner("subset", num_of_heads=6, joint_pruning=True, save_at="12")],
    )
    trainer.train()
    results = json.loads((here / "own/sizes/heads12/all_results.json").read_text())
    assert np.isfinite(results["eval_loss"]) and results["heads_kept"] == 12
    assert not (here / "own/sizes/heads6").exists() and trainer.head_mask.kept == 6


def test_a_training_that_is_cut_short_at_a_size_saves_it_and_one_that_goes_on_changes_none(here):
    from transformers import TrainerCallback, TrainingArguments

    from hf_plugin import HeadPruningTrainer, pruner

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            control.should_training_stop = state.global_step == 4

    rows = [{"input_ids": [2, 5 + i, 3], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(12)]
    trainer = HeadPruningTrainer(
        model=AutoModelForSequenceClassification.from_pretrained("bert-base-uncased"),
        args=TrainingArguments("cut", max_steps=8, report_to="none", use_cpu=True, per_device_train_batch_size=4),
        train_dataset=rows,
        callbacks=[Stop()],
        pruners=[pruner("head_sensitivity", num_of_heads=6, joint_pruning=True, save_at="12,6")],
    )
    kept = []
    for _ in range(2):
        trainer.train()
        kept.append({count: HeadMask.load(f"cut/sizes/heads{count}/masks.safetensors").kept for count in (12, 6)})
    assert kept == [{12: 12, 6: 6}] * 2


@pytest.mark.slow
def test_two_processes_leave_each_size_once(here):
    from tests import forked
    from tests.hf.training.test_two_ranks import free_port

    port, processes = free_port(), []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["-m", "hf_plugin.run_glue", *LINE, "--output_dir", "two", "--ddp_backend", "gloo"]
        processes.append(forked.Command("transformers", command, here, env))
    for process in processes:
        assert process.wait() == 0, process.out[-3000:] + process.err[-3000:]
    for count in (24, 12, 4):
        folder = here / "two" / "sizes" / f"heads{count}"
        assert json.loads((folder / "all_results.json").read_text())["heads_kept"] == count
        assert HeadMask.load(folder / "masks.safetensors").kept == count
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert not [path for path in (here / "two" / "sizes").iterdir() if not path.name.startswith("heads")]
