"""Pruned checkpoints in everything of fairseq that loads checkpoints."""

import re
import shlex
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils, utils

from fairseq_plugin.patches import sentence_of
from tests.fairseq.command_lines import DSP, decoded, same_decoding
from tests.fairseq.files import mask_beside, read, same, session_of, weights_of, zeroed_by_hand
from tests.fairseq.runner import PLUGIN, Runner, logged
from tests.few import few


@pytest.fixture(scope="module")
def runs(translation, tmp_path_factory) -> "Runs":
    """Two runs that keep different heads, and not as many."""
    folder = tmp_path_factory.mktemp("runs")
    runner = Runner(folder)
    for name, options in (("first", "--seed 1"), ("second", "--seed 5 --num-of-heads 7")):
        runner.run("train", translation.train(folder / name, DSP, options))
    return Runs(folder)


class Runs:
    """Checkpoints of the two runs, as trained and as made by hand."""

    def __init__(self, folder) -> None:
        self.first, self.second = (folder / name / "checkpoint_last.pt" for name in ("first", "second"))
        self.masks = mask_beside(self.first), mask_beside(self.second)
        self.by_hand = [
            zeroed_by_hand(path, folder / f"{path.parent.name}.pt", mask)
            for path, mask in zip((self.first, self.second), self.masks)
        ]


def test_runs_differ(runs):
    first, second = runs.masks
    assert (first.kept, second.kept) == (4, 7)
    assert (first.keep & ~second.keep).any()


def test_generate_with_its_default_task(runner, translation, runs):
    done = runner.run("generate", translation.generate(runs.first))
    assert "'task': {'_name': 'translation'," in done.out
    same_decoding(decoded(done.out), decoded(runner.run("generate", translation.generate(runs.by_hand[0])).out))


@pytest.mark.slow
def test_ensemble_of_differently_pruned_models(runner, translation, runs):
    ours = decoded(runner.run("generate", translation.generate(f"{runs.first}:{runs.second}")).out)
    theirs = runner.run("generate", translation.generate(":".join(map(str, runs.by_hand))))
    same_decoding(ours, decoded(theirs.out))
    assert ours != decoded(runner.run("generate", translation.generate(runs.first)).out)


@pytest.mark.slow
def test_interactive(runner, translation, data, runs, tmp_path):
    (tmp_path / "input").write_text("w1 w2 w3\nge@@ w5 w4\n", encoding="utf-8")
    outputs = []
    for path in (runs.first, runs.by_hand[0]):
        line = translation.generate(path, f"--input {tmp_path / 'input'} -s de -t en --buffer-size 32")
        outputs.append(decoded(runner.run("interactive", line).out))
    same_decoding(*outputs)
    assert len(outputs[0]) == 2


@pytest.mark.slow
def test_validate(runner, data, runs):
    rest = shlex.split("--valid-subset valid --batch-size 5 --cpu --num-workers 0 --log-format json")
    losses = []
    for path in (runs.first, runs.by_hand[0]):
        done = runner.run("validate", [data, "--user-dir", PLUGIN, "--path", path, *rest])
        losses.append(re.findall(r'"valid_loss": "([\d.]+)"', done.out))
    assert losses[0] and losses[0] == losses[1]


def logits(path, sentences=3):
    """Model outputs on fixed input, with the model loaded as a hub user loads it."""
    utils.import_user_module(Namespace(user_dir=PLUGIN))
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    model.eval()
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(4, len(task.source_dictionary), (sentences, 6), generator=generator)
    target = torch.randint(4, len(task.target_dictionary), (sentences, 5), generator=generator)
    source[0, :3] = task.source_dictionary.pad()
    with torch.no_grad():
        output = model(source, torch.full((sentences,), 6), target)[0]
    return model, task, output


def test_masked_model_equals_hard_gates(runs):
    model, task, output = logits(runs.first)
    assert type(task).__name__ == "TranslationHeadPruningTask" and task.session is None
    by_hand, _, expected = logits(runs.by_hand[0])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert (output - logits(runs.second)[2]).abs().max() > 1e-2
    same({k: v for k, v in model.state_dict().items()}, read(runs.first)["model"])


def test_one_model_loads_one_checkpoint_after_another(runs):
    model, _, _ = logits(runs.first)
    model.load_state_dict(read(runs.second)["model"])
    same({k: v for k, v in model.state_dict().items()}, read(runs.second)["model"])
    _, _, expected = logits(runs.second)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(4, 24, (3, 6), generator=generator)
    again, _, _ = logits(runs.second)
    for one in (model, again):
        one.eval()
    with torch.no_grad():
        pair = [one(source, torch.full((3,), 6), source)[0] for one in (model, again)]
        assert torch.equal(*pair)
        model.load_state_dict(weights_of(runs.second))  # a dense checkpoint: all heads are back
        dense = model(source, torch.full((3,), 6), source)[0]
    assert not any(name.startswith("head_pruning.") for name in model.state_dict())
    assert (dense - pair[0]).abs().max() > 1e-2


def damaged(path, target, change):
    state = read(path)
    change(state["model"])
    torch.save(state, target)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.pop("head_pruning.meta.version1"),
        lambda model: model.update({"head_pruning.meta.version1": torch.zeros(9, dtype=torch.uint8)}),
        lambda model: model.update({"head_pruning.meta.version1": torch.tensor(list(b"{}"), dtype=torch.uint8)}),
        lambda model: model.update({"head_pruning.keep": torch.ones(5)}),
    ],
    ids=["no description", "unreadable", "empty", "short mask"],
)
def test_damaged_state_is_named(runs, tmp_path, change):
    path = damaged(runs.first, tmp_path / "damaged.pt", change)
    with pytest.raises(Exception) as caught:  # fairseq wraps errors of loading
        logits(path)
    assert re.search("damaged|5 entries", sentence_of(caught.value))


def test_damaged_state_ends_a_command_with_one_sentence(runner, translation, runs, tmp_path):
    path = damaged(runs.first, tmp_path / "damaged.pt", lambda model: model.pop("head_pruning.meta.version1"))
    assert "damaged" in runner.fail("generate", translation.generate(path))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.pop("head_pruning.session.dsp.logits"), marks=pytest.mark.slow),
        pytest.param(lambda model: model.pop("head_pruning.session.step"), marks=pytest.mark.slow),
        lambda model: model.pop("head_pruning.meta.version1"),
    ],
    ids=["no logits", "no step", "no description"],
)
def test_resuming_from_damaged_state_is_refused(runner, translation, runs, tmp_path, change):
    path = damaged(runs.first, tmp_path / "damaged.pt", change)
    sentence = runner.fail("train", translation.train(tmp_path / "run", DSP, f"--restore-file {path}", updates=9))
    assert "damaged" in sentence
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    "change", few(["--encoder-layers 1", "--encoder-attention-heads 2"], "--encoder-attention-heads 2")
)
def test_checkpoint_of_another_architecture(runner, translation, runs, tmp_path, change):
    line = translation.train(tmp_path / "run", DSP, change, f"--restore-file {runs.first}", updates=9)
    assert "another architecture" in runner.fail("train", line)


@pytest.mark.slow
def test_plain_training_goes_on_with_the_mask(runner, translation, runs, tmp_path):
    line = translation.train(tmp_path / "plain", f"--restore-file {runs.first}", task="translation", updates=20)
    losses = logged(runner.run("train", line).out, "loss")
    assert len(losses) >= 12
    after = tmp_path / "plain" / "checkpoint_last.pt"
    before = {k: v for k, v in read(runs.first)["model"].items() if k.startswith("head_pruning.")}
    same({k: v for k, v in read(after)["model"].items() if k.startswith("head_pruning.")}, before)
    name = "decoder.embed_tokens.weight"
    assert not torch.equal(weights_of(after)[name], weights_of(runs.first)[name])
    removed = zeroed_by_hand(after, tmp_path / "hand.pt", runs.masks[0])
    same_decoding(
        decoded(runner.run("generate", translation.generate(after)).out),
        decoded(runner.run("generate", translation.generate(removed)).out),
    )
    # And the gates can be trained on from there.
    again = translation.train(tmp_path / "again", DSP, f"--restore-file {after}", "--reset-optimizer", updates=3)
    runner.run("train", again)
    assert session_of(tmp_path / "again" / "checkpoint_last.pt")["dsp.adam.steps"] == 3
