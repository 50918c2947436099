"""The benchmark of the weight pruner's step runs, and prints what it promises."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_json_has_the_promised_keys(repo):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pruner_step", "--json", "--threads", "1", "--rounds", "2",
         "--reference-rounds", "1", "--layers", "1", "--hidden", "64"],
        cwd=repo, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["weights"] == 12 * 64 * 64 + 9 * 64 and found["state_bytes_per_weight"] == 12
    for name in ("platon_cubic", "platon_final", "reference_cubic", "reference_final"):
        assert 0 < found[f"{name}_over_adamw"] < found[f"{name}_over_fused_adamw"]
    assert found["reference_final_over_adamw"] > found["platon_final_over_adamw"]
