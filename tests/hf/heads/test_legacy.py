"""Command lines of transformers 3 and 4: every flag they had is understood."""

import dataclasses
import os
import shlex

import pytest
from transformers import TrainingArguments

from head_pruning import HeadPruningError
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.command_line.old_flags import SPELLINGS

NEEDED = shlex.split("--model_name_or_path tiny --task_name mrpc --output_dir out")

# transformers 3.1.0, which the published scripts were written for: all flags of its TrainingArguments.
VERSION_3 = """--overwrite_output_dir | --do_train | --do_eval | --do_predict | --evaluate_during_training |
    --prediction_loss_only | --per_device_train_batch_size 4 | --per_device_eval_batch_size 4 |
    --per_gpu_train_batch_size 4 | --per_gpu_eval_batch_size 4 | --gradient_accumulation_steps 2 |
    --learning_rate 1e-4 | --weight_decay 0.1 | --adam_beta1 0.8 | --adam_beta2 0.9 | --adam_epsilon 1e-6 |
    --max_grad_norm 2 | --num_train_epochs 2 | --max_steps 5 | --warmup_steps 3 | --logging_dir logs |
    --logging_first_step | --logging_steps 5 | --save_steps 5 | --save_total_limit 2 | --no_cuda | --seed 7 |
    --fp16_opt_level O2 | --local_rank -1 | --tpu_num_cores 8 | --tpu_metrics_debug | --debug |
    --dataloader_drop_last | --eval_steps 5 | --past_index -1 | --run_name x | --disable_tqdm True |
    --remove_unused_columns False"""
# What 3.5 to 4.57 had beside and 5 does not.
VERSION_4 = """--evaluation_strategy epoch | --model_parallel | --fp16_backend auto | --half_precision_backend apex |
    --sharded_ddp simple | --warmup_ratio 0.1 | --adafactor | --group_by_length | --mp_parameters x |
    --use_legacy_prediction_loop | --push_to_hub_model_id x/y | --push_to_hub_organization x | --push_to_hub_token x |
    --xpu_backend gloo | --jit_mode_eval | --use_ipex | --fsdp_min_num_params 5 | --include_inputs_for_metrics |
    --torchdynamo inductor | --ray_scope last | --use_mps_device | --fsdp_transformer_layer_cls_to_wrap Layer |
    --save_safetensors False | --dispatch_batches False | --split_batches | --include_tokens_per_second |
    --tp_size 2 | --gradient_checkpointing | --gradient_checkpointing_kwargs '{"use_reentrant":false}'"""
# Flags of the scripts around them.
SCRIPTS = """--use_fast_tokenizer False | --use_auth_token True | --pad_to_max_length False | --server_ip 1.2.3.4 |
    --server_port 80"""

OLD = [flag.strip() for flags in (VERSION_3, VERSION_4, SCRIPTS) for flag in flags.split("|")]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """What a test sets in the environment is gone after it."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")


def training(words: str) -> TrainingArguments:
    return parse([*NEEDED, *shlex.split(words)], "run_glue").training


def name_of(flag: str) -> str:
    return flag.split()[0].removeprefix("--")


@pytest.mark.parametrize("flag", OLD)
def test_every_old_flag_works_or_says_what_it_became(flag):
    name, words = name_of(flag), shlex.split(flag)
    arguments = parse([*NEEDED, *words], "run_glue")
    if arguments.notes:
        (note,) = arguments.notes
        assert note.startswith(f"--{name} ") and note.endswith(".") and "\n" not in note and len(note) < 120
        return
    holder = arguments.training if hasattr(arguments.training, name) else arguments.data
    value = getattr(holder, name)  # it is a flag of today, so it must have arrived
    if name == "gradient_checkpointing_kwargs":
        assert value == {"use_reentrant": False}
    elif len(words) == 1:
        assert value is True
    else:
        assert value == type(value)(words[1] if not isinstance(value, bool) else words[1] == "True")


def test_the_list_above_is_whole():
    assert {spelling.name for spelling in SPELLINGS} <= {name_of(flag) for flag in OLD}
    today = {found.name for found in dataclasses.fields(TrainingArguments)}
    spelled = {spelling.name for spelling in SPELLINGS}
    assert {name_of(flag) for flag in OLD} <= today | spelled | {"overwrite_output_dir"}


@pytest.mark.parametrize("old, today", [
    ("--per_gpu_train_batch_size 4", {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}),
    ("--per_gpu_eval_batch_size 5", {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 5}),
    ("--per_gpu_train_batch_size 4 --per_device_train_batch_size 2", {"per_device_train_batch_size": 2}),
    ("--per_device_train_batch_size 2 --per-gpu-train-batch-size 4", {"per_device_train_batch_size": 4}),
    ("--evaluate_during_training", {"eval_strategy": "steps", "eval_steps": 1000, "do_eval": True}),
    ("--evaluate_during_training --eval_steps 5", {"eval_strategy": "steps", "eval_steps": 5}),
    ("--eval_steps 5 --evaluate_during_training", {"eval_strategy": "steps", "eval_steps": 5}),
    ("--evaluate_during_training False", {"eval_strategy": "no", "eval_steps": None}),
    ("--evaluation_strategy epoch", {"eval_strategy": "epoch"}),
    ("--no_cuda", {"use_cpu": True}),
    ("--no_cuda False", {"use_cpu": False}),
    ("--warmup_ratio 0.1", {"warmup_steps": 0.1}),
    ("--warmup_ratio 0.1 --warmup_steps 5", {"warmup_steps": 5}),
    ("--warmup_steps 5 --warmup_ratio 0.1", {"warmup_steps": 5}),
    ("--adafactor", {"optim": "adafactor"}),
    ("--push_to_hub_model_id x/y --push_to_hub_token z", {"hub_model_id": "x/y", "hub_token": "z"}),
    ("--include_inputs_for_metrics", {"include_for_metrics": ["inputs"]}),
    ("--torchdynamo inductor", {"torch_compile_backend": "inductor"}),
])  # fmt: skip
def test_what_old_flags_became(old, today):
    arguments = training(old)
    for name, value in today.items():
        found = getattr(arguments, name)
        assert getattr(found, "value", found) == value, name


def test_length_grouping():
    arguments = training("--group_by_length")
    if hasattr(arguments, "train_sampling_strategy"):
        assert arguments.train_sampling_strategy == "group_by_length"
    else:
        assert arguments.group_by_length is True


def test_entries_of_a_mapping_join():
    arguments = training("--split_batches --accelerator_config '{\"even_batches\": false}' --dispatch_batches False")
    assert arguments.accelerator_config.dispatch_batches is False
    assert arguments.accelerator_config.even_batches is False
    arguments = training("--fsdp_min_num_params 5 --fsdp_transformer_layer_cls_to_wrap Layer")
    assert arguments.fsdp_config["min_num_params"] == 5
    assert arguments.fsdp_config["transformer_layer_cls_to_wrap"] == ["Layer"]
    with pytest.raises(HeadPruningError, match="--split_batches is an entry of --accelerator_config a.json; write it"):
        training("--accelerator_config a.json --split_batches")


def test_the_logging_folder_reaches_tensorboard():
    parse([*NEEDED, "--logging_dir", "logs"], "run_glue")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"


def test_old_flags_are_checked_as_todays():
    for words, sentence in (
        ("--per_gpu_train_batch_size 1.5", "--per_gpu_train_batch_size: 1.5 is not a whole number"),
        ("--evaluation_strategy sometimes", "--evaluation_strategy: invalid choice: 'sometimes'"),
        ("--warmup_ratio 1.5", "--warmup_ratio: 1.5 is not a share of training"),
    ):
        with pytest.raises(HeadPruningError) as refused:
            training(words)
        assert str(refused.value).startswith(sentence)


def test_old_flags_of_run_michel():
    words = shlex.split("--no_cuda --local_rank -1 --server_ip 1.2.3.4 --server_port 80 --overwrite_output_dir")
    arguments = parse_michel([*NEEDED, *words, "--metric_name", "acc", "--data_subset", "9"])
    assert arguments.no_cuda and arguments.overwrite_output_dir and len(arguments.notes) == 3
    assert (arguments.metric_name, arguments.data_subset) == ("acc", 9)
    assert parse_michel([*NEEDED, "--use_cpu"]).no_cuda
