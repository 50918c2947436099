"""What the README shows runs as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from head_pruning import AttentionSite, UnitMap

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def _blocks() -> list[str]:
    """The indented blocks, without their indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", README, re.MULTILINE)
    return ["\n".join(line[4:] for line in block.splitlines()).strip() + "\n" for block in found]


class Layer(torch.nn.Module):
    """Something with heads: values by head, then an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.out(torch.tanh(self.values(x)))


def test_the_python_example_prunes_to_exactly_k_heads():
    (code,) = [block for block in _blocks() if "PruningSession(" in block]
    model = torch.nn.Sequential(*(Layer() for _ in range(4)))
    sites = (
        AttentionSite(f"{i}", "encoder_self", f"{i}", 4, 2, f"{i}.out", projections=(f"{i}.values",)) for i in range(4)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {
        "model": model,
        "unit_map": UnitMap(tuple(sites)),
        "batches": torch.randn(20, 3, 8),
        "loss_of": lambda model, batch: model(batch).square().sum(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    exec(code, names)
    assert names["mask"].kept == 4 and names["mask"].keep.size == 16
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(model.state_dict()) == list(before) and not torch.equal(model[0].out.weight, before["0.out.weight"])


@pytest.mark.parametrize("command", ["fairseq-train", "fairseq-generate", "fairseq_plugin.run_michel"])
def test_the_commands_parse(command):
    pytest.importorskip("fairseq")
    from fairseq import options

    from fairseq_plugin.run_michel import get_parser

    parsers = {
        "fairseq-train": options.get_training_parser,
        "fairseq-generate": options.get_generation_parser,
        "fairseq_plugin.run_michel": get_parser,
    }
    lines = [
        line
        for block in _blocks()
        for line in block.replace("\\\n", " ").splitlines()
        if command in line and not line.startswith("pip")
    ]
    assert lines
    for line in lines:
        words = shlex.split(line.partition(command)[2])
        args = options.parse_args_and_arch(parsers[command](), words)
        assert args.data.startswith("data-bin")


def test_every_option_in_the_table_exists():
    pytest.importorskip("fairseq")
    from fairseq import options

    line = ["data", "--user-dir", "fairseq_plugin", "--task", "translation_head_pruning", "--arch", "transformer"]
    parser = options.get_training_parser()
    options.parse_args_and_arch(parser, line)
    known = {flag for action in parser._actions for flag in action.option_strings}
    tables = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    shown = set(re.findall(r"--[a-z][a-z0-9-]+", tables)) - {"--signed-importance"}
    assert shown and shown <= known


def test_the_transformers_commands_parse():
    pytest.importorskip("transformers")
    from hf_plugin.command_line.arguments import parse

    lines = [
        line for block in _blocks() for line in block.replace("\\\n", " ").splitlines() if "hf_plugin.run_" in line
    ]
    assert lines
    for line in lines:
        script, _, flags = line.partition("hf_plugin.")[2].partition(" ")
        found = parse([*shlex.split(flags), "--use_cpu"], script)
        if script == "run_squad":
            assert found.weight_method.name == "platon" and found.weight_options["final_threshold"] == 0.1
        else:
            assert found.method.name == "dsp" and found.options["num_of_heads"] == 12


def test_the_trainer_example_prunes_to_twelve_heads(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from head_pruning import HeadMask
    from tests.hf.tiny import arguments, sentences, tiny_bert

    (code,) = [block for block in _blocks() if "HeadPruningTrainer(" in block]
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "input_ids": row["input_ids"][:4], "attention_mask": [1] * 4} for row in sentences(16)]
    exec(code, {"model": tiny_bert(num_hidden_layers=4), "args": arguments(tmp_path), "train_dataset": rows})
    mask = HeadMask.load(tmp_path / "pruned" / "masks.safetensors")
    assert mask.kept == 12 and mask.keep.size == 16


def test_the_surgery_example_cuts_heads_out(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from transformers import AutoModelForSequenceClassification

    from tests.hf.tiny import tiny_bert

    (code,) = [block for block in _blocks() if "hf_plugin.prune_heads(" in block]
    monkeypatch.chdir(tmp_path)
    model = tiny_bert(num_hidden_layers=4, num_attention_heads=6, hidden_size=48)
    dense = sum(parameter.numel() for parameter in model.parameters())
    exec(code, {"model": model})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    left = sum(parameter.numel() for parameter in loaded.parameters())
    assert dense - left == 6 * 8 * (4 * 48 + 3)  # rows with a bias each of q, k, v; columns of the output


def test_the_list_of_families_is_that_of_the_tests():
    pytest.importorskip("transformers")
    from tests.hf.families import covered

    listed = README.partition("`python -m tests.hf.families`")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert listed.replace("\n", " ").rstrip(".").split(", ") == covered()
