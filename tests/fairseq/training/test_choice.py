"""The method that a command line of fairseq-train means: by what was typed, not by values."""

import copy

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_plugin.options import build_pruners
from head_pruning import HeadPruningError

JOINT = "--num-of-heads 4 --joint-pruning"


def chosen(words: str, task: str = "translation") -> dict[str, dict]:
    """The options of each pruner by its name, from the command line and from what a checkpoint keeps of it."""
    line = ["data", "--task", f"{task}_head_pruning", "--arch", "transformer_tiny", *words.split()]
    arguments = options.parse_args_and_arch(options.get_training_parser(), line)
    own = convert_namespace_to_omegaconf(copy.deepcopy(arguments)).task
    stored = OmegaConf.create(OmegaConf.to_container(own, resolve=False))
    found, again = ({p.name: vars(p.config) for p in build_pruners(each)} for each in (own, stored))
    assert found == again
    return found


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.5])  # those of the core, of nobody, of the BERT scripts
def test_a_rate_means_dsp_whatever_its_value(rate):
    found = chosen(f"{JOINT} --pruning-lr {rate}")
    assert list(found) == ["dsp"] and found["dsp"]["pruning_lr"] == rate
    for method in ("random", "head_sensitivity"):
        with pytest.raises(HeadPruningError, match=f"--pruning-lr belongs to .* but the pruner is {method}; drop it"):
            chosen(f"--num-of-heads 4 --pruner {method} --pruning-lr {rate}")


def test_what_is_not_typed_has_the_default_and_means_nothing():
    assert list(chosen(JOINT)) == ["head_sensitivity"]
    assert chosen(f"{JOINT} --use-ste")["ste"]["pruning_lr"] == 0.2
    platon = chosen("--weight-pruner platon --final-threshold 0.1 --no-prune-biases")["platon"]
    assert (platon["warmup_steps"], platon["beta1"], platon["prune_biases"]) == (5400, 0.85, False)
    assert chosen("") == {}


def test_a_second_flag_is_typed_too():
    with pytest.raises(HeadPruningError, match="--pruner-warmup-steps belongs to .* but no pruner of weights"):
        chosen("--pruner-warmup-steps 5400")


def test_old_tasks_read_the_same():
    line = ["data", "--task", "language_modeling_head_pruning", "--arch", "transformer_lm"]
    parser = options.get_training_parser()
    arguments = options.parse_args_and_arch(parser, [*line, *JOINT.split(), "--pruning-lr", "0.2"])
    (pruner,) = build_pruners(arguments)
    assert pruner.name == "dsp" and pruner.config.pruning_lr == 0.2
