"""The command line of run_squad, and whose warm-up --warmup_steps is."""

import shlex

import pytest

from head_pruning import HeadPruningError
from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.old_flags import SQUAD_SPELLINGS
from tests.hf.manual_lines import PLATON_BERT, PLATON_DEBERTA

NEEDED = shlex.split("--model_name_or_path tiny --output_dir out")
GLUE = [*NEEDED, "--task_name", "mrpc"]


def squad(words: str = ""):
    return parse([*NEEDED, *shlex.split(words)], "run_squad")


@pytest.mark.parametrize("words, model, kind", [
    (PLATON_BERT, "bert-base-uncased", "bert"), (PLATON_DEBERTA, "microsoft/deberta-v3-base", "deberta"),
])  # fmt: skip
def test_the_manuals_lines(words, model, kind):
    arguments = parse(words, "run_squad")
    (built,) = arguments.pruners
    assert built.name == "platon"
    expected = {"initial_threshold": 1, "final_threshold": 0.1, "warmup_steps": 5400, "initial_warmup": 1}
    expected |= {"final_warmup": 5, "beta1": 0.85, "beta2": 0.95, "deltaT": 10}
    assert {name: getattr(built.config, name) for name in expected} == expected
    training, data = arguments.training, arguments.data
    expected = {"num_train_epochs": 10, "seed": 9, "learning_rate": 3e-5, "logging_steps": 300, "eval_steps": 3000}
    expected |= {"save_steps": 100000, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 256}
    expected |= {"output_dir": "log/deberta-v3-base/PLATON/", "warmup_steps": 0, "do_train": True, "do_eval": True}
    assert {name: getattr(training, name) for name in expected} == expected
    assert training.eval_strategy.value == "steps" and (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)
    assert (arguments.model.model_name_or_path, data.model_type, data.data_dir) == (model, kind, "data/squad")
    assert data.do_lower_case and data.overwrite_output_dir and not data.version_2_with_negative
    assert (
        "--warmup_steps (5400) is that of the pruner platon; the learning rate's is --optimizer_warmup_steps (0)."
        in (arguments.notes)
    )


def test_defaults_are_those_of_the_published_script():
    arguments = squad()
    data, training = arguments.data, arguments.training
    expected = {"max_seq_length": 384, "doc_stride": 128, "max_query_length": 64, "n_best_size": 20}
    expected |= {"max_answer_length": 30, "null_score_diff_threshold": 0.0, "train_file": None, "predict_file": None}
    assert {name: getattr(data, name) for name in expected} == expected
    expected = {"learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 16, "seed": 42}
    expected |= {"weight_decay": 0, "adam_epsilon": 1e-8, "max_grad_norm": 1, "warmup_steps": 0, "logging_steps": 500}
    assert {name: getattr(training, name) for name in expected} == expected
    assert training.eval_strategy.value == "no" and arguments.pruners == [] and arguments.notes == []


# Every flag of the published script that is not in the manual's lines.
FLAGS = """--train_file a.json | --predict_file b.json | --config_name c | --tokenizer_name t | --cache_dir cache |
    --output_root_folder root | --version_2_with_negative | --null_score_diff_threshold -1.5 | --max_seq_length 200 |
    --doc_stride 64 | --max_query_length 32 | --evaluate_during_training | --gradient_accumulation_steps 2 |
    --weight_decay 0.1 | --adam_epsilon 1e-6 | --max_grad_norm 2.0 | --max_steps 5 | --optimizer_warmup_steps 3 |
    --n_best_size 5 | --max_answer_length 15 | --verbose_logging | --lang_id 0 | --eval_all_checkpoints | --no_cuda |
    --overwrite_cache | --local_rank -1 | --fp16_opt_level O1 | --server_ip 1.2.3.4 | --server_port 80 |
    --threads 4"""


@pytest.mark.parametrize("flag", [flag.strip() for flag in FLAGS.split("|")])
def test_every_flag_of_the_published_script_works_or_says_what_it_became(flag):
    name, *value = shlex.split(flag)
    name = name.removeprefix("--")
    arguments = squad(flag)
    if name == "optimizer_warmup_steps":
        assert arguments.training.warmup_steps == 3
    elif arguments.notes:
        (note,) = arguments.notes
        assert note.startswith(f"--{name} ") and note.endswith(".") and "\n" not in note and len(note) < 120
    else:
        parts = (arguments.data, arguments.model, arguments.training)
        found = next(getattr(part, name) for part in parts if hasattr(part, name))
        assert found is True if not value else str(found) == value[0] or found == float(value[0])


def test_the_list_above_is_whole():
    assert {spelling.name for spelling in SQUAD_SPELLINGS} <= {flag.split()[0][2:] for flag in FLAGS.split("|")}


@pytest.mark.parametrize("words, strategy, steps", [
    ("--eval_steps 7", "steps", 7),
    ("--evaluate_during_training --eval_steps 7", "steps", 7),
    ("--eval_strategy epoch --eval_steps 7", "epoch", 7),
    ("--do_eval", "no", None),
])  # fmt: skip
def test_when_it_evaluates(words, strategy, steps):
    training = squad(words).training
    assert (training.eval_strategy.value, training.eval_steps) == (strategy, steps)


def test_predict_means_evaluate():
    arguments = squad("--do_predict")
    assert arguments.training.do_eval and not arguments.training.do_predict and "--do_eval" in arguments.notes[0]


@pytest.mark.parametrize("words, sentence", [
    ("--warmup_steps 5", "--warmup_steps is the weight pruner's warm-up in run_squad.py, but no pruner of weights is "
     "chosen; give the learning rate's as --optimizer_warmup_steps."),
    ("--pruner_name lock --warmup_steps 5", "--warmup_steps is the weight pruner's warm-up in run_squad.py, but "),
    ("--beta1 0.9", "--beta1 belongs to platon, sensitivity, but no pruner of weights is chosen; drop it or add "
     "--pruner_name platon."),
    ("--final_threshold 0.1", "--final_threshold belongs to magnitude, movement, platon, random_weights, sensitivity, "
     "but no pruner of weights is chosen; drop it or add --pruner_name platon."),
    ("--pruner_name Magnitude --beta1 0.9", "--beta1 belongs to platon, sensitivity, but the pruner of weights is "
     "magnitude; drop it or choose --pruner_name platon."),
    ("--pruner_name PLATON --pruner magnitude", "--pruner_name platon and magnitude both prune weights, of which a "),
    ("--pruner_name Plato", "There is no pruner plato; choose one of custom_mask, dsp, "),
    ("--doc_stride 0", "--doc_stride is 0; it must be 1 or more."),
    ("--task_name mrpc", "run_squad.py has no flag --task_name"),
])  # fmt: skip
def test_mistakes_get_one_sentence(words, sentence):
    with pytest.raises(HeadPruningError) as refused:
        squad(words)
    assert str(refused.value).startswith(sentence) and "\n" not in str(refused.value)


@pytest.mark.parametrize("script", ["run_squad", "run_glue", "run_dsp"])
@pytest.mark.parametrize("words, sentence", [
    ("--weight_selection foo", "--weight_selection is 'foo'; give global, tensor, N:M such as 2:4 (N of M neighb"),
    ("--weight_selection 2:4 --final_threshold 0.15", "--weight_selection 2:4 keeps 0.5 of the weights, which "
     "contradicts --final_threshold 0.15; leave one of them out."),
    ("--beta1 2", "--beta1 is 2.0; it must be at least 0 and below 1."),
    ("--mask_policy x", "--mask_policy is 'x'; choose one of revive, nested, retained."),
    ("--block_pooling sum", "--block_pooling is 'sum'; choose avg or max."),
    ("--warmup_steps -1", "--warmup_steps is -1.0; it must be a number of updates (1 or more) or a fraction of "),
    ("--deltaT 0", "--deltaT is 0; it must be 1 or more updates."),
    ("--final_threshold 10", "--final_threshold is 10.0; it must be a remaining ratio from 0 to 1."),
    ("--weights_include (", "--weights_include '(' is no regular expression ("),
    ("--fsdp full_shard", "--fsdp splits the model over processes, but there is one; start several with torchrun, "),
    ("--deepspeed zero.json", "Weights are not pruned under DeepSpeed, which splits them over processes; use FSDP2 "),
    ("--pruner dsp --num_of_heads 3 --annealing --initial_temperature -1", "--initial_temperature is -1.0; it must "),
])  # fmt: skip
def test_values_are_checked_before_anything_is_loaded(script, words, sentence):
    """The model that is named does not exist."""
    own = [] if script != "run_dsp" else ["--num_of_heads", "3"]
    line = [*(NEEDED if script == "run_squad" else GLUE), *own, "--do_train", "--use_cpu", "--pruner_name", "platon"]
    words = shlex.split(words.replace("--pruner dsp", "") if script == "run_dsp" else words)
    with pytest.raises(SystemExit) as ended:
        mistakes.main(lambda: parse([*line, *words], script))
    said = str(ended.value.code)
    assert said.startswith(f"error: {sentence}") and said.endswith(".") and "\n" not in said


def test_a_dense_model_is_not_sharded_by_one_process():
    for script, line in (("run_squad", NEEDED), ("run_glue", GLUE)):
        with pytest.raises(HeadPruningError, match="^--fsdp splits the model over processes, but there is one; "):
            parse([*line, "--do_train", "--use_cpu", "--fsdp", "full_shard"], script)


@pytest.mark.parametrize("name", ["PLATON", "platon", "Magnitude", "MOVEMENT"])
@pytest.mark.parametrize("script", ["run_squad", "run_glue"])
def test_pruners_are_named_in_any_case(script, name):
    arguments = parse([*(GLUE if script == "run_glue" else NEEDED), "--pruner_name", name], script)
    assert [pruner.name for pruner in arguments.pruners] == [name.lower()]


class TestWarmUp:
    """One flag, two owners."""

    @pytest.mark.parametrize("words, theirs, ours", [
        ("--warmup_steps 7", 7, None),
        ("--optimizer_warmup_steps 7", 7, None),
        ("--optimizer_warmup_steps 0.2 --warmup_ratio 0.1", 0.2, None),
        ("--warmup_ratio 0.1", 0.1, None),
        ("--pruner_name PLATON --warmup_steps 7", 0, 7),
        ("--pruner_name PLATON --warmup_steps 0.25 --optimizer_warmup_steps 3", 3, 0.25),
        ("--pruner_name PLATON --warmup_ratio 0.1", 0.1, 5400),
        ("--pruner_name lock --warmup_steps 7", 7, None),
        ("--num_of_heads 3 --use_ste --warmup_steps 7", 7, None),
    ])  # fmt: skip
    def test_in_run_glue(self, words, theirs, ours):
        arguments = parse([*GLUE, *shlex.split(words)], "run_glue")
        assert arguments.training.warmup_steps == theirs
        assert getattr(getattr(arguments.of("weights"), "config", None), "warmup_steps", None) == ours
        assert any("is that of the pruner platon" in note for note in arguments.notes) == (ours is not None)

    def test_said_twice(self):
        with pytest.raises(HeadPruningError, match="^--warmup_steps 7 and --optimizer_warmup_steps 3 are both the "):
            parse([*GLUE, "--warmup_steps", "7", "--optimizer_warmup_steps", "3"], "run_glue")


def test_heads_and_weights_in_one_run():
    words = shlex.split("--num_of_heads 12 --annealing --pruner_name PLATON --final_threshold 0.2 --warmup_steps 3")
    for script in ("run_dsp", "run_glue", "run_squad"):
        arguments = parse([*(NEEDED if script == "run_squad" else GLUE), *words], script)
        heads, weights = arguments.pruners
        assert (heads.name, weights.name) == ("dsp", "platon")
        assert (heads.config.num_of_heads, weights.config.final_threshold, weights.config.warmup_steps) == (12, 0.2, 3)
