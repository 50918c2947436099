"""What the README and the pages of docs/ show works as it stands there.

Python blocks are run; command lines are read by the parsers of their programs, and those of ``head-pruning`` are run.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from head_pruning import AttentionSite, HeadMask, UnitMap, registry
from tests.documents import PAGES, ROOT, blocks, commands, prose, read, registered

# Commands that are neither read by a parser nor run here.
NOT_RUN = {
    "pip install": "changes the environment; test_wheel.py installs the package",
    "make": "sets up an environment; only its targets are looked up",
    "torchrun": "starts a process for each GPU; test_two_ranks.py runs two without one",
}


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= 8000


# -- Python ----------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Something with heads: values by head, then an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.out(torch.tanh(self.values(x)))


def _layers() -> tuple[torch.nn.Module, UnitMap]:
    """16 heads in 4 layers."""
    model = torch.nn.Sequential(*(Layer() for _ in range(4)))
    sites = (
        AttentionSite(f"{i}", "encoder_self", f"{i}", 4, 2, f"{i}.out", projections=(f"{i}.values",)) for i in range(4)
    )
    return model, UnitMap(tuple(sites))


def _plain_loop(code, folder):
    model, unit_map = _layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {
        "model": model,
        "unit_map": unit_map,
        "batches": torch.randn(20, 3, 8),
        "loss_of": lambda model, batch: model(batch).square().sum(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    exec(code, names)
    assert names["mask"].kept == 4 and names["mask"].keep.size == 16
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(model.state_dict()) == list(before) and not torch.equal(model[0].out.weight, before["0.out.weight"])


def _described_sites(code, folder):
    names = {}
    exec(code, names)
    assert names["unit_map"].num_heads == 24 and len(names["unit_map"].layers) == 6


def _masks(code, folder):
    _, unit_map = _layers()
    HeadMask(unit_map, torch.arange(16).numpy() < 4).save("masks.safetensors")
    HeadMask(unit_map, torch.arange(16).numpy() < 8).save("other.safetensors")
    exec(code, {})


def _trainer(code, folder):
    transformers = pytest.importorskip("transformers")
    from tests.hf.tiny import arguments, sentences, tiny_bert

    rows = [{**row, "input_ids": row["input_ids"][:4], "attention_mask": [1] * 4} for row in sentences(16)]
    model = tiny_bert(num_hidden_layers=4)
    names = {"model": model, "args": arguments(folder), "train_dataset": rows, "Trainer": transformers.Trainer}
    exec(code, names)
    mask = HeadMask.load(folder / "pruned" / "masks.safetensors")
    assert mask.kept == 12 and mask.keep.size == 16
    transformers.AutoModelForSequenceClassification.from_pretrained(folder / "pruned")


def _surgery(code, folder):
    transformers = pytest.importorskip("transformers")
    from tests.hf.tiny import tiny_bert

    model = tiny_bert(num_hidden_layers=4, num_attention_heads=6, hidden_size=48)
    dense = sum(parameter.numel() for parameter in model.parameters())
    exec(code, {"model": model})
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "small")
    left = sum(parameter.numel() for parameter in loaded.parameters())
    assert dense - left == 6 * 8 * (4 * 48 + 3)  # rows with a bias each of q, k, v; columns of the output


def _units(code, folder):
    pytest.importorskip("transformers")
    from hf_plugin import unit_map
    from tests.hf.tiny import tiny_bert

    model = tiny_bert(num_hidden_layers=4, num_attention_heads=8, hidden_size=64, intermediate_size=1200)
    exec(code, {"model": model})
    left = unit_map(model)
    assert [site.width for site in left.feed_forward] == [200, 1200, 1200, 1200]
    assert [site.heads for site in left.attention] == [8, 8, 8, 6]


def _mapped_by_hand(code, folder):
    pytest.importorskip("transformers")
    from tests.hf.tiny import tiny_bert

    names = {"model": tiny_bert()}
    exec(code, names)
    assert [site.name for site in names["mapped"].attention] == ["bert.encoder.layer.1.attention"]


def _snippet(code, folder):
    transformers = pytest.importorskip("transformers")
    from transformers import BertConfig, BertForPreTraining

    small = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    sparse = BertForPreTraining(small)
    for parameter in sparse.bert.encoder.parameters():
        if parameter.dim() > 1:
            parameter.data[..., ::2] = 0.0
    sparse.save_pretrained("Intel/bert-base-uncased-sparse-90-unstructured-pruneofa")
    trained = []

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(input_ids=torch.arange(6)[None]).start_logits.square().sum().backward()
        optimizer.step()
        trained.append(model)

    assert "# Train your model..." in code
    exec(code.replace("# Train your model...", "train(model)"), {"train": train})
    (model,) = trained
    assert isinstance(model, transformers.BertForQuestionAnswering)
    query = model.bert.encoder.layer[0].attention.self.query.weight
    assert not query[:, ::2].any() and query[:, 1::2].all() and query.grad.any()


# A string that tells a block from all others, and what runs it and looks at the outcome.
PYTHON = {
    "PruningSession(model, unit_map": _plain_loop,
    "unit_map = UnitMap(": _described_sites,
    'HeadMask.load("masks.safetensors")': _masks,
    "HeadPruningTrainer(": _trainer,
    "HeadPruningCallback(": _trainer,
    "hf_plugin.prune_heads(": _surgery,
    "by_hand = AttentionSite(": _mapped_by_hand,
    "blocks = unit_map(model).feed_forward": _units,
    "pruning_scheduler_factory(": _snippet,
}
# Blocks that follow each other in one file.
TOGETHER = {"docs/adding-a-method.md"}


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.page not in TOGETHER], ids=str)
def test_a_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = [run for sign, run in PYTHON.items() if sign in block.text]
    run(block.text, tmp_path)


def test_every_kind_of_python_block_is_shown():
    shown = "\n".join(block.text for block in blocks("python"))
    assert all(sign in shown for sign in PYTHON)


def test_the_method_that_is_added_prunes(monkeypatch, tmp_path):
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    module = tmp_path / "added.py"  # dataclasses look their module up
    module.write_text("\n".join(b.text for b in blocks("python") if b.page in TOGETHER), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("added", module)
    added = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "added", added)
    spec.loader.exec_module(added)
    model, unit_map = _layers()
    method = registry.methods()["sigmoid"]
    options = argparse.Namespace(num_of_heads=5, joint_pruning=True)
    from head_pruning import PruningSession, build_pruner

    session = PruningSession(model, unit_map, [build_pruner(method, options)]).attach()
    before = session.pruners[0].logits.copy()
    session.before_update(0)
    session.loss(model(torch.randn(3, 8)).square().sum()).backward()
    session.after_backward()
    session.before_step()
    session.after_step()
    assert (session.pruners[0].logits != before).all() and session.harden().kept == 5


# -- command lines ---------------------------------------------------------------------------------------------------


def _lines(program: str) -> list[list[str]]:
    """The words after a program's name of every line that calls it."""
    found = [
        shlex.split(line)[len(program.split()) :] for _, line in commands() if f"{line} ".startswith(f"{program} ")
    ]
    assert found, program
    return found


READ = {
    "fairseq-train", "fairseq-generate", "fairseq-preprocess", "python -m fairseq_plugin.run_michel",
    "python -m hf_plugin.run_dsp", "python -m hf_plugin.run_squad", "python -m hf_plugin.run_glue", "head-pruning",
    "python -m hf_plugin.run_ner", "python -m hf_plugin.run_swag",
    "python -m prepare.glue", "python -m prepare.squad", "python -m prepare.demo_data",
    "python -m prepare.demo_sentiment", "prepare/prepare-iwslt14.sh", "python -m prepare.wikipedia",
    "python -m hf_plugin.run_pretraining",
}  # fmt: skip


def test_every_command_is_read_or_left_out_for_a_reason():
    for page, line in commands():
        assert any(f"{line} ".startswith(f"{program} ") for program in (*READ, *NOT_RUN)), f"{page}: {line}"


@pytest.mark.parametrize("command", ["fairseq-train", "fairseq-generate", "python -m fairseq_plugin.run_michel"])
def test_the_fairseq_commands_parse(command):
    pytest.importorskip("fairseq")
    from fairseq import options

    from fairseq_plugin.run_michel import get_parser

    parsers = {
        "fairseq-train": options.get_training_parser,
        "fairseq-generate": options.get_generation_parser,
        "python -m fairseq_plugin.run_michel": get_parser,
    }
    for words in _lines(command):
        args = options.parse_args_and_arch(parsers[command](), words)
        assert args.data.startswith("data-bin")


def test_the_preprocessing_command_parses():
    pytest.importorskip("fairseq")
    from fairseq import options

    for words in _lines("fairseq-preprocess"):
        assert options.get_preprocessing_parser().parse_args(words).destdir == "data-bin"


@pytest.mark.parametrize("script", ["run_dsp", "run_squad", "run_ner", "run_swag"])
def test_the_transformers_commands_parse(script):
    pytest.importorskip("transformers")
    from hf_plugin.command_line.arguments import parse

    for words in _lines(f"python -m hf_plugin.{script}"):
        found = parse([*words, "--use_cpu"], script)
        if script == "run_squad":
            assert found.of("weights").name == "platon" and found.of("weights").config.final_threshold == 0.1
        elif script != "run_dsp":
            assert found.of("weights").name == "lock"
        else:
            assert found.of("heads").name == "dsp" and found.of("heads").config.num_of_heads == 12


def test_the_commands_of_distillation_parse():
    pytest.importorskip("transformers")
    from hf_plugin.command_line.arguments import parse

    found = [parse([*words, "--use_cpu"], "run_glue") for words in _lines("python -m hf_plugin.run_glue")]
    named = [[pruner.name for pruner in each.pruners] for each in found]
    alone = ["head_sensitivity"]  # in the README and in transformers.md
    assert named == [alone, [], ["spd_magnitude", "spd"], ["dsp", "logits"], alone]


def test_the_commands_of_pretraining_parse():
    pytest.importorskip("transformers")
    from hf_plugin.command_line.arguments import parse
    from prepare import wikipedia

    for words in _lines("python -m hf_plugin.run_pretraining"):
        assert parse([*words, "--use_cpu"], "run_pretraining").data.data_dir == "data/wikipedia"
    for words in _lines("python -m prepare.wikipedia"):
        assert wikipedia.parse(words).data_dir == Path("data/wikipedia")


def test_the_preparing_commands_parse():
    pytest.importorskip("transformers")
    from prepare import glue, squad

    for words in _lines("python -m prepare.glue"):
        assert [task.folder for task in glue.parse(words).tasks] == ["MNLI"]
    for words in _lines("python -m prepare.squad"):
        squad.parse(words)
    for demo in ("demo_data", "demo_sentiment"):
        for words in _lines(f"python -m prepare.{demo}"):
            printed = _help(sys.executable, "-m", f"prepare.{demo}")
            assert all(word in printed for word in words if word.startswith("--"))
    for words in _lines("prepare/prepare-iwslt14.sh"):
        assert words == [] and "--archive" in _help("prepare/prepare-iwslt14.sh")


def _help(*command: str) -> str:
    environment = {**os.environ, "PYTHON": sys.executable}  # which the shell script calls
    done = subprocess.run([*command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    shown = [words[0] for words in _lines("make")]
    shown += [target for page in PAGES for target in re.findall(r"`make ([a-z-]+)`", read(page))]
    assert set(shown) <= targets


def test_every_requirements_file_exists():
    for words in _lines("pip install"):
        for flag, name in zip(words, words[1:]):
            assert flag != "-r" or (ROOT / name).is_file()


def test_every_module_that_is_called_exists():
    called = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", read(page))}
    assert len(called) > 15
    for name in called:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_the_head_pruning_commands_run(tmp_path, monkeypatch, capsys):
    """On models that a run left; the lines in the order of the pages, for one may read what another wrote."""
    pytest.importorskip("transformers")
    from head_pruning.cli import build_parser, main
    from hf_plugin import save_pruned, unit_map
    from tests.hf.tiny import tiny_bert

    monkeypatch.chdir(tmp_path)
    model = tiny_bert()
    mask = HeadMask(unit_map(model), torch.arange(8).numpy() % 4 == 0)
    for name in ("pruned", "dsp_output", "voita_output", "START", "glue-sweep"):
        save_pruned(model, mask, name, method="dsp")
        Path(name, "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    Path("michel_masks").mkdir()
    mask.save("michel_masks/heads36.safetensors")
    ran = 0
    for words in sorted(_lines("head-pruning"), key=lambda words: words[0] != "export"):
        build_parser().parse_args(words)
        if words[0] == "export" and words[1].endswith(".pt"):
            continue  # a checkpoint of fairseq: tests/fairseq/exporting/test_export.py runs this
        if words[0] == "benchmark":
            words = [*words, "--rounds", "1"]
        if words[0] == "sweep" and words[1] != "show":
            (plan,) = blocks("yaml")
            Path(words[1]).write_text(plan.text, encoding="utf-8")
            words = [*words, "--dry-run"]
        main(words)
        ran += 1
    assert ran >= 6 and Path("small/config.json").is_file() and Path("OTHER/config.json").is_file()
    assert "times as fast" in capsys.readouterr().out


# -- flags -----------------------------------------------------------------------------------------------------------

# Flags of programs that are not this project's, or of its Makefile's.
OTHERS = {"--no-build-isolation", "--no-deps", "--nproc_per_node"}  # of pip and torchrun


@pytest.fixture(scope="module")
def known_flags():
    """Every flag that a command of this project has, and every option of the registered methods."""
    pytest.importorskip("fairseq")
    pytest.importorskip("transformers")
    from fairseq import options

    from fairseq_plugin.run_michel import get_parser
    from head_pruning.cli import build_parser
    from hf_plugin.command_line.arguments import parse
    from hf_plugin.command_line.michel import parse_michel
    from hf_plugin.command_line.scripts import SCRIPTS
    from prepare import wikipedia

    trainings = [options.get_training_parser() for _ in range(2)]
    for training, task in zip(
        trainings, ("translation_head_pruning --arch transformer", "language_modeling --arch transformer_lm")
    ):
        line = f"data --user-dir fairseq_plugin --task {task} --optimizer adam --lr-scheduler inverse_sqrt"
        options.parse_args_and_arch(training, [*line.split(), "--criterion", "label_smoothed_cross_entropy"])
    parsers = [*trainings, options.get_generation_parser(), options.get_preprocessing_parser(), get_parser()]
    commands = build_parser()._subparsers._group_actions[0].choices.values()
    found = {flag for parser in (*parsers, *commands) for action in parser._actions for flag in action.option_strings}
    printed = io.StringIO()
    for script in (*SCRIPTS, "run_michel"):
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            parse_michel(["--help"]) if script == "run_michel" else parse(["--help"], script)
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        wikipedia.parse(["--help"])
    found |= set(re.findall(r"--\w+", printed.getvalue()))
    for path in (*(ROOT / "prepare").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', read(path)))
    options = [name for method in registered().values() for name in method.config.__dataclass_fields__]
    return found | {f"--{name.replace('_', '-')}" for name in options}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page, known_flags):
    code = re.findall(r"`[^`\n]+`", prose(page)) + [
        block.text for block in blocks("sh") if block.page.endswith(page.name)
    ]
    shown = {flag for text in code for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text)}
    assert shown - OTHERS <= known_flags
