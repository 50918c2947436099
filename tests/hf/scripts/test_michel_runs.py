"""Michel runs in folders that are in use, what they leave there, and the names of metrics."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from head_pruning import HeadMask, HeadPruningError
from head_pruning.importance.rounds import RoundsReport
from head_pruning.masks import full_mask
from head_pruning.report.runs import find_runs
from head_pruning.surgery.per_unit import unit_macs
from head_pruning.weights import save_weight_masks
from hf_plugin import head_mask
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.glue import find_task
from hf_plugin.glue.metrics import find_metric
from hf_plugin.glue.michel import MichelRun, clear, run
from hf_plugin.glue.run import run as run_glue
from hf_plugin.host import export_compact, export_masked
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.saving.folders import save_pruned
from hf_plugin.scripts.output_folder import refuse_masked_start
from tests.hf.script_runs import HEADS, write_model, write_place

LINE = "--data_dir data/MRPC --task_name MRPC --model_name_or_path dense --cache_dir cache --no_cuda".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("michel"), "MRPC", "MNLI")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(place / "bert-base-uncased", num_labels=2, initializer_range=0.5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(place / "dense")
    AutoTokenizer.from_pretrained(place / "bert-base-uncased").save_pretrained(place / "dense")
    return place


def michel(out: str, *more: str, heads: int = 12) -> list[dict]:
    return run(parse_michel([*LINE, "--output_dir", out, "--num_of_heads", str(heads), *more]))


def refused(out: str, *more: str, heads: int = 12) -> str:
    """The sentence of a run that changes nothing."""
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} if Path(out).is_dir() else {}
    with pytest.raises(HeadPruningError) as error:
        michel(out, *more, heads=heads)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert {path: path.read_bytes() for path in before} == before
    return sentence


def cut_after(monkeypatch, rounds: int, call, *args, **options) -> None:
    """Let a run be killed after so many rounds."""

    def add(self, *args, **more):
        entry = kept(self, *args, **more)
        if len(self.entries) == rounds:
            raise KeyboardInterrupt
        return entry

    with monkeypatch.context() as patch:
        kept = RoundsReport.add
        patch.setattr(RoundsReport, "add", add)
        with pytest.raises(KeyboardInterrupt):
            call(*args, **options)


def same_rounds(one: list[dict], other: list[dict]) -> bool:
    return [(e["heads"], e["score"], e["kept_heads_by_site"]) for e in one] == [
        (e["heads"], e["score"], e["kept_heads_by_site"]) for e in other
    ]


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_leaves_the_model_of_its_last_round_with_heads(here, capsys):
    rounds = michel("left")
    folder = here / "left"
    assert [entry["heads"] for entry in rounds] == [24, 12, 0]
    results, report = (json.loads((folder / name).read_text()) for name in ("all_results.json", "pruning.json"))
    assert (results["heads_kept"], results["heads_total"], results["eval_samples"]) == (12, HEADS, 24)
    assert {name for name in results if not name.startswith("eval_")} == {"heads_kept", "heads_total"}
    assert 100 * results["eval_combined_score"] == pytest.approx(rounds[1]["score"])
    assert report["method"] == "michel" and report["options"]["num_of_heads"] == 12
    assert [entry["heads"] for entry in report["history"]] == [24, 12, 0] and report["heads_kept"] == 12
    mask = HeadMask.load(folder / "masks.safetensors")
    assert mask.kept_heads() == rounds[1]["kept_heads_by_site"] == report["kept_heads_by_site"]
    assert (folder / "head_mask.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert "12 of 24 attention heads" in card and "Results on GLUE MRPC" in card
    assert f"| eval_accuracy | {results['eval_accuracy']:.4f} |" in card
    # The same outputs as the masked model, of an ordinary folder.
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 25
    dense, pruned = (AutoModelForSequenceClassification.from_pretrained(name).eval() for name in ("dense", "left"))
    words = torch.arange(5, 15)[None]
    with torch.no_grad():
        with head_mask(dense, mask):
            expected = dense(words).logits
        assert not torch.allclose(dense(words).logits, expected, atol=1e-3)
        torch.testing.assert_close(pruned(words).logits, expected, atol=1e-5, rtol=0)
    evaluation = "--model_name_or_path left --task_name MRPC --data_dir data/MRPC --do_eval --output_dir left_again"
    again = run_glue(
        parse([*evaluation.split(), *"--use_cpu --disable_tqdm True --cache_dir cache".split()], "run_glue")
    )
    for name in ("eval_accuracy", "eval_f1", "eval_combined_score", "eval_loss"):
        assert again[name] == pytest.approx(results[name], abs=1e-5)


def test_all_heads_at_once_leave_a_model_without_heads(here):
    michel("none", heads=24)
    assert HeadMask.load("none/masks.safetensors").kept == 0
    assert json.loads(Path("none/all_results.json").read_text())["heads_kept"] == 0


def test_both_sets_of_mnli_are_in_the_results(here):
    line = "--data_dir data/MNLI --task_name MNLI --model_name_or_path bert-base-uncased --metric_name mnli-mm/acc"
    rounds = michel("mnli", *line.split())
    results = json.loads(Path("mnli/all_results.json").read_text())
    assert 100 * results["eval_mm_accuracy"] == pytest.approx(rounds[1]["scores"]["mnli-mm"])
    assert 100 * results["eval_accuracy"] == pytest.approx(rounds[1]["scores"]["mnli"])
    assert [entry["score"] for entry in rounds] == [entry["scores"]["mnli-mm"] for entry in rounds]


# -- going on --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_goes_on_only_with_its_own_settings(here, monkeypatch, caplog):
    whole = michel("whole", heads=8)
    cut_after(monkeypatch, 2, michel, "cut", heads=8)
    shutil.copytree(here / "dense", here / "other")
    there = "cut/michel_rounds.json holds the rounds of another run"
    cure = "choose another --output_dir or add --overwrite_output_dir."
    assert (
        refused("cut", "--metric_name", "f1", heads=8) == f"{there} (--metric_name was not set and is now f1); {cure}"
    )
    for flag in ("--tokenizer_name", "--config_name"):
        assert refused("cut", flag, "other", heads=8) == f"{there} ({flag} was not set and is now other); {cure}"
    # What says the same as nothing; a seed changes nothing where no weight is drawn.
    same = "--metric_name combined_score --tokenizer_name dense --config_name dense --seed 7".split()
    caplog.set_level("INFO")
    assert same_rounds(michel("cut", *same, heads=8), whole)
    assert "going on after the round that left 16 heads" in caplog.text
    for name in ("masks.safetensors", "model.safetensors"):
        assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_a_seed_counts_where_it_draws_the_classifier(here, monkeypatch):
    start = ["--model_name_or_path", "bert-base-uncased"]
    cut_after(monkeypatch, 2, michel, "drawn", *start)
    sentence = refused("drawn", *start, "--seed", "7")
    assert "(another set of weights, from --model_name_or_path or drawn with --seed)" in sentence
    michel("drawn", *start)


def test_a_finished_run_is_neither_repeated_nor_replaced(here, monkeypatch, caplog, capsys):
    rounds = michel("finished", heads=8)
    shown = capsys.readouterr().out
    sentence = refused("finished", "--exact_pruning")
    assert "(--num_of_heads was 8 and is now 12, --exact_pruning was False and is now True); choose" in sentence
    with monkeypatch.context() as patch:
        for name in ("evaluate", "importance", "save"):
            patch.setattr(MichelRun, name, None)
        caplog.set_level("INFO")
        assert same_rounds(michel("finished", heads=8), rounds)
    table = capsys.readouterr().out
    assert "finished already" in caplog.text and table.startswith("heads kept") and shown.endswith(table)


@pytest.mark.parametrize("last", ["write_json", "save_pruned"])
def test_a_run_cut_off_while_it_saves_its_model_saves_it_afterwards(here, monkeypatch, last):
    folder = here / f"unsaved-{last}"
    folder.mkdir()
    (folder / "all_results.json").write_text("{}")  # of an evaluation, say
    with monkeypatch.context() as patch:
        patch.setattr(f"hf_plugin.glue.michel.{last}", None)
        with pytest.raises(TypeError):
            michel(folder.name)
    assert not (folder / "all_results.json").exists()
    monkeypatch.setattr(MichelRun, "importance", None)
    rounds = michel(folder.name)
    results = json.loads((folder / "all_results.json").read_text())
    assert 100 * results["eval_combined_score"] == pytest.approx(rounds[1]["score"])
    assert AutoModelForSequenceClassification.from_pretrained(folder) is not None


@pytest.mark.slow
def test_overwriting_removes_what_an_earlier_run_left(here, monkeypatch):
    michel("again", heads=8)
    kept = here / "again" / "notes.txt"
    kept.write_text("mine")
    (here / "again" / ".saving-x").mkdir()
    cut_after(monkeypatch, 1, michel, "again", "--overwrite_output_dir")
    left = {path.relative_to(here / "again").as_posix() for path in (here / "again").rglob("*") if path.is_file()}
    assert left == {"notes.txt", "michel_rounds.json", "michel_masks/heads24.safetensors"}
    michel("again")
    assert {path.name for path in (here / "again" / "michel_masks").iterdir()} == {
        f"heads{count}.safetensors" for count in (24, 12, 0)
    }


def test_overwriting_leaves_the_start_model_where_it_is_a_size_of_the_run_before(tmp_path):
    for name in ("sizes/heads12", "sizes/heads24", "michel_masks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "michel_rounds.json").write_text("[]", encoding="utf-8")
    clear(tmp_path, str(tmp_path / "sizes" / "heads12"))
    assert {path.name for path in tmp_path.rglob("*")} == {"sizes", "heads12"}


# -- folders ---------------------------------------------------------------------------------------------------------


def test_an_output_dir_that_cannot_be_one(here):
    Path("file").write_text("")
    assert refused("file") == "--output_dir file cannot be made (file is a file); choose another."
    assert refused("file/below") == "--output_dir file/below cannot be made (Not a directory); choose another."


def test_models_of_others_are_not_replaced(here):
    assert "dense is the start model's own folder" in refused("dense")
    assert "dense/../dense is the start model's own" in refused("dense/../dense", "--overwrite_output_dir")
    write_model(here / "others")
    for name in ("model.safetensors", "config.json", "README.md"):
        (here / "others" / "README.md").write_text("mine")
        sentence = refused("others")
        assert sentence.startswith(
            f"others already holds a model or other files ({name}) that this run would write over"
        )
        assert sentence.endswith("choose another --output_dir or add --overwrite_output_dir.")
        (here / "others" / name).unlink()
    (here / "others" / "all_results.json").write_text("{}")  # of an evaluation
    michel("others", heads=24)


@pytest.mark.slow
def test_a_start_whose_heads_are_zeroed_is_refused(here):
    model = AutoModelForSequenceClassification.from_pretrained("dense")
    tokenizer = AutoTokenizer.from_pretrained("dense")
    heads = unit_map(model)
    mask = HeadMask(heads, np.arange(HEADS) % 5 == 0)
    save_pruned(model, mask, "zeroed", processing_class=tokenizer)
    sentence = refused("from_zeroed", "--model_name_or_path", "zeroed")
    assert sentence.startswith("zeroed was pruned to 5 of 24 heads already")
    assert "run head-pruning export zeroed SMALL --to compact and start from SMALL" in sentence
    # The cure, and what the heads that are left are pruned to.
    export_compact(Path("zeroed"), Path("small"))
    rounds = michel("from_small", "--model_name_or_path", "small", heads=3)
    assert [entry["heads"] for entry in rounds] == [5, 2, 0]
    with pytest.raises(HeadPruningError, match="from_small was pruned to 2 of 5 heads already"):
        refuse_masked_start("from_small")


def test_starts_that_are_not_refused(here, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained("dense")
    save_pruned(model, full_mask(unit_map(model)), tmp_path / "all")
    (tmp_path / "weights").mkdir()
    save_weight_masks(tmp_path / "weights" / "masks.safetensors", {"a": torch.tensor([True, False])})
    for folder in (tmp_path / "all", tmp_path / "weights", "dense", "bert-base-cased", "somebody/some-model"):
        refuse_masked_start(folder)
    # Weights and heads together are refused for the heads.
    masks = {"a": torch.tensor([True])}
    save_weight_masks(tmp_path / "weights" / "masks.safetensors", masks, HeadMask(unit_map(model), np.zeros(HEADS)))
    with pytest.raises(HeadPruningError, match="to 0 of 24 heads"):
        refuse_masked_start(str(tmp_path / "weights"))


def test_the_model_of_another_round_is_one_command_away(here):
    rounds = michel("rounds", heads=8)
    mask = HeadMask.load("rounds/michel_masks/heads16.safetensors")
    export_masked(Path("dense"), Path("round16"), mask)
    assert HeadMask.load("round16/masks.safetensors").kept_heads() == rounds[1]["kept_heads_by_site"]


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, name, found", [
    ("MNLI", None, ("mnli", "accuracy")),
    ("MNLI", "acc", ("mnli", "accuracy")),
    ("MNLI", "mnli/acc", ("mnli", "accuracy")),
    ("MNLI", "mnli-mm/acc", ("mnli-mm", "accuracy")),
    ("CoLA", "mcc", ("cola", "matthews_correlation")),
    ("SST-2", "accuracy", ("sst-2", "accuracy")),
    ("MRPC", "acc", ("mrpc", "accuracy")),
    ("MRPC", "f1", ("mrpc", "f1")),
    ("QQP", "acc_and_f1", ("qqp", "combined_score")),
    ("STS-B", "pearson", ("sts-b", "pearson")),
    ("STS-B", "spearmanr", ("sts-b", "spearmanr")),
    ("STS-B", "corr", ("sts-b", "combined_score")),
])  # fmt: skip
def test_names_of_metrics(task, name, found):
    assert find_metric(name, find_task(task)) == found


@pytest.mark.parametrize("task, name, sentence", [
    ("CoLA", "acc", "CoLA has no metric acc; give --metric_name one of matthews_correlation (mcc)."),
    ("MRPC", "auc", "MRPC has no metric auc; give --metric_name one of accuracy (acc), f1, combined_score "
     "(acc_and_f1)."),
    ("STS-B", "f1", "STS-B has no metric f1; give --metric_name one of pearson, spearmanr, combined_score (corr)."),
    ("QNLI", "mnli/acc", "QNLI has no metric mnli/acc; give --metric_name one of accuracy (acc)."),
    ("MNLI", "mnli/f1", "MNLI has no metric mnli/f1; give --metric_name one of accuracy (acc), with mnli/ or mnli-mm/ "
     "before it for one of the sets."),
])  # fmt: skip
def test_other_names_are_refused_before_anything_is_loaded(tmp_path, task, name, sentence):
    words = f"--model_name_or_path {tmp_path}/nowhere --output_dir {tmp_path}/out --metric_name {name}"
    with pytest.raises(HeadPruningError) as error:
        run(parse_michel(["--task_name", task, *words.split()]))
    assert str(error.value) == sentence and not (tmp_path / "out").exists()


def test_the_published_name_of_a_metric_scores_the_rounds(here):
    rounds = michel("acc", "--metric_name", "acc", heads=24)
    results = json.loads(Path("acc/all_results.json").read_text())
    assert rounds[-1]["score"] == pytest.approx(100 * results["eval_accuracy"])


def test_rounds_of_equal_macs(place, monkeypatch):
    monkeypatch.chdir(place)
    options = ("--prune_units", "both", "--macs_per_round", "0.3", "--max_seq_length", "16", "--data_subset", "4")
    entries = run(parse_michel([*LINE, "--output_dir", "macs", *options]))
    model = AutoModelForSequenceClassification.from_pretrained("dense")
    units = unit_map(model).numbering("both")
    macs, spent = unit_macs(model, units, 16), []
    for entry in entries:
        kept = entry["kept_heads_by_site"]
        keep = [unit in kept[site.name] for site in units.sites for unit in range(site.heads)]
        spent.append(100 * macs[keep].sum() / macs.sum())
        assert entry["macs_percent"] == pytest.approx(spent[-1])
    most = 100 * macs.max() / macs.sum()
    assert len(entries) == 5 and all(goal - most < found <= goal for goal, found in zip((70, 40, 10), spent[1:]))
    assert "another --macs_per_round" in refused("macs", "--prune_units", "both", "--data_subset", "4", heads=5)
    for words, sentence in (("0", "macs.per.round is 0.0; it must be a share"), ("0.1 --num_of_heads 3", "give one")):
        with pytest.raises(HeadPruningError, match=sentence):
            parse_michel([*LINE, "--output_dir", "macs", "--macs_per_round", *words.split()])


def test_heads_and_units_by_one_ranking(place, monkeypatch):
    monkeypatch.chdir(place)
    units = unit_map(AutoModelForSequenceClassification.from_pretrained("dense")).numbering("both")
    total = units.num_heads
    entries = michel("both", "--prune_units", "both", "--data_subset", "4", heads=total // 3 + 1)
    assert [entry["heads"] for entry in entries] == [total, total - total // 3 - 1, total - 2 * (total // 3 + 1), 0]
    mask = HeadMask.load(place / "both" / "masks.safetensors")
    assert (
        mask.unit_map.units == "both" and mask.kept == entries[2]["heads"] and set(mask.counts()) == {"heads", "units"}
    )
    told = json.loads((place / "both" / "all_results.json").read_text())
    assert told["heads_kept"] + told["units_kept"] == mask.kept
    assert "--prune_units was both" in refused("both", "--data_subset", "4", heads=5)
    assert "cannot number 'neurons'" in refused("neurons", "--prune_units", "neurons")
    export_compact(Path("both"), Path("small"))
    small = AutoModelForSequenceClassification.from_pretrained("small")
    widths = [site.width for site in unit_map(small).feed_forward]
    assert widths == [
        sum(mask.by_site()[site.name]) for site in mask.unit_map.feed_forward if any(mask.by_site()[site.name])
    ]


# -- many sizes from one run -----------------------------------------------------------------------------------------


def test_many_sizes_from_one_run(here, monkeypatch, capsys):
    line = ["--save_at", "24,16,8", "--finetune_updates", "2", "--finetune_learning_rate", "1e-3"]
    from hf_plugin.glue import sizes

    written = sizes.write_json

    def cut_off(path, data):
        if path.parent.name == "heads8":
            raise KeyboardInterrupt
        written(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sizes, "write_json", cut_off)
        michel("sizes", *line, heads=8)
    assert not (here / "sizes" / "all_results.json").exists()
    first = (here / "sizes/sizes/heads16/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(MichelRun, "importance", None)  # the rounds are there
    rounds = {entry["heads"]: entry for entry in michel("sizes", *line, heads=8)}
    assert (here / "sizes/sizes/heads16/model.safetensors").stat().st_mtime_ns == first
    parameters = []
    for count in (24, 16, 8):
        folder = here / "sizes" / "sizes" / f"heads{count}"
        results, report = (json.loads((folder / name).read_text()) for name in ("all_results.json", "pruning.json"))
        assert results["heads_kept"] == count and report["options"]["finetune_updates"] == 2
        assert HeadMask.load(folder / "masks.safetensors").kept_heads() == rounds[count]["kept_heads_by_site"]
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        parameters.append(sum(parameter.numel() for parameter in model.parameters()))
        assert np.isfinite(results["eval_loss"])
    assert parameters == sorted(set(parameters), reverse=True)
    found = {run.folder.name: run for run in find_runs(["sizes"])}
    assert found["heads8"].numbers["parameters"] == parameters[-1] and found["heads24"].dense
    # Trained on: not the weights of the start, of which the masked model is made.
    places = ("dense", "sizes/sizes/heads24")
    dense, same = (AutoModelForSequenceClassification.from_pretrained(place) for place in places)
    assert not torch.equal(dense.classifier.weight, same.classifier.weight)
    # Finished, nothing is run again; other settings of the training are another run's.
    assert "--finetune_updates was 2 and is now 3" in refused("sizes", *line[:3], "3", *line[4:], heads=8)


@pytest.mark.parametrize("words, sentence", [
    (["--save_at", "24,x"], "--save_at 24,x is no list of counts; write it as 72,36,18."),
    (["--finetune_updates", "3"], "--finetune_updates trains the models of --save_at; add the one or drop the other."),
    (["--save_at", "12", "--finetune_updates", "-1"], "--finetune_updates must be 0 or more, "
     "--finetune_learning_rate above 0; correct them."),
    (["--save_at", "12,7"], "No round leaves the 7 heads of --save_at, only 24, 12; choose among these, or another "
     "--num_of_heads than 12."),
])  # fmt: skip
def test_sizes_that_cannot_be_had(here, words, sentence):
    assert refused("no-sizes", *words) == sentence


def test_rounds_of_macs_leave_no_sizes():
    with pytest.raises(HeadPruningError, match="--macs_per_round leave no counts for --save_at; give --num_of_heads"):
        parse_michel([*LINE, "--output_dir", "out", "--macs_per_round", "0.2", "--save_at", "12"])
