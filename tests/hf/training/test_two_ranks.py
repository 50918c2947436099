"""Two data-parallel processes (gloo) through accelerate: by DDP, and by FSDP2."""

import json
import shutil
import socket

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from hf_plugin.host import export_compact
from tests import forked
from tests.hf import rank
from tests.hf.script_runs import write_model, write_task


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(repo, folder, *options, ranks=2) -> dict[str, list[dict]]:
    """Train variants on ``ranks`` processes (1: in this one); what each of them ends with, by variant."""
    if ranks == 1:
        rank.train_all(folder, options)
    else:
        two_processes(repo, folder, options)
    results = {}
    for variant in set(options) - {"resume", "fsdp"}:
        results[variant] = []
        for number in range(ranks):
            with np.load(folder / variant / f"rank{number}.npz") as data:
                results[variant].append(dict(data))
    return results


def two_processes(repo, folder, options) -> None:
    port, processes = free_port(), []
    for number in ("0", "1"):
        env = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["-m", "tests.hf.rank", str(folder), *options]
        processes.append(forked.Command("transformers", command, cwd=repo, env=env))
    for process in processes:
        assert process.wait() == 0, process.stdout[-3000:] + process.stderr[-3000:]


JOINT = ("heads", "weights", "spd")


@pytest.fixture(scope="module")
def two(repo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run(repo, folder, *JOINT)


def check(two, alone) -> None:
    first, second = two
    for name in first.keys() - {"gradients"}:
        assert np.array_equal(first[name], second[name]), name
    close = {"logits", "learnt"} & first.keys()
    for name in close:
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for name in first.keys() - {"gradients", *close}:
        np.testing.assert_allclose(first[name], alone[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_ranks_agree_with_each_other_and_with_one_process(repo, two, tmp_path):
    alone = run(repo, tmp_path, *JOINT, ranks=1)
    for variant in JOINT:
        check(two[1][variant], *alone[variant])
    ranks = [*two[1]["weights"], *alone["weights"]]
    masks = [name for name in ranks[0] if name.startswith("mask.")]
    # Without the weights and biases of the five heads that are gone: four projections of width 4, three biases.
    left = sum(ranks[0][name].size for name in masks) - 5 * (4 * 4 * 16 + 3 * 4)
    assert [sum(int(each[name].sum()) for name in masks) for each in ranks] == [left - int(left * 0.8) + 1] * 3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gpp", "voita", "pipelined"])
def test_other_methods(repo, tmp_path, variant):
    check(run(repo, tmp_path / "two", variant)[variant], *run(repo, tmp_path / "one", variant, ranks=1)[variant])


@pytest.mark.slow
def test_ranges_of_inputs_are_those_of_all_ranks(repo, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao")
    variants = ("token", "average")
    two = run(repo, tmp_path / "two", *variants)
    alone = run(repo, tmp_path / "one", *variants, ranks=1)
    for variant in variants:
        check(two[variant], *alone[variant])
        ranges = two[variant][0]["ranges"]
        assert len(ranges) == 14 and (ranges[:, 0] < ranges[:, 1]).all()


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="transformers 5.0 cannot resume two ranks on a CPU (cpu:0)"
)
def test_resumed_ranks_end_bit_equal(repo, two):
    folder, whole = two
    again = run(repo, folder, *JOINT, "resume")
    for variant in JOINT:
        (expected, _), (one, other) = whole[variant], again[variant]
        for name in expected.keys() - {"gradients"}:
            assert np.array_equal(expected[name], one[name]) and np.array_equal(one[name], other[name]), name


def same_outcome(left, right) -> None:
    """The folders hold the same files, and the models and masks in them are the same."""
    files = [
        sorted(str(path.relative_to(each)) for path in each.rglob("*") if path.is_file()) for each in (left, right)
    ]
    assert files[0] == files[1] and "model.safetensors" in files[0]
    for name in files[0]:
        if name.endswith(".json"):
            assert json.loads((left / name).read_text()) == json.loads((right / name).read_text()), name
        elif name.endswith(".safetensors"):
            same_tensors(left / name, right / name)


def same_tensors(left, right) -> None:
    mine, theirs = load_file(left), load_file(right)
    assert mine.keys() == theirs.keys()
    for key in mine:
        np.testing.assert_allclose(mine[key], theirs[key], atol=1e-4, err_msg=f"{left.name}: {key}")


def test_sharded_ranks_end_as_one_process(repo, tmp_path):
    variant = "taught"
    two = run(repo, tmp_path / "two", variant, "fsdp")
    check(two[variant], *run(repo, tmp_path / "one", variant, ranks=1)[variant])
    outcomes = [tmp_path / ranks / variant / "outcome" for ranks in ("two", "one")]
    same_outcome(*outcomes)
    for outcome in outcomes:
        export_compact(outcome, outcome / "compact")
    same_outcome(*(outcome / "compact" for outcome in outcomes))


SHARDED = ("pipelined", "voita", "ste", "subset", "head_sensitivity", "dfd", *rank.WEIGHTS)


@pytest.mark.slow
def test_sharded_ranks_of_other_methods(repo, tmp_path):
    two = run(repo, tmp_path / "two", *SHARDED, "fsdp")
    alone = run(repo, tmp_path / "one", *SHARDED, ranks=1)
    for variant in SHARDED:
        check(two[variant], *alone[variant])
        same_outcome(*(tmp_path / ranks / variant / "outcome" for ranks in ("two", "one")))
        shutil.move(tmp_path / "two" / variant / "outcome", tmp_path / variant)
    again = run(repo, tmp_path / "two", *SHARDED, "resume", "fsdp")
    for variant in SHARDED:
        for name in two[variant][0].keys() - {"gradients"}:
            assert np.array_equal(two[variant][0][name], again[variant][0][name]), (variant, name)
        same_outcome(tmp_path / "two" / variant / "outcome", tmp_path / variant)


@pytest.mark.slow
def test_a_script_whose_model_is_sharded(repo, tmp_path):
    for ranks in ("two", "one"):
        write_task(tmp_path / ranks / "glue" / "data", "CoLA")
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        write_model(tmp_path / ranks / "glue" / "bert-base-uncased", **still)
    two_processes(repo, tmp_path / "two", ["glue", "fsdp"])
    rank.train_all(tmp_path / "one", ["glue"])
    two, one = (tmp_path / ranks / "glue" / "output" for ranks in ("two", "one"))
    names = [sorted(path.name for path in each.iterdir()) for each in (two, one)]
    assert names[0] == names[1] and "mask6.safetensors" in names[0]
    for name in ("model.safetensors", "masks.safetensors", "mask6.safetensors"):
        same_tensors(two / name, one / name)
    told = [json.loads((each / "all_results.json").read_text()) for each in (two, one)]
    assert all(told[0][name] == told[1][name] for name in told[0] if name.startswith(("heads_", "weights_")))
    for name in ("train_loss", "eval_loss"):
        assert told[0][name] == pytest.approx(told[1][name], abs=1e-3), name
    reports = [json.loads((each / "pruning.json").read_text()) for each in (two, one)]
    for report in reports:  # what was measured, and the flags
        del report["history"]
        report["options"] = report["weights"]["options"] = {}
    assert reports[0] == reports[1]
