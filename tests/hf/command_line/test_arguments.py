"""The scripts' command lines: which flags there are, whose they are, and what they come to."""

import dataclasses
import errno
import json
import os
import re
import shlex
import socket
from dataclasses import dataclass, field

import numpy as np
import pytest
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from head_pruning import AttentionSite, HeadMask, HeadPruningError, Pruner, UnitMap, methods, register_pruner, registry
from head_pruning.registry import option_fields, owners
from hf_plugin.command_line import mistakes
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.defaults import pruner
from hf_plugin.command_line.michel import parse_michel
from tests.hf.manual_lines import FINE_TUNING, JOINT_DSP, MICHEL, PIPELINED_DSP, STE, VOITA

NEEDED = shlex.split("--model_name_or_path tiny --task_name mrpc --output_dir out")


def line(words: str) -> list[str]:
    return NEEDED + shlex.split(words)


def options_of(arguments, kind: str = "heads") -> dict:
    """All options of the pruner of a kind; empty without one."""
    chosen = arguments.of(kind)
    return {} if chosen is None else vars(chosen.config)


def name_of(arguments, kind: str = "heads"):
    return getattr(arguments.of(kind), "name", None)


def help_of(capsys, script: str) -> dict[str, str]:
    """The help's groups by title, each with its text on one line."""
    with pytest.raises(SystemExit) as stopped:
        (parse_michel if script == "run_michel" else parse)(["--help"], *([] if script == "run_michel" else [script]))
    assert stopped.value.code == 0
    blocks = re.split(r"\n\n(?=\S.*:\n)", capsys.readouterr().out)
    return {title: " ".join(text.split()) for title, _, text in (block.partition(":\n") for block in blocks[1:])}


# -- the manual ------------------------------------------------------------------------------------------------------

RECIPE = {"num_of_heads": 12, "pruning_lr": 0.5, "joint_pruning": True}
ANNEALING = {"annealing": True, "initial_temperature": 1000, "final_temperature": 1e-8}


@pytest.mark.parametrize("script, words, method, options, epochs", [
    ("run_dsp", JOINT_DSP, "dsp", {**RECIPE, **ANNEALING, "cooldown_steps": 25000}, 3),
    ("run_dsp", STE, "ste", {**RECIPE, "use_ste": True}, 3),
    ("run_dsp", PIPELINED_DSP, "dsp", {**ANNEALING, "cooldown_steps": 8333, "joint_pruning": False}, 1),
    ("run_voita", VOITA, "voita", {"l0_penalty": 0.0015, "pruning_lr": 0.1, "num_of_heads": None}, 3),
    ("run_glue", FINE_TUNING, None, {}, 3),
], ids=["joint", "ste", "pipelined", "voita", "dense"])  # fmt: skip
def test_the_manuals_lines(script, words, method, options, epochs):
    arguments = parse(words, script)
    assert name_of(arguments) == method
    assert {name: options_of(arguments)[name] for name in options} == options
    if method:
        (built,) = arguments.pruners
        assert vars(pruner(method, **vars(built.config)).config) == vars(built.config)
        assert built.freezes_model == (words is PIPELINED_DSP)
    assert arguments.data.data_dir == "data/MNLI/" and arguments.data.task_name == "MNLI"
    assert arguments.model.cache_dir == "cache/" and arguments.data.max_seq_length == 128
    training = arguments.training
    assert (training.do_train, training.do_eval, training.do_predict) == (True, True, False)
    assert (training.num_train_epochs, training.learning_rate, training.save_steps) == (epochs, 2e-5, 10000)
    assert training.per_device_train_batch_size == 32
    assert arguments.notes == []


def test_the_manuals_line_of_run_michel():
    arguments = parse_michel(MICHEL)
    assert arguments.exact_pruning and arguments.num_of_heads == 12 and isinstance(arguments.num_of_heads, int)
    assert (arguments.model_name_or_path, arguments.tokenizer_name) == ("output/", "bert-base-uncased")
    assert (arguments.output_dir, arguments.cache_dir, arguments.notes) == ("michel_output/", "cache/", [])


def test_what_stands_later_wins():
    arguments = parse([*JOINT_DSP, "--num_of_heads", "3", "--annealing", "False", "--max_steps", "7"], "run_dsp")
    assert options_of(arguments)["num_of_heads"] == 3 and options_of(arguments)["annealing"] is False
    assert arguments.training.max_steps == 7


# -- defaults --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_published_scripts():
    training = parse(line(""), "run_glue").training
    expected = {"learning_rate": 5e-5, "num_train_epochs": 3.0, "warmup_steps": 0, "max_grad_norm": 1.0, "seed": 42}
    expected |= {"logging_steps": 500, "save_steps": 500, "max_steps": -1, "weight_decay": 0.0, "report_to": []}
    expected |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1}
    assert {name: getattr(training, name) for name in expected} == expected
    assert training.eval_strategy.value == "no" and training.save_strategy.value == "steps"
    options = options_of(parse(line("--num_of_heads 3"), "run_dsp"))
    expected = {"pruning_lr": 0.5, "initial_temperature": 10, "final_temperature": 1e-4, "cooldown_steps": 0.6}
    expected |= {"annealing": True, "joint_pruning": False}  # ours: the published script would choose at random
    assert {name: options[name] for name in expected} == expected
    expected |= {"initial_temperature": 1000, "final_temperature": 1e-8, "cooldown_steps": 25000}
    for asked, annealing in (("--annealing", True), ("--final_temperature 1e-8", False)):
        options = options_of(parse(line(f"--num_of_heads 3 {asked}"), "run_dsp"))
        assert {name: options[name] for name in expected} == {**expected, "annealing": annealing}
    voita = options_of(parse(line(""), "run_voita"))
    assert (voita["l0_penalty"], voita["pruning_lr"], voita["l0_pipelined"]) == (0.5, 0.1, True)
    michel = parse_michel(NEEDED)
    assert (michel.num_of_heads, michel.batch_size, michel.max_seq_length, michel.seed) == (12, 32, 128, 42)
    assert (michel.data_subset, michel.exact_pruning, michel.per_example) == (-1, False, False)


def test_all_options_of_a_method_can_be_set():
    for script, extra in (
        ("run_dsp", ""),
        ("run_dsp", "--use_ste"),
        ("run_voita", ""),
        ("run_glue", "--pruner random"),
        ("run_glue", "--pruner subset"),
        ("run_glue", "--pruner head_sensitivity"),
    ):
        name = name_of(parse(line(f"--num_of_heads 3 {extra}"), script))
        for option, found in option_fields([name]).items():
            kinds = {bool: "True", int: "3", float: "0.25", str: "ffn"}
            own = {"count_schedule": "0:0.5", "save_at": "6,3"}.get(option)
            value = own or kinds[_KINDS.get(found.type, found.type)]
            count = "" if option in ("keep_share", "keep_macs") else "--num_of_heads 3"  # in the place of a count
            count += {"finetune_updates": " --save_at 6", "save_at": " --count_schedule 0:0.5"}.get(option, "")
            options = options_of(parse(line(f"{count} {extra} --{option} {value}"), script))
            assert options[option] == {"True": True, "3": 3, "0.25": 0.25}.get(value, value), option


_KINDS = {dict(option_fields())[name].type: kind for name, kind in (("num_of_heads", int), ("l0_penalty", float))}


def test_every_training_argument_of_transformers_is_a_flag(capsys):
    text = help_of(capsys, "run_glue")["training"]
    for found in dataclasses.fields(TrainingArguments):
        moved = re.search(rf"--{found.name}\b", text) is None
        if moved:  # an old spelling that this version still has
            assert found.name in (
                "logging_dir",
                "warmup_ratio",
                "gradient_checkpointing",
                "gradient_checkpointing_kwargs",
            )


def test_no_network_and_no_tracker(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert parse(JOINT_DSP, "run_dsp").training.report_to == []
    assert parse([*JOINT_DSP, "--report_to", "tensorboard"], "run_dsp").training.report_to == ["tensorboard"]


# -- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--num-of-heads 3 --pruning-lr 0.25 --joint-pruning --max-seq-length 64 --per-device-train-batch-size 4",
    "--num_of_heads=3 --pruning_lr=0.25 --joint_pruning=true --max_seq_length=64 --per_device_train_batch_size=4",
    "--num_of_heads 3 --pruning_lr 25e-2 --joint_pruning True --max_seq_length 64 --per_device_train_batch_size 4",
])  # fmt: skip
def test_dashes_equals_signs_and_words_for_switches(words):
    arguments = parse(line(words), "run_dsp")
    options = options_of(arguments)
    assert (options["num_of_heads"], options["pruning_lr"], options["joint_pruning"]) == (3, 0.25, True)
    assert arguments.data.max_seq_length == 64 and arguments.training.per_device_train_batch_size == 4


def test_steps_may_be_a_fraction():
    arguments = parse(line("--num_of_heads 3 --annealing --cooldown_steps 0.6"), "run_dsp")
    assert options_of(arguments)["cooldown_steps"] == 0.6


def test_switches_that_transformers_leaves_open_need_no_value():
    training = parse(line("--greater_is_better --tf32 False"), "run_glue").training
    assert training.greater_is_better is True and training.tf32 is False


def test_what_the_script_itself_takes():
    words = "--overwrite_output_dir --intermediate_masks --max_train_samples 9 --max_eval_samples 8 --overwrite_cache"
    data = parse(line(f"--num_of_heads 3 {words}"), "run_dsp").data
    assert data.overwrite_output_dir and data.intermediate_masks and data.overwrite_cache
    assert (data.max_train_samples, data.max_eval_samples, data.data_dir) == (9, 8, None)
    model = parse(line("--config_name c --tokenizer_name t --model_revision r --token secret"), "run_glue").model
    assert (model.config_name, model.tokenizer_name) == ("c", "t")
    assert model.hub_options() == {"cache_dir": None, "revision": "r", "token": "secret"}


# -- the choice of the method ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, name", [
    ("", None),
    ("--num_of_heads 3", "head_sensitivity"),
    ("--num_of_heads 3 --pruning_lr 0.1", "dsp"),
    ("--num_of_heads 3 --use_ste", "ste"),
    ("--l0_penalty 0.1", "voita"),
    ("--l0_penalty 0.1 --num_of_heads 3", "voita"),
    ("--pruner random --num_of_heads 3", "random"),
    ("--head_mask_file {mask}", "given"),
    ("--pruner dsp --num_of_heads 3 --annealing", "dsp"),
    ("--pruner ste --num_of_heads 3", "ste"),
])  # fmt: skip
def test_run_glue_takes_the_method_named_or_implied(words, name, tmp_path):
    site = AttentionSite("a", "encoder_self", "a", 4, 2, "a.out")
    HeadMask(UnitMap((site,)), np.arange(4) < 2).save(tmp_path / "masks.safetensors")
    arguments = parse(line(words.format(mask=tmp_path / "masks.safetensors")), "run_glue")
    assert name_of(arguments) == name and len(arguments.pruners) == bool(name)


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.5])  # those of the core, of nobody, of these scripts
def test_a_rate_means_dsp_whatever_its_value(rate):
    arguments = parse(line(f"--num_of_heads 3 --joint_pruning --pruning_lr {rate}"), "run_glue")
    assert name_of(arguments) == "dsp" and arguments.of("heads").config.pruning_lr == rate
    with pytest.raises(HeadPruningError, match="--pruning_lr belongs to .* but the pruner is head_sensitivity; drop"):
        parse(line(f"--num_of_heads 3 --pruner head_sensitivity --pruning_lr {rate}"), "run_glue")


def test_run_dsp_and_run_voita_have_their_own():
    assert name_of(parse(line("--num_of_heads 3 --use_ste False"), "run_dsp")) == "dsp"
    assert name_of(parse(line("--num_of_heads 3"), "run_voita")) == "voita"


def test_what_is_switched_off_belongs_to_nobody():
    assert name_of(parse(line("--num_of_heads 3 --use_ste --annealing False"), "run_dsp")) == "ste"


@pytest.mark.parametrize("script, words, sentence, cure", [
    ("run_dsp", "--num_of_heads 3 --l0_penalty 1",
     "--l0_penalty belongs to voita, but the pruner is dsp", "choose run_glue.py --pruner voita"),
    ("run_dsp", "--num_of_heads 3 --random_heads_seed 1",
     "--random_heads_seed belongs to random, but the pruner is dsp", "choose run_glue.py --pruner random"),
    ("run_dsp", "--num_of_heads 3 --use_ste --cooldown_steps 9",
     "--cooldown_steps belongs to dsp, but the pruner is ste", "leave out --use_ste"),
    # The core's default, which is not this script's: set is set.
    ("run_dsp", "--num_of_heads 3 --use_ste --initial_temperature 0.1",
     "--initial_temperature belongs to dsp, but the pruner is ste", "leave out --use_ste"),
    ("run_voita", "--annealing",
     "--annealing belongs to dsp, but the pruner is voita", "choose run_glue.py --pruner dsp"),
    ("run_glue", "--annealing",
     "--annealing belongs to dsp, but no pruner is chosen", "add --pruner dsp"),
    ("run_glue", "--pruning_lr 0.5",
     "--pruning_lr belongs to dsp, ste, subset, voita, but no pruner is chosen", "add --pruner dsp"),
    ("run_glue", "--pruner random --num_of_heads 3 --pruning_lr 0.2",
     "--pruning_lr belongs to dsp, ste, subset, voita, but the pruner is random", "choose --pruner dsp"),
])  # fmt: skip
def test_flags_of_other_methods_are_refused(script, words, sentence, cure):
    with pytest.raises(HeadPruningError) as refused:
        parse(line(words), script)
    assert str(refused.value) == f"{sentence}; drop it or {cure}."


@pytest.mark.parametrize("script, words, sentence", [
    ("run_glue", "--pruner dsq", "There is no pruner dsq; choose one of custom_mask, dsp, "),
    ("run_glue", "--use_ste --l0_penalty 1", "The options fit several pruners (ste, voita); choose one with "),
    ("run_glue", "--intermediate_masks", "--intermediate_masks saves head masks, but no pruner is chosen; drop it "),
    ("run_voita", "--joint_pruning --l0_pipelined", "joint_pruning and l0_pipelined contradict each other; give one "),
])  # fmt: skip
def test_no_pruner_or_two(script, words, sentence):
    with pytest.raises(HeadPruningError) as refused:
        parse(line(words), script)
    assert str(refused.value).startswith(sentence)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, words, sentence", [
    ("run_dsp", line(""), "run_dsp.py needs --num_of_heads; add what is missing."),
    ("run_glue", [], "run_glue.py needs --model_name_or_path, --task_name, --output_dir; add what is missing."),
    ("run_dsp", line("--num_of_heads 12.5"), "--num_of_heads: 12.5 is not a whole number; run_dsp.py --help"),
    ("run_dsp", line("--num_of_heads 3 --pruning_lr big"), "--pruning_lr: big is not a number; run_dsp.py"),
    ("run_dsp", line("--num_of_heads"), "--num_of_heads: expected one argument; run_dsp.py --help lists the flags."),
    ("run_dsp", line("--num_heads 3"), "run_dsp.py has no flag --num_heads (did you mean --num_of_heads?)."),
    ("run_dsp", line("--learning-rat=1"), "run_dsp.py has no flag --learning-rat (did you mean --learning_rate?)."),
    ("run_dsp", line("--num_of_heads 3 --pruner subset"),
     "run_dsp.py has no flag --pruner; its methods are dsp, ste; choose run_glue.py --pruner subset."),
    ("run_voita", line("--pruner=dsp"),
     "run_voita.py has no flag --pruner; its methods are voita; choose run_glue.py --pruner dsp."),
    ("run_dsp", line("--num_of_heads 3 --pruner"),
     "run_dsp.py has no flag --pruner; its methods are dsp, ste; choose run_glue.py --pruner NAME."),
    ("run_glue", line("--zzz 3"), "run_glue.py has no flag --zzz; run_glue.py --help lists the flags."),
    ("run_glue", line("-seed 3"), "run_glue.py has no flag -seed (did you mean --seed?)."),
    ("run_glue", [*NEEDED, "args.json"], "args.json belongs to no flag; flags start with --, and a file "),
    ("run_glue", line("--do_train maybe"), "--do_train: Truthy value expected: got maybe"),
    ("run_glue", line("--eval_strategy sometimes"), "--eval_strategy: invalid choice: 'sometimes' (choose from "),
    ("run_glue", line("--exact_pruning"), "run_glue.py has no flag --exact_pruning; it belongs to run_michel.py."),
    ("run_dsp", line("--per-example"), "run_dsp.py has no flag --per-example; it belongs to run_michel.py."),
    ("run_voita", line("--metric_name=acc"), "run_voita.py has no flag --metric_name; it belongs to run_michel.py."),
    ("run_glue", line("--batch_size 8"), "run_glue.py has no flag --batch_size (did you mean --"),
    ("run_glue", line("--max_seq_length 0"), "--max_seq_length is 0; it must be 1 or more."),
    ("run_glue", line("--max_eval_samples -1"), "--max_eval_samples is -1; it must be 1 or more."),
    ("run_glue", line("--load_best_model_at_end"), "The training flags do not fit: --load_best_model_at"),
    ("run_glue", line("--fp16 --bf16"), "The training flags do not fit: "),
])  # fmt: skip
def test_mistakes_get_one_sentence(script, words, sentence):
    with pytest.raises(HeadPruningError) as refused:
        parse(words, script)
    message = str(refused.value)
    assert message == sentence or not sentence.endswith(".") and message.startswith(sentence)
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("words, sentence", [
    ([], "run_michel.py needs --model_name_or_path, --task_name, --output_dir; add what is missing."),
    (line("--num_of_heads 12.0"), "--num_of_heads: 12.0 is not a whole number; run_michel.py --help lists the flags."),
    (line("--num_of_heads 0"), "--num_of_heads is 0; it must be 1 or more."),
    (line("--batch_size -3"), "--batch_size is -3; it must be 1 or more."),
    (line("--data_subset 0"), "--data_subset is 0; it must be 1 or more."),
    (line("--max_train_samples 0"), "--max_train_samples is 0; it must be 1 or more."),
    (line("--exact"), "run_michel.py has no flag --exact"),
    (line("--annealing"), "run_michel.py has no flag --annealing"),
])  # fmt: skip
def test_mistakes_in_run_michel(words, sentence):
    with pytest.raises(HeadPruningError) as refused:
        parse_michel(words)
    assert str(refused.value).startswith(sentence)


def test_the_scripts_end_with_the_sentence(capsys):
    def mistaken():
        raise HeadPruningError("--num-of-heads is 0, see models--x--num-of-heads; add --pruner, --load-it or -- this.")

    with pytest.raises(SystemExit) as stopped:
        mistakes.main(mistaken)
    expected = "error: --num_of_heads is 0, see models--x--num-of-heads; add --pruner, --load-it or -- this."
    assert stopped.value.code == expected  # Python prints it to stderr and exits with 1
    done = []
    mistakes.main(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        mistakes.main(lambda: 1 / 0)


def test_full_disks_and_interruptions_end_with_a_sentence(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as stopped:
        mistakes.main(lambda: fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors")))
    assert stopped.value.code == "error: out/model.safetensors: No space left on device."
    with pytest.raises(SystemExit) as stopped:
        mistakes.main(lambda: fail(KeyboardInterrupt()))
    assert stopped.value.code == 130 and "the last checkpoint" in capsys.readouterr().err
    with pytest.raises(OSError):  # no mistake of the user's that is known
        mistakes.main(lambda: fail(OSError("odd")))


# -- files -----------------------------------------------------------------------------------------------------------

VALUES = {
    "model_name_or_path": "tiny",
    "task_name": "MNLI",
    "output_dir": "out",
    "num-of-heads": 12,
    "annealing": True,
    "joint_pruning": False,
    "final_temperature": 1e-8,
    "learning_rate": 2e-5,
    "max_steps": -1,
    "data_dir": None,
    "label_names": ["labels"],
    "report_to": ["tensorboard"],
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "no_cuda": True,
}


def write(path, text) -> str:
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["args.json", "args.yaml", "args.yml"])
def test_a_file_of_arguments(tmp_path, name):
    text = json.dumps(VALUES)
    if name != "args.json":
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in VALUES.items())
    path = write(tmp_path / name, text)
    arguments = parse([path], "run_dsp")
    options, training = options_of(arguments), arguments.training
    assert (options["num_of_heads"], options["annealing"], options["joint_pruning"]) == (12, True, False)
    assert (options["final_temperature"], training.learning_rate, training.max_steps) == (1e-8, 2e-5, -1)
    assert (training.label_names, training.report_to) == (["labels"], ["tensorboard"])
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and arguments.data.data_dir is None
    assert training.use_cpu is True and len(arguments.notes) == 1
    later = parse([path, "--learning_rate", "1e-5", "--annealing", "False", "--label_names", "y"], "run_dsp")
    assert (later.training.learning_rate, options_of(later)["annealing"]) == (1e-5, False)
    assert later.training.label_names == ["y"]


def test_a_file_is_as_good_as_the_line(tmp_path):
    words = [
        word.removeprefix("--") for word in PIPELINED_DSP if word not in ("--do_train", "--do_eval", "--annealing")
    ]
    values = dict(zip(words[::2], words[1::2])) | {"do_train": True, "do_eval": True, "annealing": True}
    ours, theirs = parse([write(tmp_path / "a.json", values)], "run_dsp"), parse(PIPELINED_DSP, "run_dsp")
    assert (ours.model, ours.data, options_of(ours)) == (theirs.model, theirs.data, options_of(theirs))
    assert ours.training.to_dict() == theirs.training.to_dict()


def test_what_transformers_writes_of_its_arguments_can_be_read(tmp_path):
    path = tmp_path / "a.json"
    written = parse(line("--learning_rate 1e-4 --eval_strategy steps --eval_steps 5 --use_cpu"), "run_glue").training
    path.write_text(written.to_json_string(), encoding="utf-8")
    assert parse([str(path), *NEEDED], "run_glue").training.to_dict() == written.to_dict()
    for value, option in (("", []), ("underflow_overflow", [DebugOption.UNDERFLOW_OVERFLOW])):
        for listed in (value, [value] if value else []):
            values = {**json.loads(written.to_json_string()), "debug": listed}
            assert parse([write(path, values), *NEEDED], "run_glue").training.debug == option


def test_a_file_for_run_michel(tmp_path):
    values = {"model_name_or_path": "tiny", "task_name": "mrpc", "output_dir": "out", "exact_pruning": True}
    arguments = parse_michel([write(tmp_path / "a.json", values), "--num_of_heads", "4"])
    assert arguments.exact_pruning and arguments.num_of_heads == 4


def test_yamls_own_words(tmp_path):
    text = "model_name_or_path: tiny\ntask_name: mrpc\noutput_dir: out\nsave_strategy: no\ndo_train: yes\n"
    training = parse([write(tmp_path / "a.yaml", text + "learning_rate: 1e-4\n")], "run_glue").training
    assert (training.save_strategy.value, training.do_train, training.learning_rate) == ("no", True, 1e-4)


def test_a_switch_that_is_on_can_be_switched_off():
    assert parse(line(""), "run_glue").training.remove_unused_columns is True
    assert parse(line("--no_remove_unused_columns"), "run_glue").training.remove_unused_columns is False


@pytest.mark.parametrize("name, text, sentence", [
    ("a.json", '{"task_name": ', "does not parse (Expecting value: line 1 column 15 (char 14)); correct it there."),
    ("a.yaml", "task_name: [", "does not parse (while parsing a flow node"),
    ("a.yaml", "seed: 1\nseed: 2", "does not parse (line 2 has seed for the second time); correct it there."),
    ("a.json", "[1]", "holds no names and values; write it as name: value."),
    ("a.yaml", "", "holds no names and values"),
    ("a.json", '{"num_head": 3}', "has num_head, but run_dsp.py has no flag --num_head (did you mean --num_of"),
    ("a.json", '{"help": true}', "has help, but run_dsp.py has no flag --help"),
])  # fmt: skip
def test_mistakes_in_files(tmp_path, name, text, sentence):
    path = write(tmp_path / name, text)
    with pytest.raises(HeadPruningError) as refused:
        parse([path], "run_dsp")
    assert str(refused.value).startswith(f"{path} {sentence}") and "\n" not in str(refused.value)


def test_more_mistakes_in_files(tmp_path):
    with pytest.raises(HeadPruningError, match=r"gone.json cannot be read \(No such file or directory\); check"):
        parse([str(tmp_path / "gone.json")], "run_dsp")
    for value, words in (([12], "num_of_heads in .* is a list; give one value"), ("x", "x is not a whole number")):
        with pytest.raises(HeadPruningError, match=words):
            parse([write(tmp_path / "a.json", {**VALUES, "num-of-heads": value})], "run_dsp")


# -- help ------------------------------------------------------------------------------------------------------------


def with_own_options(kind: str, word: str) -> list[str]:
    """The titles of the methods that have options of their own."""
    known = methods(kind)
    fields = {name: [f.name for f in dataclasses.fields(known[name].config)] for name in sorted(known)}
    alone = {name for name in known if any(owners(option) == [name] for option in fields[name])}
    return [f"{word} {name}" for name in fields if name in alone]


def test_the_help_has_a_group_per_purpose_and_per_method(capsys):
    groups = help_of(capsys, "run_glue")
    titles = [title.partition(" (")[0] for title in groups]
    assert titles == [
        *("options", "model", "data", "run", "training", "options of several pruners"),
        *with_own_options("heads", "pruner"),
        "options of several pruners of weights",
        *with_own_options("weights", "pruner"),
        *("options of several distillers", *with_own_options("distils", "distiller")),
        *with_own_options("quantizes", "quantizer"),
        "old spellings",
    ]
    text = dict(zip(titles, groups.values()))
    assert "--num_of_heads N number of heads to keep" in text["options of several pruners"]
    assert (
        "stays constant [dsp, ste, subset, voita] (default: 0.5 (dsp, ste, subset), 0.1 (voita))"
        in text["options of several pruners"]
    )
    assert (
        "attention layer [dsp, head_sensitivity, random, ste, subset, unit_magnitude, voita] (default: 0)"
        in text["options of several pruners"]
    )
    assert "--cooldown_steps X" in text["pruner dsp"] and "in the BERT scripts 25000" in text["pruner dsp"]
    assert "--initial_temperature X temperature at the first update; default with" in text["pruner dsp"]
    assert "--l0_penalty X" in text["pruner voita"] and "--use_ste" in text["pruner ste"]
    assert "--model_name_or_path VALUE folder or hub name of the model to start from (required)" in text["model"]
    assert "--per_gpu_train_batch_size" in text["old spellings"] and "--learning_rate X" in text["training"]
    everything = " ".join(text.values())
    for option in option_fields():
        assert len(re.findall(rf"--{option}(?= )", everything)) >= 1, option
    assert not re.search(r"--[a-z0-9_]*-[a-z]", everything)


def test_the_help_of_run_dsp_and_run_voita_shows_what_they_take(capsys):
    groups = help_of(capsys, "run_dsp")
    shown = [title.partition(" (")[0] for title in groups if title.startswith("pruner")]
    assert shown == ["pruner dsp", "pruner ste", *with_own_options("weights", "pruner")]
    several = groups["options of several pruners"]
    assert "(K) [dsp, ste] (required)" in several and "stays constant [dsp, ste] (default: 0.5)" in several
    everything = " ".join(groups.values())
    assert "--l0_penalty" not in everything and "--random_heads_seed" not in everything
    groups = help_of(capsys, "run_voita")
    (voita,) = (text for title, text in groups.items() if title.startswith("pruner voita"))
    assert "fewer heads (default: 0.5)" in voita and "annealing" not in " ".join(groups.values())


def test_the_help_of_run_michel(capsys):
    groups = help_of(capsys, "run_michel")
    assert list(groups) == ["options", "model", "data and run", "pruning", "old spellings"]
    assert "--num_of_heads N heads (or units) to remove per round (default: 12)" in groups["pruning"]


# -- a method of somebody else's -------------------------------------------------------------------------------------


@dataclass
class ShineConfig:
    """Options of a method that the scripts have never heard of."""

    shine: float = field(default=0.5, metadata={"help": "how much it shines, 10% to 100%"})
    glossy: bool = field(default=False, metadata={"help": "shine on both sides of every head"})


class ShinePruner(Pruner):
    """Keeps what glitters.

    And no more.
    """

    name = "shine"


@pytest.fixture
def shine(monkeypatch):
    """A method registered as any other."""
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register_pruner(
        name="shine", config=ShineConfig, pruner=ShinePruner, selected_by=lambda options: options.shine > 0.5
    )


def test_a_registered_method_appears_and_can_be_chosen(shine, capsys):
    group = help_of(capsys, "run_glue")["pruner shine (Keeps what glitters)"]
    assert "--shine X how much it shines, 10% to 100% (default: 0.5) --glossy" in group
    named = parse(line("--pruner shine --glossy"), "run_glue")
    assert options_of(named) == {"shine": 0.5, "glossy": True} and isinstance(named.of("heads"), ShinePruner)
    assert options_of(parse(line("--shine 0.75"), "run_glue")) == {"shine": 0.75, "glossy": False}
    with pytest.raises(HeadPruningError, match="^--glossy belongs to shine, but the pruner is dsp; drop it or choose"):
        parse(line("--num_of_heads 3 --glossy"), "run_dsp")
    assert not any("shine" in title for title in help_of(capsys, "run_dsp"))
    assert ShineConfig.__dataclass_fields__["shine"].metadata["help"].count("%") == 2  # left as it was


def test_an_option_that_is_already_a_flag_is_refused(shine):
    clash = dataclasses.make_dataclass("Clash", [("seed", int, field(default=1, metadata={"help": "another seed"}))])
    register_pruner(name="clash", config=clash, pruner=ShinePruner)
    with pytest.raises(HeadPruningError, match="The option seed of the pruner clash is also a flag of the script"):
        parse(line(""), "run_glue")
