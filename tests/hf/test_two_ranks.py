"""Two data-parallel processes (gloo) through accelerate."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import transformers


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(repo, folder, *options, ranks=2) -> list[dict]:
    """Train on ``ranks`` processes; what each of them ends with."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.hf.rank", str(folder), *options]
        processes.append(
            subprocess.Popen(command, cwd=repo, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    results = []
    for rank in range(ranks):
        with np.load(folder / f"rank{rank}.npz") as data:
            results.append(dict(data))
    return results


@pytest.fixture(scope="module")
def joint(repo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run(repo, folder)


def check(two, alone) -> None:
    first, second = two
    for name in first.keys() - {"gradients"}:
        assert np.array_equal(first[name], second[name]), name
    np.testing.assert_allclose(first["logits"], alone["logits"], rtol=1e-3, atol=1e-4)
    for name in first.keys() - {"gradients", "logits"}:
        np.testing.assert_allclose(first[name], alone[name], atol=1e-4, err_msg=name)


def test_ranks_agree_with_each_other_and_with_one_process(repo, joint, tmp_path):
    check(joint[1], *run(repo, tmp_path, ranks=1))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["voita", "pipelined"])
def test_other_methods(repo, tmp_path, options):
    check(run(repo, tmp_path / "two", options), *run(repo, tmp_path / "one", options, ranks=1))


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="transformers 5.0 cannot resume two ranks on a CPU (cpu:0)"
)
def test_resumed_ranks_end_bit_equal(repo, joint):
    folder, (whole, _) = joint
    again, other = run(repo, folder, "resume")
    for name in whole.keys() - {"gradients"}:
        assert np.array_equal(whole[name], again[name]) and np.array_equal(again[name], other[name]), name
