"""``make quick`` on a tiny model: what it prints is what it wrote."""

import json
import sys

import pytest
from transformers import AutoModel

from head_pruning.report.runs import find_runs
from hf_plugin import quick
from tests.hf.script_runs import write_model, write_task


def test_half_of_the_heads_go_and_both_models_are_left(tmp_path):
    write_task(tmp_path / "data", "SST-2", rows=24)
    write_model(tmp_path / "data" / "model")
    printed = quick.run(tmp_path / "data", tmp_path / "out", 24, 12)
    runs = {run.folder.name: run for run in find_runs([tmp_path / "out"])}
    dense, pruned = runs["dense"], runs["pruned"]
    assert (dense.numbers["heads_kept"], pruned.numbers["heads_kept"]) == (24, 12)
    assert dense.dense and pruned.method == "michel" and sum(map(len, pruned.kept.values())) == 12
    loaded = AutoModel.from_pretrained(tmp_path / "out" / "pruned")
    assert pruned.numbers["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    rows = {line.split("  ")[0]: line.split()[-2:] for line in printed.splitlines() if line}
    assert rows["heads"] == ["24", "12"]
    for name in ("parameters", "latency_ms", "score"):
        assert pruned.numbers[name] >= 0 and dense.numbers[name] >= 0
    assert rows["parameters"] == [f"{run.numbers['parameters']:,}" for run in (dense, pruned)]
    accuracy = json.loads((tmp_path / "out" / "pruned" / "all_results.json").read_text())
    assert accuracy["eval_samples"] == 12 and f"{100 * accuracy['eval_accuracy']:.1f}" in printed


def test_data_that_are_none_end_in_a_sentence(tmp_path, monkeypatch):
    def refused(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quick", "--data", str(tmp_path), "--output", str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as error:
            quick.main()
        return str(error.value)

    assert refused("--test", "0") == "error: --train and --test must be 1 or more."
    assert "holds no model/ and SST-2/" in (said := refused()) and "there is no" in said  # nor is the hub asked
    (tmp_path / "file").touch()
    monkeypatch.setattr(quick, "_read", None)  # told before the work
    assert "file cannot be written" in refused("--output", str(tmp_path / "file"))
    monkeypatch.undo()
    write_model(tmp_path / "model")
    (tmp_path / "SST-2").mkdir()
    for content, words in (("", "has no sentence"), ("text\tlabel\na\t1\n", "there is no 'sentence'"),
                           ("sentence\tlabel\na\n", "NoneType")):  # fmt: skip
        (tmp_path / "SST-2" / "train.tsv").write_text(content)
        assert words in (said := refused()) and said.endswith("give another --data.")
