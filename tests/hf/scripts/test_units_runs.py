"""Feed-forward units pruned by methods of heads, from the command line of transformers' scripts."""

import json

import pytest

from head_pruning import HeadMask
from hf_plugin import run_glue
from hf_plugin.host import load
from tests.hf.manual_lines import GPP_TEACHER
from tests.hf.script_runs import write_place

SHORT = "--data_dir data/CoLA --use_cpu --disable_tqdm True --save_strategy no --seed 3 --max_steps 4".split()


@pytest.mark.parametrize("method, kept", [
    ("head_sensitivity --num_of_heads 30 --joint_pruning --count_schedule 0:2 --prune_units both", 30),
    ("unit_magnitude --keep_macs 0.5 --prune_units both", None),
    pytest.param("subset --num_of_heads 20 --joint_pruning --count_schedule 0:2 --prune_units ffn", 20,
                 marks=pytest.mark.slow),
    pytest.param("ste --num_of_heads 30 --joint_pruning --prune_units both", 30, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_leaves_the_units_that_it_says(method, kept, tmp_path, monkeypatch):
    write_place(tmp_path, "CoLA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_glue", *GPP_TEACHER, *SHORT, "--pruner", *method.split()])
    run_glue.main()
    folder = tmp_path / GPP_TEACHER[GPP_TEACHER.index("--output_dir") + 1]
    told = json.loads((folder / "all_results.json").read_text())
    counts = HeadMask.load(folder / "masks.safetensors").counts()
    assert counts["units"] == (told["units_kept"], told["units_total"])
    assert sum(count for count, _ in counts.values()) == kept or kept is None
    assert 0 < told["units_kept"] < told["units_total"]
    assert load(folder).mask.counts()["units"] == counts["units"]
