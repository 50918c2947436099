"""The scripts: every command of the manual's "BERT on MNLI" part with a tiny model, and the nine tasks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from head_pruning import HeadMask, HeadPruningError
from head_pruning.masks import full_mask
from hf_plugin import head_importance
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue.michel import MichelRun
from hf_plugin.glue.michel import run as run_michel
from hf_plugin.glue.run import GlueRun, run
from tests.few import few
from tests.hf.glue_files import FOLDERS
from tests.hf.manual_lines import FINE_TUNING, JOINT_DSP, MICHEL, PIPELINED_DSP, STE, VOITA
from tests.hf.script_runs import HEADS, ROOT, TINY, start, write_model, write_place, write_task

resumes = pytest.mark.skipif(
    transformers.__version__.startswith("5.0."),
    reason="transformers 5.0 saves LayerNorms under names that it does not know when it resumes",
)
ANNEAL = "--cooldown_steps 8 --initial_temperature 1 --final_temperature 1e-4".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("manual"))


@pytest.fixture(scope="module")
def dense(place):
    """The manual's fine-tuned model in output/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        results = run(parse([*FINE_TUNING, *TINY], "run_glue"))
    return results


def check_folder(folder: Path, kept: int) -> AutoModelForSequenceClassification:
    """Everything that a run leaves, and that the model is an ordinary one with zeros."""
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer_config.json", "pruning.json", "masks.safetensors"}
    assert wanted | {"head_mask.png", "README.md", "all_results.json", "trainer_state.json"} <= names
    mask = HeadMask.load(folder / "masks.safetensors")
    assert mask.kept == kept and mask.keep.size == HEADS
    report = json.loads((folder / "pruning.json").read_text())
    assert report["heads_kept"] == kept and report["kept_heads_by_site"] == mask.kept_heads()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for layer, heads in zip(model.bert.encoder.layer, mask.kept_heads().values()):
        columns = layer.attention.output.dense.weight.view(24, 12, 2)
        assert {head for head in range(12) if columns[:, head].any()} == set(heads)
    assert f"{kept} of {HEADS} attention heads" in (folder / "README.md").read_text()
    return model


@pytest.mark.parametrize(
    "script, line, more, folder",
    [
        pytest.param("run_dsp", JOINT_DSP, ANNEAL, "dsp_output", id="joint-dsp"),
        pytest.param("run_dsp", STE, ["--output_dir", "ste_output"], "ste_output", id="ste", marks=pytest.mark.slow),
        pytest.param("run_voita", VOITA, ["--num_of_heads", "12"], "voita_output", id="voita"),
    ],
)
def test_joint_commands(here, script, line, more, folder):
    results = run(parse([*line, *TINY, *more], script))
    model = check_folder(here / folder, 12)
    assert model.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}
    stored = json.loads((here / folder / "all_results.json").read_text())
    for name in ("eval_accuracy", "eval_mm_accuracy"):
        assert 0 <= stored[name] <= 1 and stored[name] == results[name]
    # The model in the folder is the one that was scored.
    again = run(
        parse(
            ["--model_name_or_path", folder, "--task_name", "MNLI", "--data_dir", "data/MNLI", "--do_eval"]
            + ["--output_dir", f"{folder}_again", "--use_cpu", "--disable_tqdm", "True", "--cache_dir", "cache/"],
            "run_glue",
        )
    )
    for name in ("eval_accuracy", "eval_mm_accuracy", "eval_loss"):
        assert again[name] == pytest.approx(results[name], abs=1e-5)


def test_micro_batches_are_averaged_not_added_up(here):
    more = "--max_steps 1 --gradient_accumulation_steps 2 --output_dir micro_batches".split()
    results = run(parse([*FINE_TUNING, *TINY, *more], "run_glue"))
    assert results["train_loss"] == pytest.approx(results["eval_loss"], rel=0.1)


@pytest.mark.slow
def test_voita_without_a_number_of_heads(here):
    run(parse([*VOITA, *TINY, "--l0_penalty", "0.5", "--output_dir", "voita_free"], "run_voita"))
    assert 0 <= HeadMask.load(here / "voita_free" / "masks.safetensors").kept <= HEADS


def test_pipelined_dsp(here, dense):
    before = AutoModelForSequenceClassification.from_pretrained("output")
    run(parse([*PIPELINED_DSP, *TINY, *ANNEAL, "--logging_steps", "4"], "run_dsp"))
    pruned = check_folder(here / "dsp_output" / "pipelined", 12)
    for (name, value), other in zip(before.state_dict().items(), pruned.state_dict().values()):
        assert torch.equal(value[other != 0], other[other != 0]), name
    states = json.loads((here / "dsp_output" / "pipelined" / "trainer_state.json").read_text())["log_history"]
    assert {entry["heads_kept"] for entry in states if "heads_kept" in entry} == {12.0}


@pytest.mark.parametrize("exact", [True, False])
def test_michel(here, dense, capsys, exact):
    # Examples on their own: then it does not matter which of them come together in a batch.
    line = [word for word in [*MICHEL, "--per_example"] if exact or word != "--exact_pruning"]
    folder = f"michel_{exact}"
    rounds = run_michel(parse_michel([*line, "--output_dir", folder, "--no_cuda"]))
    assert [entry["heads"] for entry in rounds] == [24, 12, 0]
    assert rounds[0]["scores"] == {
        "mnli": pytest.approx(100 * dense["eval_accuracy"]),
        "mnli-mm": pytest.approx(100 * dense["eval_mm_accuracy"]),
    }
    assert json.loads((here / folder / "michel_rounds.json").read_text())["rounds"] == rounds
    importance = [np.array(entry["importance"]) for entry in rounds[1:]]
    mask = HeadMask.load(here / folder / "michel_masks" / "heads12.safetensors")
    assert set(np.argsort(importance[0])[12:]) == set(np.flatnonzero(mask.keep))
    # Measured by itself under the mask before each round, or under that of all heads where one measurement does.
    michel = MichelRun(parse_michel([*line, "--output_dir", f"{folder}_again", "--no_cuda"]))
    loader = DataLoader(michel.data.train, batch_size=7, collate_fn=michel.collator)
    whole, left = (
        head_importance(michel.model, loader, mask=each, per_example=True, progress=False)
        for each in (full_mask(mask.unit_map), mask)
    )
    np.testing.assert_allclose(importance[0], whole, rtol=0, atol=2e-5)
    np.testing.assert_allclose(importance[1], left if exact else whole, rtol=0, atol=2e-5)
    assert np.abs(left - whole).max() > 2e-3  # so that one could not pass for the other
    table = capsys.readouterr().out
    assert "heads kept" in table and len([row for row in table.splitlines() if row[:2].strip().isdigit()]) == 3
    # A second call has nothing left to do and says the same.
    assert run_michel(parse_michel([*line, "--output_dir", folder, "--no_cuda"])) == rounds


@pytest.mark.slow
def test_michel_on_a_part_of_the_training_set(here, dense):
    one_shot = [word for word in MICHEL if word != "--exact_pruning"] + ["--no_cuda", "--num_of_heads", "24"]
    found = {
        count: run_michel(parse_michel([*one_shot, "--max_train_samples", count, "--output_dir", f"part{count}"]))
        for count in ("2", "100000")
    }
    whole = run_michel(parse_michel([*one_shot, "--output_dir", "every"]))
    assert found["100000"][1]["importance"] == whole[1]["importance"] != found["2"][1]["importance"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "hf_plugin.run_dsp"], [str(ROOT / "hf_plugin" / "run_dsp.py")]])
def test_as_a_process(place, command):
    process = start(place, *command, *JOINT_DSP, *TINY, *ANNEAL, "--output_dir", "process", "--overwrite_output_dir")
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log[-3000:]
    assert "12 of 24 heads are left, accuracy 0." in log and "kept heads by site" in log
    check_folder(place / "process", 12)


def test_a_mistake_is_one_sentence(place):
    process = start(place, "-m", "hf_plugin.run_dsp", *JOINT_DSP, *TINY, "--num_of_heads", "25", "--output_dir", "no")
    _, log = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in log
    (sentence,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "25" in sentence and "24" in sentence


@pytest.mark.slow
@resumes
def test_a_killed_run_goes_on_to_the_same_bits(place):
    # The manual's line, but long enough to be killed on its way.
    line = [*JOINT_DSP, *TINY, "--max_steps", "60", "--cooldown_steps", "40", "--save_steps", "5"]
    command = ["-m", "hf_plugin.run_dsp", *line]
    whole = start(place, *command, "--output_dir", "whole")
    killed = start(place, *command, "--output_dir", "killed")
    marks = [place / "killed" / f"checkpoint-{step}" / "trainer_state.json" for step in (10, 60)]
    killed.kill_once(marks[0].exists)
    _, log = whole.communicate(timeout=240)
    assert whole.returncode == 0, log[-3000:]
    assert not marks[1].exists()
    _, log = start(place, *command, "--output_dir", "killed").communicate(timeout=240)
    assert "resuming from killed/checkpoint-" in log
    for name in ("model.safetensors", "masks.safetensors"):
        assert (place / "whole" / name).read_bytes() == (place / "killed" / name).read_bytes()
    sessions = [
        json.loads((place / name / "trainer_state.json").read_text())["stateful_callbacks"]["HeadPruningCallback"]
        for name in ("whole", "killed")
    ]
    assert sessions[0] == sessions[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nine")
    for task in FOLDERS:
        write_task(folder / "data", task)
    write_model(folder / "model")
    return folder


class TestNineTasks:
    """Train, evaluate both ways, predict: all tasks, those that the published script crashed on included."""

    @pytest.mark.parametrize("task", few(FOLDERS, "CoLA", "STS-B", "MNLI"))
    def test_task(self, data, tmp_path, task):
        flags = f"--task_name {task} --do_train --do_eval --do_predict --num_of_heads 5 --use_ste --joint_pruning"
        paths = ["--data_dir", str(data / "data" / task), "--model_name_or_path", str(data / "model")]
        out = ["--output_dir", str(tmp_path), "--cache_dir", str(data / "cache"), *TINY, "--max_steps", "2"]
        results = run(parse([*flags.split(), *paths, *out], "run_dsp"))
        metrics = {
            "CoLA": ["matthews_correlation"],
            "STS-B": ["pearson", "spearmanr", "combined_score"],
            "MRPC": ["accuracy", "f1"],
            "QQP": ["accuracy", "f1"],
        }
        for metric in metrics.get(task, ["accuracy"]):
            assert -1 <= results[f"eval_{metric}"] <= 1
        files = {"MNLI": ["MNLI-m.tsv", "MNLI-mm.tsv"]}.get(task, [f"{task}.tsv"])
        for name in files:
            lines = (tmp_path / name).read_text().splitlines()
            assert lines[0] == "index\tprediction" and len(lines) == 25
        assert check_folder(tmp_path, 5).config.num_labels == {"STS-B": 1, "MNLI": 3}.get(task, 2)


class TestDefectsOfThePublishedScripts:
    @pytest.mark.slow
    def test_the_seed_of_the_command_line_counts(self, here):
        masks = []
        for seed in ("1", "2", "1"):
            out = ["--output_dir", f"seed{seed}", "--seed", seed, "--max_steps", "2", "--overwrite_output_dir"]
            run(parse([*JOINT_DSP, *TINY, *ANNEAL, *out], "run_dsp"))
            masks.append(HeadMask.load(f"seed{seed}/masks.safetensors"))
        assert masks[0] == masks[2] and masks[0] != masks[1]

    @pytest.mark.slow
    def test_max_steps_and_weight_decay_count(self, here):
        run(parse([*FINE_TUNING, *TINY, "--max_steps", "3", "--output_dir", "plain"], "run_glue"))
        run(
            parse(
                [*FINE_TUNING, *TINY, "--max_steps", "3", "--output_dir", "decay", "--weight_decay", "9"], "run_glue"
            )
        )
        steps = json.loads(Path("plain/trainer_state.json").read_text())["global_step"]
        norms = [
            float(
                AutoModelForSequenceClassification.from_pretrained(name)
                .bert.encoder.layer[0]
                .output.dense.weight.norm()
            )
            for name in ("plain", "decay")
        ]
        assert steps == 3 and norms[1] < 0.99 * norms[0]

    def test_predictions_keep_the_order_of_the_test_set(self, data, tmp_path):
        rows = (data / "data" / "STS-B" / "test.tsv").read_text().splitlines()
        (tmp_path / "data").mkdir()
        longer = [row + " w1" * (i % 9) for i, row in enumerate(rows)]
        (tmp_path / "data" / "test.tsv").write_text("\n".join([rows[0], *longer[1:]]) + "\n")
        line = ["--task_name", "STS-B", "--data_dir", str(tmp_path / "data"), "--do_predict", "--use_cpu"]
        line += ["--model_name_or_path", str(data / "model"), "--cache_dir", str(tmp_path / "cache")]
        for name, more in (("plain", []), ("grouped", ["--group_by_length", "--per_device_eval_batch_size", "4"])):
            ours = GlueRun(parse([*line, "--output_dir", str(tmp_path / name), *more], "run_glue"))
            with torch.no_grad():  # scores that differ
                ours.trainer.model.classifier.weight.mul_(100)
                ours.trainer.model.classifier.bias.fill_(2.5)
            ours.predict()
        files = [(tmp_path / name / "STS-B.tsv").read_text() for name in ("plain", "grouped")]
        assert files[0] == files[1] and len({line.split("\t")[1] for line in files[0].splitlines()}) > 5

    def test_training_needs_do_train(self, here):
        line = [word for word in JOINT_DSP if word != "--do_train"]
        with pytest.raises(HeadPruningError, match="--do_train"):
            run(parse([*line, *TINY, "--output_dir", "never"], "run_dsp"))
        assert not Path("never/model.safetensors").exists()


class TestOutputFolder:
    def test_a_model_is_not_written_over(self, here):
        line = [*FINE_TUNING, *TINY, "--max_steps", "2", "--output_dir", "once", "--save_strategy", "no"]
        run(parse(line, "run_glue"))
        with pytest.raises(HeadPruningError, match="overwrite_output_dir"):
            run(parse(line, "run_glue"))
        run(parse([*line, "--overwrite_output_dir"], "run_glue"))

    @resumes
    def test_a_finished_run_has_nothing_left_to_do(self, here, dense):
        again = run(parse([*FINE_TUNING, *TINY], "run_glue"))
        assert again["eval_accuracy"] == dense["eval_accuracy"] and again["eval_loss"] == dense["eval_loss"]

    @pytest.mark.slow
    @resumes
    def test_a_run_is_gone_on_with(self, here):
        line = [*JOINT_DSP, *TINY, *ANNEAL, "--save_steps", "6"]
        run(parse([*line, "--output_dir", "all"], "run_dsp"))
        run(parse([*line, "--output_dir", "part"], "run_dsp"))
        for path in Path("part/checkpoint-12").iterdir():  # as if it had been stopped after update 6
            path.unlink()
        run(parse([*line, "--output_dir", "part"], "run_dsp"))
        for name in ("all", "part"):
            assert json.loads(Path(f"{name}/trainer_state.json").read_text())["global_step"] == 12
        first, second = (AutoModelForSequenceClassification.from_pretrained(n).state_dict() for n in ("all", "part"))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        assert HeadMask.load("all/masks.safetensors") == HeadMask.load("part/masks.safetensors")

    @pytest.fixture(scope="class")
    @staticmethod
    def five(place):
        """A folder with a finished DSP run of 5 heads and its checkpoints."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            run(parse([*TestOutputFolder.line("five", "5"), "--intermediate_masks"], "run_dsp"))
        return place / "five"

    @staticmethod
    def line(folder, heads):
        more = ["--num_of_heads", heads, "--output_dir", folder, "--max_steps", "4", "--save_steps", "2"]
        return [*JOINT_DSP, *TINY, *ANNEAL, "--cooldown_steps", "2", *more]

    @pytest.mark.parametrize(
        "more, sentence",
        [
            (["--num_of_heads", "7"], "with --num_of_heads 5, this one is with --num_of_heads 7"),
            (["--seed", "7"], "with --seed 42, this one is with --seed 7"),
            (["--learning_rate", "0.1"], "--learning_rate 0.001"),
            (["--task_name", "SST-2"], "with --task_name MNLI, this one is with --task_name SST-2"),
            (["--use_ste"], "with --pruner dsp, this one is with --pruner ste"),
            (["--max_seq_length", "64"], "--max_seq_length 128"),
            (
                ["--resume_from_checkpoint", "five/checkpoint-2", "--num_of_heads", "7"],
                "five/checkpoint-2 is of a run",
            ),
        ],
    )
    def test_a_run_of_other_options_does_not_go_on(self, here, five, more, sentence):
        before = {path.name: path.stat().st_mtime_ns for path in five.iterdir()}
        line = [*self.line("five", "5"), *more] if "--use_ste" not in more else [*STE, *TINY, "--output_dir", "five"]
        with pytest.raises(HeadPruningError, match=sentence):
            run(parse(line, "run_dsp"))
        assert before == {path.name: path.stat().st_mtime_ns for path in five.iterdir()}

    def test_a_dense_run_does_not_go_on_from_a_pruning_run(self, here, five):
        with pytest.raises(HeadPruningError, match="with --pruner dsp, this one is without --pruner"):
            run(parse([*FINE_TUNING, *TINY, "--output_dir", "five"], "run_glue"))

    def test_resuming_what_is_not_there(self, here):
        for name, sentence in (("nope", "There is no checkpoint nope"), ("True", "no whole checkpoint in fresh")):
            line = [*FINE_TUNING, *TINY, "--output_dir", "fresh", "--resume_from_checkpoint", name]
            with pytest.raises(HeadPruningError, match=sentence):
                run(parse(line, "run_glue"))

    def test_overwriting_leaves_nothing_of_the_run_before(self, here, five):
        shutil.copytree(five, "over")
        words = [*FINE_TUNING, *TINY, "--output_dir", "over", "--max_steps", "2", "--overwrite_output_dir"]
        run(parse([word for word in words if word != "--do_eval"], "run_glue"))
        names = {path.name for path in Path("over").iterdir()}
        assert not names & {"masks.safetensors", "pruning.json", "head_mask.png", "checkpoint-4", "mask4.safetensors"}
        assert "nothing was pruned" in Path("over/README.md").read_text()
        stored = json.loads(Path("over/all_results.json").read_text())
        assert "train_loss" in stored and not {"eval_accuracy", "heads_kept"} & stored.keys()

    def test_other_files_are_not_written_over(self, here):
        Path("mine").mkdir()
        Path("mine/README.md").write_text("my notes")
        with pytest.raises(HeadPruningError, match="README.md.*overwrite_output_dir"):
            run(parse(self.line("mine", "5"), "run_dsp"))
        Path("file").write_text("")
        for name in ("file", "file/below"):
            with pytest.raises(HeadPruningError, match=f"--output_dir {name} cannot be made"):
                run(parse(self.line(name, "5"), "run_dsp"))
        assert Path("mine/README.md").read_text() == "my notes"

    def test_a_failure_after_training_leaves_the_model(self, here, monkeypatch):
        def fail(self):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(GlueRun, "evaluate", fail)
        with pytest.raises(RuntimeError):
            run(parse([*self.line("lost", "5"), "--save_strategy", "no"], "run_dsp"))
        names = {path.name for path in Path("lost").iterdir()}
        assert {"model.safetensors", "masks.safetensors", "pruning.json", "README.md", "head_mask.png"} <= names
        assert "5 of 24 attention heads" in Path("lost/README.md").read_text()

    @pytest.mark.parametrize(
        "more, sentence",
        [
            (["--num_train_epochs", "0", "--max_steps", "-1"], "--num_train_epochs is 0"),
            (["--do_predict", "--prediction_loss_only", "True"], "--prediction_loss_only leaves nothing"),
        ],
    )
    def test_what_cannot_work_is_refused_before_training(self, here, more, sentence):
        with pytest.raises(HeadPruningError, match=sentence):
            run(parse([*self.line("never", "5"), *more], "run_dsp"))

    def test_the_card_has_the_options_as_they_were(self, five):
        card = (five / "README.md").read_text()
        assert "| final_temperature | 0.0001 |" in card and "| gate_adam_beta2 | 0.999 |" in card


def test_arguments_from_a_file(here):
    words = [*JOINT_DSP, *TINY, *ANNEAL, "--output_dir", "from_file"]
    values, i = {}, 0
    while i < len(words):
        flag = words[i][2:]
        if i + 1 < len(words) and not words[i + 1].startswith("--"):
            values[flag] = words[i + 1]
            i += 1
        else:
            values[flag] = True
        i += 1
    Path("args.json").write_text(json.dumps(values))
    run(parse(["args.json"], "run_dsp"))
    check_folder(here / "from_file", 12)


def test_a_model_that_is_not_there(here):
    with pytest.raises(HeadPruningError, match="nowhere cannot be loaded"):
        run(parse([*JOINT_DSP, *TINY, "--model_name_or_path", "./nowhere", "--output_dir", "no"], "run_dsp"))


def test_importing_the_package_is_quiet(tmp_path):
    process = start(tmp_path, "-W", "error::DeprecationWarning:hf_plugin", "-c", "import hf_plugin")
    out, log = process.communicate(timeout=120)
    assert process.returncode == 0 and not out and "Traceback" not in log
