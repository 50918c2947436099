"""The head-pruning command, as its users call it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from head_pruning import AttentionSite, FeedForwardSite, HeadMask, UnitMap
from head_pruning.cli import main

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
PER_HEAD = 4 * 4 * 16 + 3 * 4  # parameters: q, k, v with biases, and the output's columns


def _run(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "head_pruning.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def call(capsys):
    """Runs the command in this process; what it printed, or its error."""

    def run(*arguments):
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run


@pytest.fixture
def unit_map():
    return UnitMap(
        tuple(
            AttentionSite(f"layers.{i}.attn", "encoder_self", f"layers.{i}", 4, 2, f"layers.{i}.attn.out")
            for i in range(2)
        )
    )


@pytest.fixture(scope="session")
def pruned(tmp_path_factory):
    """A folder that a run left: 2 layers of 4 heads, of which 0 and 2 of the first layer stay."""
    transformers = pytest.importorskip("transformers")
    from hf_plugin import save_pruned
    from hf_plugin import unit_map as map_units

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, vocab_size=40, max_position_embeddings=64, initializer_range=0.3)
    ).eval()
    mask = HeadMask(map_units(model), np.array([1, 0, 1, 0, 0, 0, 0, 0]))
    folder = tmp_path_factory.mktemp("models") / "pruned"
    save_pruned(model, mask, folder, method="dsp", options={"num_of_heads": 2})
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def compact(pruned):
    """Its compact export."""
    target = pruned.parent / "compact"
    main(["export", str(pruned), str(target), "--to", "compact"])
    return target


@pytest.fixture
def batch():
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 4:] = 0
    types[0, 3:], types[2, 5:] = 1, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.fixture
def expected(pruned, batch):
    """Logits of the masked model, which plain transformers loads."""
    from transformers import AutoModelForSequenceClassification

    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(pruned).eval()(**batch).logits


def test_user_dir_prints_the_plugin_folder_and_errors_end_the_command_with_status_1(tmp_path):
    done = _run("show", tmp_path / "nothing.safetensors")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    done = _run("user-dir")
    assert done.returncode == 0
    assert Path(done.stdout.strip()).samefile(ROOT / "fairseq_plugin")


@pytest.mark.parametrize("words", [["pruners"], ["user-dir", "--help"]])
def test_a_reader_that_has_enough_gets_no_error(words):
    command = [sys.executable, "-m", "head_pruning.cli", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1 or "--help" in words  # argparse passes it over itself where nothing is buffered


def test_pruners_lists_every_method_with_its_options(call):
    printed = call("pruners")
    options = ("--num-of-heads", "--cooldown-steps", "--final-threshold")
    for name in ("dsp (heads):", "ste (heads):", "platon (weights):", *options):
        assert name in printed


def test_show_prints_compares_and_draws(unit_map, tmp_path, call):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    HeadMask(unit_map, np.array([1, 1, 0, 0, 0, 0, 0, 1])).save(first)
    HeadMask(unit_map, np.array([1, 0, 0, 0, 0, 0, 1, 1])).save(second)
    picture = tmp_path / "masks.png"
    for command in (("show", first), ("diff", first, second), ("inspect", tmp_path)):
        assert "masks.txt is no name of a picture" in call(*command, "--plot", tmp_path / "masks.txt")
    printed = call("show", first, second, "--plot", picture)
    assert "##.." in printed and "3/8" in printed and "0.50" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_said_to_be_where_it_is(unit_map, tmp_path, capsys):
    HeadMask(unit_map, np.arange(8) < 3).save(tmp_path / "a.safetensors")
    main(["show", str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / "heads.v2")])
    assert capsys.readouterr().err == f"the picture is in {tmp_path / 'heads.v2.png'}\n"
    assert (tmp_path / "heads.v2.png").is_file()


def test_show_and_diff_compare_masks_of_heads_with_masks_of_units_too(unit_map, tmp_path, call):
    blocks = tuple(FeedForwardSite(f"layers.{i}.ffn", f"layers.{i}", 6, f"l.{i}.in", f"l.{i}.out") for i in range(2))
    heads = UnitMap(unit_map.attention, blocks)
    HeadMask(heads, np.array([1, 1, 0, 0, 0, 0, 0, 1])).save(tmp_path / "heads.safetensors")
    both = HeadMask(heads.numbering("both"), np.array([1, 0, 0, 0, 0, 0, 1, 1] + [1, 0, 0] * 4))
    both.save(tmp_path / "both.safetensors")
    for first, second in (("heads", "both"), ("both", "heads")):
        files = tmp_path / f"{first}.safetensors", tmp_path / f"{second}.safetensors"
        printed = call("show", *files, "--plot", tmp_path / f"{first}.png").splitlines()
        only = ["9", "1"] if first == "heads" else ["1", "9"]
        assert printed[-1].split() == [str(files[1]), "6", *only, "0.38"]
        told = json.loads(call("diff", *files, "--json"))
        assert [told["both"], told["only_first"], told["only_second"]] == [6, *map(int, only)]
        assert (tmp_path / f"{first}.png").is_file()


def test_a_mask_beside_a_configuration_that_is_no_models(call, unit_map, tmp_path):
    HeadMask(unit_map, np.arange(8) % 2 == 0).save(tmp_path / "masks.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "masks.safetensors"):
        assert "4/8" in call("show", path)


@pytest.mark.parametrize("content", [None, b"not a mask"])
def test_show_refuses_what_is_no_mask_with_one_sentence(tmp_path, content, call):
    path = tmp_path / "mask.safetensors"
    if content is not None:
        path.write_bytes(content)
    error = call("show", path)
    assert error.startswith("error: ") and "\n" not in error


def test_diff_tells_by_site_which_heads_two_masks_share(unit_map, tmp_path, call):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    HeadMask(unit_map, np.array([1, 1, 0, 0, 0, 0, 0, 1])).save(first)
    HeadMask(unit_map, np.array([1, 0, 0, 0, 0, 0, 1, 1])).save(second)
    picture = tmp_path / "masks.png"
    found = json.loads(call("diff", first, second, "--json", "--plot", picture))
    assert found["kept"] == [3, 3]
    assert (found["both"], found["only_first"], found["only_second"], found["jaccard"]) == (2, 1, 1, 0.5)
    assert found["sites"]["layers.0.attn"] == {"both": [0], "only_first": [1], "only_second": []}
    assert found["sites"]["layers.1.attn"] == {"both": [3], "only_first": [], "only_second": [2]}
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = call("diff", first, second)
    assert "#<.." in printed and "..>#" in printed


def test_inspect_tells_what_the_mask_leaves_and_what_the_compact_model_has(pruned, compact, tmp_path, call):
    picture = tmp_path / "heads.png"
    found = json.loads(call("inspect", pruned, "--length", 8, "--json", "--plot", picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (found["state"], found["heads_kept"], found["heads_total"]) == ("with a head mask", 2, 8)
    assert [site["kept"] for site in found["sites"]] == [[0, 2], []]
    dense, small = found["sizes"]["now"], found["sizes"]["compact"]
    assert dense["parameters"] - small["parameters"] == 6 * PER_HEAD
    assert small["bytes"] == 4 * small["parameters"]
    # 8 tokens, 2 layers of 4 heads of width 4; feed-forward 16 x 32; pooler and classifier read one token.
    attention, rest = 2 * 8 * (4 * 16 * 16 + 2 * 8 * 16), 2 * 8 * 2 * 16 * 32 + 16 * 16 + 16 * 2
    assert (dense["attention_macs"], dense["macs"]) == (attention, attention + rest)
    assert (small["attention_macs"], small["macs"]) == (attention // 4, attention // 4 + rest)
    assert found["mac_bound"] == pytest.approx(dense["macs"] / small["macs"], abs=1e-4)

    now = json.loads(call("inspect", compact, "--length", 8, "--json"))
    assert now["state"] == "compact" and now["sizes"] == {"now": small} and now["sites"] == found["sites"]
    printed = call("inspect", compact, "--length", 8)
    assert "#.#." in printed and "...." in printed and "2/8" in printed and f"{small['parameters']:,}" in printed


def test_masked_and_compact_exports_load_as_their_hosts_load_models(pruned, compact, batch, expected, call, tmp_path):
    from transformers import AutoModelForSequenceClassification

    target = tmp_path / "masked"
    assert "2 of 8 heads" in call("export", pruned, target, "--to", "masked")
    for folder in (target, compact):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)
        assert (folder / "vocab.txt").is_file()
        assert json.loads((folder / "pruning.json").read_text())["method"] == "dsp"
        # A second export replaces the first, with nothing left beside it.
        call("export", pruned, folder, "--to", "masked" if folder == target else "compact")
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert call("diff", pruned, compact, "--json") == call("diff", pruned, target, "--json").replace(
        str(target), str(compact)
    )


def test_a_mask_file_stands_in_for_the_models_own(pruned, tmp_path, call):
    own = HeadMask.load(pruned / "masks.safetensors")
    other = tmp_path / "other.safetensors"
    HeadMask(own.unit_map, ~own.keep).save(other)
    call("export", pruned, tmp_path / "out", "--to", "compact", "--mask", other)
    assert json.loads(call("inspect", tmp_path / "out", "--length", 8, "--json"))["heads_kept"] == 6


@pytest.mark.slow
def test_onnx_and_torch_export_give_the_models_outputs_for_any_batch_and_length(
    pruned, batch, expected, tmp_path, call
):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert "largest difference" in call("export", pruned, tmp_path / "model.onnx", "--to", "onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert {(axis.name, *axis.shape) for axis in session.get_inputs()} == {
        ("input_ids", "batch", "length"),
        ("attention_mask", "batch", "length"),
        ("token_type_ids", "batch", "length"),
    }
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)

    assert "largest difference" in call("export", pruned, tmp_path / "model.pt2", "--to", "torch-export")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(**batch)["logits"], expected, rtol=0, atol=1e-5)


OPTIONS = ("--length", "8", "--batch", "2", "--rounds", "2", "--json")


def test_benchmark_compares_a_model_with_itself_without_the_heads(pruned, call):
    found = json.loads(call("benchmark", pruned, *OPTIONS))
    dense, small = found["models"]
    assert dense["parameters"] - small["parameters"] == 6 * PER_HEAD
    assert found["mac_bound"] == pytest.approx(dense["macs"] / small["macs"], abs=1e-4)
    assert found["speed_up"]["latency"] == pytest.approx(dense["latency_ms"] / small["latency_ms"], rel=0.05)
    assert found["clock"] == "processor time" and small["examples_per_second"] > 0


@pytest.mark.slow
def test_benchmark_compares_two_models_in_onnxruntime(pruned, compact, call):
    pytest.importorskip("onnxruntime")
    found = json.loads(call("benchmark", pruned, compact, "--runtime", "onnxruntime", *OPTIONS))
    assert [model["model"] for model in found["models"]] == [str(pruned), str(compact)]
    assert found["mac_bound"] > 1 and found["fraction_of_bound"]["throughput"] > 0


def _foreign_mask(folder, unit_map):
    HeadMask(unit_map, np.ones(8)).save(folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("inspect TMP/nothing", "There is no"),
        ("inspect TMP", "neither a folder of save_pretrained"),
        ("inspect MODEL --length 0", "--length 0"),
        ("inspect MODEL --length 100", "64 positions"),
        ("inspect MODEL --mask FOREIGN", "another architecture"),
        ("inspect MODEL --mask TMP/nothing", "There is no file"),
        ("export MODEL TMP/out --to tflite", "choose one of masked, compact, onnx, openvino, torch-export"),
        ("export MODEL MODEL --to masked", "is the model itself"),
        ("export MODEL TMP --to masked", "holds something else"),
        ("export MODEL FOREIGN --to compact", "is a file"),
        ("export MODEL TMP --to onnx", "is a folder"),
        ("export MODEL FOREIGN/below.pt2 --to torch-export", "foreign.safetensors"),
        ("export COMPACT TMP/out --to masked", "cut out already"),
        ("benchmark MODEL MODEL", "the same"),
        ("benchmark MODEL COMPACT --mask FOREIGN", "--mask is for one model"),
        ("benchmark MODEL --rounds 0", "--rounds"),
        ("diff MODEL FOREIGN", "another architecture"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(line, words, pruned, compact, unit_map, tmp_path, call):
    values = {"FOREIGN": _foreign_mask(tmp_path, unit_map), "TMP": tmp_path, "MODEL": pruned, "COMPACT": compact}
    for name, value in values.items():
        line = line.replace(name, str(value))
    error = call(*line.split())
    assert error.startswith("error: ") and words in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.safetensors"]


def test_a_damaged_model_is_one_sentence(pruned, tmp_path, call):
    (tmp_path / "config.json").write_text((pruned / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    error = call("inspect", tmp_path)
    assert error.startswith("error: transformers cannot load") and "\n" not in error


def test_a_host_that_is_not_installed_is_named(tmp_path, monkeypatch, call):
    (tmp_path / "model.pt").write_bytes(b"")
    absent = importlib.metadata.EntryPoint("elsewhere", "no_such_package.host", "head_pruning.hosts")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [absent] if "hosts" in group else [])
    error = call("inspect", tmp_path / "model.pt")
    assert "not installed: elsewhere" in error and "no_such_package" in error and "\n" not in error


@pytest.fixture
def checkpoint(tmp_path):
    """A dense fairseq checkpoint: 2 layers each side, 2 heads, and a mask that keeps every second head."""
    pytest.importorskip("fairseq")
    from fairseq import options
    from fairseq.data import Dictionary
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.tasks.translation import TranslationTask
    from omegaconf import OmegaConf

    from fairseq_plugin.modules.unit_map import unit_map as map_units

    line = ["data", "--task", "translation", "--arch", "transformer", "-s", "de", "-t", "en"]
    for side in ("encoder", "decoder"):
        line += [f"--{side}-layers", "2", f"--{side}-embed-dim", "8", f"--{side}-ffn-embed-dim", "16"]
        line += [f"--{side}-attention-heads", "2"]
    config = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), line))
    words = Dictionary()
    for number in range(12):
        words.add_symbol(f"word{number}")
    model = TranslationTask(config.task, words, words).build_model(config.model)
    state = {"cfg": OmegaConf.to_container(config), "args": None, "model": model.state_dict(), "extra_state": {}}
    history = [{"num_updates": 0, "lr_scheduler_state": {}, "criterion_name": "", "optimizer_name": ""}]
    torch.save({**state, "optimizer_history": history, "task_state": {}}, tmp_path / "dense.pt")
    HeadMask(map_units(model), np.arange(12) % 2 == 0).save(tmp_path / "mask.safetensors")
    return tmp_path / "dense.pt"


@pytest.mark.slow
def test_a_fairseq_checkpoint_is_inspected_exported_and_measured(checkpoint, call):
    mask = ("--mask", checkpoint.with_name("mask.safetensors"))
    found = json.loads(call("inspect", checkpoint, *mask, "--length", 4, "--json"))
    assert (found["host"], found["heads_kept"], found["heads_total"]) == ("fairseq", 6, 12)
    dense, small = found["sizes"]["now"], found["sizes"]["compact"]
    assert dense["parameters"] - small["parameters"] == 6 * (4 * 4 * 8 + 3 * 4)
    assert small["attention_macs"] == dense["attention_macs"] // 2 == 6 * 4 * (4 * 8 * 8 + 2 * 4 * 8) // 2

    target = checkpoint.with_name("compact.pt")
    call("export", checkpoint, target, "--to", "compact", *mask)
    now = json.loads(call("inspect", target, "--length", 4, "--json"))
    assert now["state"] == "compact" and now["sizes"]["now"] == small and now["sites"] == found["sites"]
    speed = json.loads(call("benchmark", checkpoint, target, "--length", 4, "--batch", 2, "--rounds", 2, "--json"))
    assert speed["mac_bound"] == found["mac_bound"]
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert "largest difference" in call("export", target, target.with_suffix(".onnx"), "--to", "onnx")
    assert target.with_suffix(".onnx").is_file()
