"""The plans of the benchmarks: their command lines are those of the scripts, and two of their cells run."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from head_pruning.cli import main
from head_pruning.files import MASKS_FILE
from head_pruning.masks import HeadMask, full_mask
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.script_runs import ROOT, write_model, write_task
from tests.hf.tiny import tiny_bert


@pytest.mark.parametrize("name", ["glue", "gpp_glue", "heads", "prune_once", "spd_glue", "weights_glue"])
def test_the_scripts_take_the_command_lines(name, tmp_path):
    """Of each method and of each task one."""
    full_mask(unit_map(tiny_bert())).save(tmp_path / MASKS_FILE)
    read = 0
    cells = [cell for cell in tables.asked(name)[0].cells(Path("DIR")) if "fairseq" not in cell.commands[0][2]]
    some = {cell.values[axis]: cell for axis in ("task", "method") for cell in cells}
    for cell in {cell.name: cell for cell in some.values()}.values():
        for _, _, module, *words in cell.commands:
            script = module.removeprefix("hf_plugin.")
            words = [str(tmp_path / MASKS_FILE) if word.endswith(MASKS_FILE) else word for word in words]
            if module == "benchmarks.michel_share":
                assert 0 < float(words[0]) < 1 and parse_michel(words[1:]).prune_units == "both"
            elif script == "run_michel":
                assert parse_michel(words).sizes == [36, 18, 9, 6]
            else:
                assert module != script
                told = parse(words, script)
                assert told.training.do_train and bool(told.pruners) == (
                    cell.values["method"] not in ("dense", "start")
                )
            read += 1
    assert read


@pytest.mark.slow
def test_a_teacher_and_a_student_without_half_of_its_units(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    write_task(tmp_path / "glue", "SST-2")
    model, out = write_model(tmp_path / "model", max_position_embeddings=64), tmp_path / "out"
    given = ["--set", f"model={model}", "--set", f"data={tmp_path / 'glue'}", "--out", str(out), "--jobs", "1"]
    places = [str(model), str(tmp_path / "glue"), "--work", str(out), "--results", str(tmp_path / "table")]
    monkeypatch.setattr(
        sys, "argv", ["gpp_glue", *places, "--jobs", "1", "--only", "^seed1-(50-)?SST-2-(dense|Michel)$"]
    )
    runpy.run_module("benchmarks.gpp_glue", run_name="__main__")
    assert "2 of 104 trainings have been measured" in (tmp_path / "table" / "gpp_glue.md").read_text()
    dense, student = (
        json.loads((out / "cells" / f"seed1-{name}.json").read_text()) for name in ("SST-2-dense", "50-SST-2-Michel")
    )
    assert dense["numbers"].keys() == {"score"}
    told = student["numbers"]
    assert (told["heads_kept"], told["units_kept"]) == (12, 32) and told["mac_bound"] > 1 and told["speed_up"] > 0
    mask = HeadMask.load(out / "runs/seed1-50-SST-2-Michel/michel" / MASKS_FILE)
    assert mask.counts()["heads"] == (12, 24)
    rows = tables.collected(out)
    assert rows[1]["heads_by_site"].count(":") == rows[1]["heads_that_stay"].count(":") == 4
    assert not list((out / "runs/seed1-50-SST-2-Michel").rglob("model*.safetensors"))
    assert (out / "runs/seed1-SST-2-dense/model.safetensors").is_file()
    capsys.readouterr()
    main(["sweep", "show", str(tables.PLANS / "gpp_glue.yaml"), *given])
    assert "2 finished, 82 waiting" in capsys.readouterr().out
