"""run_glue with pruners of weights: alone, beside head gates, on a pruned folder, by recipe, killed and resumed."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from head_pruning import HeadMask, HeadPruningError
from head_pruning.weights import load_weight_masks
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.presets import PRESETS
from hf_plugin.glue.run import run
from hf_plugin.training.checkpoints import STATE_FILE
from hf_plugin.training.pruning_config import PUBLISHED
from tests.hf.manual_lines import FINE_TUNING
from tests.hf.script_runs import TINY, start, write_place
from tests.hf.scripts.test_scripts import resumes

LINE = [*FINE_TUNING, *TINY]
# Of 12 updates: masks at 3 and 6, then at each from 9 on.
PLATON = """--pruner_name PLATON --final_threshold 0.2 --warmup_steps 2 --initial_warmup 1 --final_warmup 2 --deltaT 3
    --beta2 0.9""".split()
DSP = """--pruner dsp --num_of_heads 12 --joint_pruning --annealing --cooldown_steps 6 --initial_temperature 1
    --final_temperature 1e-4""".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("weights"))


def kept(masks: dict) -> tuple[int, int]:
    return sum(int(keep.sum()) for keep in masks.values()), sum(keep.numel() for keep in masks.values())


@pytest.fixture(scope="module")
def both(place):
    """Head gates and PLATON in one run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return run(parse([*LINE, *DSP, *PLATON, "--output_dir", "both"], "run_glue"))


def test_heads_and_weights_in_one_run(here, both):
    masks, heads = load_weight_masks("both/masks.safetensors"), HeadMask.load("both/masks.safetensors")
    left, total = kept(masks)
    assert heads.kept == both["heads_kept"] == 12
    gone = both["weights_of_dense"] - both["weights_total"]
    assert total == both["weights_of_dense"] and gone > 0
    assert left == both["weights_kept"] == total - gone - int((total - gone) * 0.8) + 1
    report = json.loads((here / "both" / "pruning.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained("both")
    assert report["method"] == "dsp+platon" and report["weights"]["weights_kept"] == left
    assert report["weights"]["nonzero_parameters"] == sum(int(torch.count_nonzero(p)) for p in model.parameters())
    for name, keep in masks.items():
        assert not model.get_parameter(name)[~keep].any(), name
    assert {"weight_density.png", "head_mask.png"} <= {path.name for path in (here / "both").iterdir()}
    card = (here / "both" / "README.md").read_text()
    assert f"12 of {heads.keep.size} attention heads" in card and "![densities](weight_density.png)" in card
    # The model in the folder is the one that was scored, with its masks on.
    line = [word for word in LINE if word != "--do_train"]
    again = run(parse([*line, "--model_name_or_path", "both", "--output_dir", "again"], "run_glue"))
    for name in ("eval_loss", "eval_mm_loss", "eval_accuracy"):
        assert again[name] == pytest.approx(both[name], abs=1e-5)


def test_configurations_prune_and_lock(here):
    """A file's, whose zeros the published one then keeps."""
    own = {"scheduler": "iterative", "pruning_fn": "unstructured_magnitude", "not_to_prune": ["classifier"]}
    own |= {"pruning_fn_default_kwargs": {"target_sparsity": 0.5}, "pruning_frequency": 1, "policy_end_step": 4}
    (here / "own.json").write_text(json.dumps(own))
    line = [word for word in LINE if word != "--do_eval"]
    run(parse([*line, "--pruning_config", "own.json", "--output_dir", "halved"], "run_glue"))
    more = ["--model_name_or_path", "halved", "--pruning_config", "lock_config.json", "--output_dir", "kept"]
    run(parse([*line, *more], "run_glue"))
    first, then = (AutoModelForSequenceClassification.from_pretrained(n).state_dict() for n in ("halved", "kept"))
    matrices = [n for n, p in first.items() if n.endswith("weight") and p.dim() > 1 and "embeddings" not in n]
    assert len(matrices) == 14 and "bert.pooler.dense.weight" in matrices
    for name in matrices:
        zeros = first[name] == 0
        assert zeros.float().mean().item() == (0 if name == "classifier.weight" else 0.5), name
        assert torch.equal(then[name] == 0, zeros) and not torch.equal(then[name], first[name]), name


@pytest.mark.slow
def test_lock_fine_tunes_a_pruned_folder(here, both):
    line = [*LINE, "--model_name_or_path", "both", "--pruner_name", "lock", "--output_dir", "locked"]
    results = run(parse(line, "run_glue"))
    first, then = (AutoModelForSequenceClassification.from_pretrained(n).state_dict() for n in ("both", "locked"))
    masks = load_weight_masks("locked/masks.safetensors")
    assert len(masks) > 20 and any(not torch.equal(first[name], then[name]) for name in masks)
    for name, keep in masks.items():
        assert torch.equal(keep, first[name] != 0) and torch.equal(keep, then[name] != 0), name
    assert (results["weights_kept"], results["weights_total"]) == kept(masks)


@pytest.mark.slow
def test_another_pruner_of_weights_on_the_same_schedule(here):
    more = ["--pruner_name", "magnitude", "--preset", "platon/mnli", "--num_train_epochs", "1", "--output_dir", "size"]
    results = run(parse([*LINE, *more, "--warmup_steps", "0.1", "--deltaT", "2"], "run_glue"))
    assert results["weights_kept"] == results["weights_total"] - int(results["weights_total"] * 0.9) + 1
    whole = json.loads((here / "size" / "pruning.json").read_text())
    assert set(whole) == {"method", "options", "sparsity", "history", "versions", "weights"}
    assert whole["method"] == "magnitude" and {"head_pruning", "transformers"} < set(whole["versions"])
    assert whole["history"][-1]["eval_loss"] == results["eval_mm_loss"] and whole["options"]["final_warmup"] == 5
    report = whole["weights"]
    assert {name: report[name] for name in whole["sparsity"]} == whole["sparsity"]
    assert report["method"] == "magnitude" and report["options"]["final_warmup"] == 5
    assert report["options"]["deltaT"] == 2  # what is set wins
    card = (here / "size" / "README.md").read_text()
    assert "- magnitude\n---" in card and f"10.0% of the weights of {len(report['kept_by_tensor'])} tensors" in card
    assert f"{results['weights_total']:,} weights of these tensors {results['weights_kept']:,} stay" in card
    assert "## Results on GLUE MNLI" in card and "eval_mm_accuracy" in card and "needs no other package" in card


@pytest.mark.slow
def test_without_an_evaluation_the_counts_are_written_too(here):
    line = [word for word in [*LINE, *PLATON, "--output_dir", "unscored"] if word != "--do_eval"]
    results = run(parse(line, "run_glue"))
    stored = json.loads((here / "unscored" / "all_results.json").read_text())
    masks = load_weight_masks("unscored/masks.safetensors")
    assert (stored["weights_kept"], stored["weights_total"]) == kept(masks)
    assert results["weights_kept"] == stored["weights_kept"] and "eval_loss" not in results


@pytest.mark.slow
@resumes
def test_a_recipe_trains_with_adamax_and_goes_on_to_the_same_bits(here):
    more = "--preset platon/mnli --warmup_steps 1 --final_threshold 0.3 --save_steps 5 --output_dir".split()
    line = [word for word in [*LINE, *more] if word != "--do_eval"]
    run(parse([*line, "adamax"], "run_glue"))
    run(parse([*line, "part"], "run_glue"))
    shutil.rmtree("part/checkpoint-12")  # as if it had been stopped after update 10
    for name in ("model.safetensors", "masks.safetensors"):
        (here / "part" / name).unlink()
    run(parse([*line, "part"], "run_glue"))
    for name in (
        "model.safetensors",
        "masks.safetensors",
        "checkpoint-12/optimizer.pt",
        f"checkpoint-12/{STATE_FILE}",
    ):
        assert (here / "adamax" / name).read_bytes() == (here / "part" / name).read_bytes(), name
    stored = torch.load(here / "adamax" / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert all({"step", "exp_avg", "exp_inf"} == set(state) for state in stored["state"].values())
    assert [(group["weight_decay"], group["eps"]) for group in stored["param_groups"]] == [(0.01, 1e-6), (0.0, 1e-6)]


class TestPresets:
    LINE = "--task_name MNLI --data_dir data/MNLI --model_name_or_path m --do_train --output_dir out --use_cpu".split()

    LINES = {
        "run_glue": LINE,
        "run_squad": LINE[2:],
        "run_ner": [word.replace("data_dir", "train_file") for word in LINE[2:]],
        "run_swag": [word.replace("data_dir", "train_file") for word in LINE[2:]],
    }

    @pytest.mark.parametrize("name", ["glue-85", "squad-85", "lock"])
    @pytest.mark.parametrize("script", LINES)
    def test_recipes_of_prune_once_for_all_are_its_configurations(self, script, name):
        line, file = self.LINES[script], f"{name.replace('-', '_')}_config.json"
        (preset,) = parse([*line, "--preset", f"pruneofa/{name}"], script).pruners
        (config,) = parse([*line, "--do_prune", "--pruning_config", f"config/{file}"], script).pruners
        assert preset.name == config.name and preset.config == config.config
        options, wanted = vars(config.config), PUBLISHED[file]
        kept = wanted["not_to_prune"]
        assert options["weights_exclude"] == "|".join(f"(?:{text})" for text in kept) and not options["prune_biases"]
        steps = {name: value for name, value in wanted.items() if name.endswith(("_step", "_frequency"))}
        assert len(steps) == (0 if name == "lock" else 5) and steps.items() <= options.items()
        assert name == "lock" or options["target_sparsity"] == 0.85

    def test_a_configuration_and_what_contradicts_it(self):
        config = "--pruning_config squad_85_config.json"
        more = f"{config} --policy_end_step 9000 --pruner dsp --num_of_heads 3 --joint_pruning"
        heads, weights = parse([*self.LINES["run_squad"], *more.split()], "run_squad").pruners
        assert (heads.name, weights.name, weights.config.policy_end_step) == ("dsp", "gradual_magnitude", 9000)
        for words, sentence in (
            ("--preset pruneofa/lock", "--preset pruneofa/lock and --pruning_config both say what is pruned"),
            ("--pruner_name lock", "belongs to"),
        ):
            with pytest.raises(HeadPruningError, match=sentence):
                parse([*self.LINES["run_squad"], *config.split(), *words.split()], "run_squad")
        with pytest.raises(HeadPruningError, match="student-90 is a recipe of run_pretraining.py; use that, or"):
            parse([*self.LINE, "--preset", "pruneofa/student-90"], "run_glue")

    @pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("platon")])
    def test_recipes_are_flags_that_fit(self, name):
        line = self.LINE[2:] if name == "platon/squad" else self.LINE
        arguments = parse([*line, "--preset", name], "run_squad" if name == "platon/squad" else "run_glue")
        percent = int(name.rpartition("-")[2]) if name[-2:].isdigit() else 10
        assert [pruner.name for pruner in arguments.pruners] == ["platon"]
        options, training = vars(arguments.of("weights").config), arguments.training
        assert options["final_threshold"] == percent / 100 and options["deltaT"] == 10 and options["beta2"] >= 0.65
        assert training.learning_rate == PRESETS[name]["learning_rate"] and options["warmup_steps"] >= 200
        adamax = name != "platon/squad"
        assert arguments.optimizer == ("adamax" if adamax else "adamw")
        assert training.warmup_steps == (0.1 if adamax else 0) and training.lr_scheduler_type.value == "linear"
        assert (training.weight_decay, training.adam_epsilon) == ((0.01, 1e-6) if adamax else (0, 1e-8))
        assert any(note.startswith(f"--preset {name} adds --pruner_name platon") for note in arguments.notes)

    def test_what_is_set_wins(self):
        more = "--preset PLATON/MNLI-20 --final_threshold 0.3 --per_gpu_train_batch_size 4 --warmup_ratio 0.2".split()
        arguments = parse([*self.LINE, *more], "run_glue")
        options = arguments.of("weights").config
        assert options.final_threshold == 0.3 and options.beta2 == 0.95
        assert arguments.training.per_device_train_batch_size == 4
        assert arguments.training.warmup_steps == 0.2 and arguments.training.seed == 7

    @pytest.mark.parametrize("words", ["--optimizer adamw", "--optim adamw_torch", "--adafactor"])
    def test_another_optimizer(self, words):
        arguments = parse([*self.LINE, "--preset", "platon/mnli", *words.split()], "run_glue")
        assert arguments.optimizer == "adamw" and arguments.training.adam_epsilon == 1e-8
        assert arguments.training.weight_decay == 0.01 and arguments.training.warmup_steps == 0.1

    def test_beside_a_pruner_of_heads_in_any_place(self):
        for flag in ("--pruner", "--pruner_name"):
            more = [*self.LINE, "--preset", "platon/rte", flag, "dsp", "--num_of_heads", "3", "--joint_pruning"]
            assert [pruner.name for pruner in parse(more, "run_glue").pruners] == ["dsp", "platon"]

    def test_with_a_pruner_that_has_no_warm_up(self):
        more = ["--preset", "platon/rte", "--pruner_name", "lock", "--warmup_steps", "7"]
        arguments = parse([*self.LINE, *more], "run_glue")
        assert arguments.training.warmup_steps == 7 and arguments.training.num_train_epochs == 20

    def test_an_unknown_one(self):
        with pytest.raises(HeadPruningError, match="no preset platon/nli; choose one of platon/cola, platon/mnli"):
            parse([*self.LINE, "--preset", "platon/nli"], "run_glue")


@resumes
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(place):
    line = [*LINE, *DSP, *PLATON, "--max_steps", "60", "--save_steps", "4", "--gradient_accumulation_steps", "2"]
    command = ["-m", "hf_plugin.run_glue", *line, "--warmup_steps", "10"]
    whole = start(place, *command, "--output_dir", "whole")
    killed = start(place, *command, "--output_dir", "killed")
    marks = [place / "killed" / f"checkpoint-{step}" / "trainer_state.json" for step in (20, 60)]
    killed.kill_once(marks[0].exists)  # in the cubic phase, within a window
    _, log = whole.communicate(timeout=240)
    assert whole.returncode == 0, log[-3000:]
    assert not marks[1].exists()
    _, log = start(place, *command, "--output_dir", "killed").communicate(timeout=240)
    assert "resuming from killed/checkpoint-" in log
    for name in ("model.safetensors", f"checkpoint-60/{STATE_FILE}"):
        assert (place / "whole" / name).read_bytes() == (place / "killed" / name).read_bytes(), name
    files = [place / name / "masks.safetensors" for name in ("whole", "killed")]
    first, then = (load_weight_masks(path) for path in files)
    assert first.keys() == then.keys() and all(torch.equal(first[name], then[name]) for name in first)
    assert HeadMask.load(files[0]) == HeadMask.load(files[1])
    sessions = [
        json.loads((place / name / "trainer_state.json").read_text())["stateful_callbacks"]["HeadPruningCallback"]
        for name in ("whole", "killed")
    ]
    assert sessions[0] == sessions[1]
