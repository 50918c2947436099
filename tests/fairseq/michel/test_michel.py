"""Michel pruning from the command line of the manual, resumed, and against a direct computation."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import options, scoring
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_plugin.michel import run as run_michel
from head_pruning import HeadMask, HeadPruningError
from head_pruning.masks import full_mask
from tests import forked
from tests.fairseq.command_lines import HEADS
from tests.fairseq.runner import PLUGIN
from tests.fairseq.test_host import LANGUAGE, untrained  # noqa: F401  (a fixture)
from tests.few import few

# The manual's line; what follows it is appended.
MANUAL = """-s de -t en -a transformer_iwslt_de_en --restore-file {checkpoint}
    --optimizer adam --adam-betas '(0.9,0.98)'
    --reset-optimizer --batch-size 32 --beam 5 --remove-bpe --num-of-heads 4 --exact-pruning"""


TASK = f"--user-dir {PLUGIN} --task translation_head_pruning"


@pytest.fixture(scope="module")
def dense(translation, tmp_path_factory):
    """A dense checkpoint trained by plain ``translation``."""
    from tests.fairseq.runner import Runner

    folder = tmp_path_factory.mktemp("dense")
    Runner(folder).run("train", translation.train(folder / "out", task="translation", updates=30))
    return folder / "out" / "checkpoint_last.pt"


def _command(data, dense, save_dir, *more):
    line = [str(data), *shlex.split(MANUAL.format(checkpoint=dense))]
    return ["-m", "fairseq_plugin.run_michel", *line, "--save-dir", str(save_dir), "--cpu", *more]


def _run(command):
    return forked.run("fairseq_plugin", command)


#: Options of a run that takes a second: the full model, one round of importance, and the last.
QUICK = "--max-len-b 5 --beam 1 --num-of-heads 23 --subset 2"


def _quick(data, dense, save_dir, *more):
    """All rounds of a run in this process; an error is raised, not printed."""
    line = _command(data, dense, save_dir, *shlex.split(QUICK), *more)[2:]
    return run_michel.run(options.parse_args_and_arch(run_michel.get_parser(), input_args=line))


def _rounds(folder):
    return json.loads((folder / "michel_rounds.json").read_text(encoding="utf-8"))["rounds"]


def test_the_manuals_command_prunes_round_by_round(data, dense, tmp_path):
    done = _run(_command(data, dense, tmp_path, "--max-len-b", "10"))
    assert done.returncode == 0, done.stderr
    rounds = _rounds(tmp_path)
    assert [r["heads"] for r in rounds] == list(range(HEADS, -1, -4))
    assert "heads kept  removed %  BLEU" in done.stdout
    for r in rounds[:-1]:
        mask = HeadMask.load(tmp_path / "michel_masks" / f"heads{r['heads']}.safetensors")
        assert mask.kept == r["heads"] and mask.kept_heads() == r["kept_heads_by_site"]
    # Exact pruning measures anew, with the heads gone that are gone: another batching would not tell so.
    line = _command(data, dense, tmp_path, "--max-len-b", "10")[2:]
    args = options.parse_args_and_arch(run_michel.get_parser(), input_args=line)
    run = run_michel.MichelRun(convert_namespace_to_omegaconf(args), args)
    for before, after in zip(rounds[:3], rounds[1:]):
        mask = HeadMask.load(tmp_path / "michel_masks" / f"heads{before['heads']}.safetensors")
        np.testing.assert_allclose(after["importance"], run.importance(mask), atol=1e-4)
    everything = run.importance(full_mask(run.unit_map))
    assert np.abs(rounds[2]["importance"] - everything).max() > 1e-2
    assert [r["sentences"] for r in rounds] == [10] * len(rounds) and "BLEU of 10 sentences" in done.stdout


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_rounds(data, dense, tmp_path):
    options = ("--max-len-b", "5", "--beam", "1")
    assert _run(_command(data, dense, tmp_path / "whole", *options)).returncode == 0
    process = forked.Command("fairseq_plugin", _command(data, dense, tmp_path / "killed", *options))
    report = tmp_path / "killed" / "michel_rounds.json"
    process.kill_once(lambda: report.exists() and len(_rounds(tmp_path / "killed")) >= 2)
    before = len(_rounds(tmp_path / "killed"))
    assert before < len(_rounds(tmp_path / "whole"))
    assert _run(_command(data, dense, tmp_path / "killed", *options)).returncode == 0
    assert _rounds(tmp_path / "killed") == _rounds(tmp_path / "whole")


@pytest.mark.slow
def test_importance_is_the_sum_of_absolute_derivatives(data, dense, tmp_path):
    from fairseq import checkpoint_utils

    import fairseq_plugin  # noqa: F401  (reads checkpoints)
    from fairseq_plugin.modules.unit_map import unit_map

    for flag in ((), ("--signed-importance",)):
        folder = tmp_path / f"signed{len(flag)}"
        line = _command(data, dense, folder, "--beam", "1", "--score-sentences", "2", "--num-of-heads", "23", *flag)
        run_michel.run(options.parse_args_and_arch(run_michel.get_parser(), input_args=line[2:]))
    models, saved, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(dense)], arg_overrides={"data": str(data)}
    )
    model, criterion = models[0].eval(), task.build_criterion(saved.criterion)
    here = unit_map(model)
    modules = dict(model.named_modules())
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_sentences=32, max_positions=(1024, 1024))
    signed, absolute = np.zeros(here.num_heads), np.zeros(here.num_heads)
    for sample in batches.next_epoch_itr(shuffle=False):
        derivatives = []
        for site, _ in here.slices():
            # Derivative at 1 of scaling one head = the inner product of its output columns with their gradient.
            modules[site.out_proj].weight.grad = None
            modules[f"{site.name}"]._set_skip_embed_dim_check()
        criterion(model, sample)[0].backward()
        for site, _ in here.slices():
            weight = modules[site.out_proj].weight
            derivatives.append((weight.grad * weight).view(weight.shape[0], site.heads, -1).sum((0, 2)).detach())
        values = torch.cat(derivatives).double().numpy()
        signed += values
        absolute += abs(values)
    for expected, folder in ((absolute, tmp_path / "signed0"), (signed, tmp_path / "signed1")):
        got = np.array(_rounds(folder)[1]["importance"])
        rows = expected.reshape(-1, 4)
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
        rows = (rows - rows.min()) / (rows.max() - rows.min())
        np.testing.assert_allclose(got, rows.reshape(-1), atol=2e-4)


@pytest.mark.slow
def test_rounds_of_other_settings_are_neither_taken_nor_replaced(data, dense, tmp_path):
    copy = tmp_path / "checkpoint_last.pt"
    options = ("--max-len-b", "5", "--beam", "1", "--num-of-heads", "23", "--score-sentences", "2")
    copy.write_bytes(dense.read_bytes())
    assert _run(_command(data, copy, tmp_path / "out", *options)).returncode == 0
    first = (tmp_path / "out" / "michel_rounds.json").read_bytes()
    # The same name, but not the same checkpoint.
    state = torch.load(dense, weights_only=False)
    state["model"]["decoder.layers.0.fc1.weight"] *= -1
    torch.save(state, copy)
    refused = _run(_command(data, copy, tmp_path / "out", *options, "--num-of-heads", "22"))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    sentence = refused.stderr.splitlines()[-1]
    assert "(another --restore-file, --num-of-heads was 23 and is now 22); choose another --save-dir" in sentence
    assert (tmp_path / "out" / "michel_rounds.json").read_bytes() == first


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param(("--num-of-heads", "99"), "from 1 to 24", marks=pytest.mark.slow),
        pytest.param(("--num-of-heads", "0"), "from 1 to 24", marks=pytest.mark.slow),
        pytest.param(("--score-at", "four"), "--score-at is four", marks=pytest.mark.slow),
        (("--restore-file", "nothing.pt"), "There is no checkpoint nothing.pt"),
    ],
)
def test_bad_input_ends_with_one_sentence(data, dense, tmp_path, change, words):
    done = _run(_command(data, dense, tmp_path / "out", *change))
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not Path(tmp_path / "out" / "michel_rounds.json").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ("--importance-sentences -5", "--importance-sentences is -5; give 1 or more, or leave it out for all"),
        ("--score-sentences -5", "--score-sentences is -5"),
        ("--subset 0", "--subset is 0"),
        ("--beam 0", "--beam is 0; give 1 or more."),
        ("--score-at 1 --score-beam 0", "--score-beam is 0"),
        (f"{TASK} --l0-penalty 5", "--l0-penalty takes a training"),
        (f"{TASK} --head-mask-file masks.safetensors", "There is no file masks.safetensors"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_loaded(data, tmp_path, change, words):
    with pytest.raises(HeadPruningError, match=words):
        _quick(data, tmp_path / "nothing.pt", tmp_path, *change.split())


@pytest.mark.slow
def test_counts_that_no_round_leaves_are_refused(data, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(run_michel.MichelRun, "score", lambda *args: pytest.fail("it went on to score"))
    with pytest.raises(HeadPruningError, match="names 99, 9, but no round .* --num-of-heads 23 give some of 24, 1, 0"):
        _quick(data, dense, tmp_path, "--score-at", "9,99,1")
    with pytest.raises(HeadPruningError, match=r"give some of 24, 23, .*, 15, \.\.\., 0\."):
        _quick(data, dense, tmp_path, "--num-of-heads", "1", "--score-at", "99")


def test_data_of_which_the_model_can_read_nothing_are_refused(data, dense, tmp_path):
    with pytest.raises(HeadPruningError, match="can read no sentence of test"):
        _quick(data, _changed(dense, tmp_path, max_source_positions=2), tmp_path)


def _changed(checkpoint, folder, **change):
    state = torch.load(checkpoint)
    state["cfg"]["model"] = {**_plain(state["cfg"]["model"]), **change}
    state["cfg"]["task"] = {**_plain(state["cfg"]["task"]), **change}
    torch.save(state, folder / "changed.pt")
    return folder / "changed.pt"


def _plain(part) -> dict:
    return part if isinstance(part, dict) else vars(part)


@pytest.mark.parametrize("name", few(["bleu", "sacrebleu", "chrf"], "sacrebleu"))
def test_every_round_is_scored_anew(data, dense, tmp_path, name, capsys):
    """The score of a round is that of its own translations, and not of those of the rounds before."""
    scored = []
    build = scoring.build_scorer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "build_scorer", lambda *args: scored.append(build(*args)) or scored[-1])
        rounds = _quick(data, dense, tmp_path, "--scoring", name, "--score-at", "1")
    assert {"bleu": "BLEU", "sacrebleu": "sacreBLEU", "chrf": "chrF"}[name] in capsys.readouterr().out
    assert [r["heads"] for r in rounds] == [24, 1, 0] and all(0 <= r["score"] <= 100 for r in rounds)
    if name != "bleu":  # whose scorer counts in C
        assert [len(scorer.pred) for scorer in scored if scorer.pred] == [10, 10, 10, 10]
        import sacrebleu

        measure = {"sacrebleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
        dense_ones = next(scorer for scorer in scored if scorer.pred)
        assert rounds[0]["score"] == pytest.approx(measure(dense_ones.pred, [dense_ones.ref]).score)
        assert not any("@@" in text for text in dense_ones.pred + dense_ones.ref)


def test_a_scorer_whose_package_is_missing_is_refused_with_one_sentence(data, dense, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "editdistance", None)
    with pytest.raises(HeadPruningError, match="--scoring wer needs a package that is not installed"):
        _quick(data, dense, tmp_path, "--scoring", "wer")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, words",
    [
        ("--seed 5 --lenpen 2", r"--seed was not set and is now 5, another --lenpen"),
        ("--unkpen 1", "another --unkpen"),
        ("--min-len 2 --no-repeat-ngram-size 2", "--no-repeat-ngram-size was not set and is now 2"),
        ("--scoring sacrebleu", "--scoring was not set and is now sacrebleu"),
        ("--scoring sacrebleu --sacrebleu-lowercase", "--sacrebleu-lowercase was not set and is now True"),
        ("--score-beam 3", "--score-beam was not set and is now 3"),
        ("--required-batch-size-multiple 8", "--required-batch-size-multiple was not set and is now 8"),
        ("--train-subset valid", "--train-subset was not set and is now valid"),
        ("--fp16", "--fp16 was not set and is now True"),
    ],
)
def test_rounds_are_not_gone_on_with_when_what_they_depend_on_changed(data, dense, old_rounds, change, words):
    before = (old_rounds / "michel_rounds.json").read_bytes()
    with pytest.raises(HeadPruningError, match=words):
        _quick(data, dense, old_rounds, "--score-at", "1", *change.split())
    assert (old_rounds / "michel_rounds.json").read_bytes() == before


@pytest.mark.slow
def test_rounds_of_files_without_newer_settings_are_gone_on_with(data, dense, old_rounds, monkeypatch):
    """Those settings had their defaults, written out or not; a --score-beam says nothing without --score-at."""
    monkeypatch.setattr(run_michel.MichelRun, "score", lambda *args: pytest.fail("it was scored anew"))
    assert len(_quick(data, dense, old_rounds, "--score-at", "1")) == 3
    usual = "--seed 1 --lenpen 1 --train-subset train --scoring bleu --score-beam 5 --min-len 1"
    assert len(_quick(data, dense, old_rounds, "--score-at", "1", *usual.split())) == 3


OLD_SETTINGS = {
    *("checkpoint", "data", "test", "remove_bpe", "lengths", "batches", "heads_per_round", "exact", "signed"),
    *("importance_sentences", "score_sentences", "beam", "score_at"),
}


@pytest.fixture(scope="module")
def old_rounds(data, dense, tmp_path_factory):
    """The finished rounds of a run, in a file with the settings of the first version alone."""
    folder = tmp_path_factory.mktemp("old")
    _quick(data, dense, folder, "--score-at", "1")
    file = folder / "michel_rounds.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    report["settings"] = {name: value for name, value in report["settings"].items() if name in OLD_SETTINGS}
    assert report["settings"].keys() == OLD_SETTINGS
    file.write_text(json.dumps(report), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_truncated_checkpoint_is_refused_with_one_sentence(data, dense, tmp_path):
    (tmp_path / "cut.pt").write_bytes(dense.read_bytes()[:20000])
    with pytest.raises(HeadPruningError, match="cut.pt is damaged .it ends too early"):
        _quick(data, tmp_path / "cut.pt", tmp_path)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(HeadPruningError, match="no fairseq checkpoint: it has no model in it"):
        _quick(data, tmp_path / "other.pt", tmp_path)


@pytest.mark.slow
def test_a_model_that_does_not_translate_is_refused_with_one_sentence(data, untrained, tmp_path):  # noqa: F811
    with pytest.raises(HeadPruningError, match="is a transformer_lm, which does not translate"):
        _quick(data, untrained(LANGUAGE), tmp_path)


@pytest.mark.slow
def test_other_data_are_refused_with_one_sentence(data, dense, tmp_path):
    with pytest.raises(HeadPruningError, match="lacks data of this model .*infer language pair"):
        _quick(tmp_path, dense, tmp_path)
    with pytest.raises(HeadPruningError, match="lacks data of this model .*Dataset not found: heldout"):
        _quick(data, dense, tmp_path, "--gen-subset", "heldout")
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "dict.de.txt").open("a", encoding="utf-8") as words:
        words.write("more 1\n")
    with pytest.raises(HeadPruningError, match="do not fit the dictionaries in .*encoder.embed_tokens.weight"):
        _quick(tmp_path, dense, tmp_path)


def test_units_are_removed_by_their_importance(data, dense, tmp_path):
    line = _command(data, dense, tmp_path, *shlex.split(QUICK), "--prune-units", "ffn", "--num-of-heads", "60")[2:]
    rounds = run_michel.run(options.parse_args_and_arch(run_michel.get_parser(), input_args=line))
    mask = HeadMask.load(tmp_path / "michel_masks" / f"heads{rounds[1]['heads']}.safetensors")
    assert mask.unit_map.units == "ffn" and mask.keep.size - mask.kept == 60
    importance = np.array(rounds[1]["importance"])
    assert (importance[mask.keep].min() >= importance[~mask.keep].max()) and importance.max() == 1.0


@pytest.mark.slow
def test_rounds_of_equal_macs(data, dense, tmp_path):
    line = _command(data, dense, tmp_path, *shlex.split(QUICK), "--prune-units", "both", "--macs-per-round", "0.4")[2:]
    rounds = run_michel.run(options.parse_args_and_arch(run_michel.get_parser(), input_args=line))
    found = [entry["macs_percent"] for entry in rounds]
    assert found[0] == 100 and found[-1] == 0 and len(found) == 4
    assert 58 < found[1] <= 60 and 18 < found[2] <= 20
    mask = HeadMask.load(tmp_path / "michel_masks" / f"heads{rounds[1]['heads']}.safetensors")
    assert mask.words.count(" of ") == 2
    line += ["--score-at", "4"]
    with pytest.raises(HeadPruningError, match="--score-at names numbers of heads"):
        run_michel.run(options.parse_args_and_arch(run_michel.get_parser(), input_args=line))
