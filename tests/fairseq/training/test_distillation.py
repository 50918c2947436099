"""Learning from a teacher in fairseq-train: the loss, beside other methods, resumed, on every task."""

import shutil

import numpy as np
import pytest
import torch

from fairseq_plugin.checkpoints.keeper import keeper_of
from head_pruning import HeadPruningError
from tests.fairseq.command_lines import DSP, SUBSET
from tests.fairseq.files import mask_in, read, same, same_training_state, weights_of
from tests.fairseq.in_process import in_process
from tests.fairseq.runner import Runner, logged
from tests.fairseq.training import test_other_tasks
from tests.fairseq.training.test_weights import KEPT_OF_LEFT, PLATON, UPDATES, nonzero, pruned_of
from tests.few import few

english = test_other_tasks.text  # a fixture
LOSS = "--distill-logits 0.5 --distill-temperature 3 --distill-hidden 0.2"
MODELS = {
    "language_modeling": "--arch transformer_lm --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 \
        --decoder-attention-heads 4 --share-decoder-input-output-embed",
    "masked_lm": "--arch roberta_base --encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 \
        --encoder-attention-heads 4 --criterion masked_lm",
}


def write(line, path):
    """The checkpoint of a model that was not trained yet."""
    trainer, _ = in_process(line)
    trainer._gathered_optim_state = None  # fairseq-train sets it
    trainer.save_checkpoint(str(path), {})
    return path


@pytest.fixture(scope="module")
def teacher(translation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return write(translation.train(folder, "--seed 5"), folder / "teacher.pt")


@pytest.fixture(scope="module")
def beside(translation, teacher, tmp_path_factory):
    """The folder of a run that prunes heads and weights and learns from a teacher, and its output."""
    folder = tmp_path_factory.mktemp("beside")
    options = (DSP, PLATON, LOSS, f"--teacher-path {teacher} --save-interval-updates 5")
    done = Runner(folder).run("train", translation.train(folder / "run", *options, updates=UPDATES))
    return folder / "run", done.out, options


def plain(line):
    """The command line without label smoothing, which other criteria than the usual one do not know."""
    place = line.index("--label-smoothing")
    return [*line[:place], *line[place + 2 :]]


def step(trainer, sample):
    """The objective of one micro-batch, and the task loss of the same."""
    task, model, criterion = trainer.task, trainer.get_model(), trainer.get_criterion()
    sample, _ = trainer._prepare_sample(sample)
    with torch.no_grad():
        loss = criterion(model.eval(), sample)[0]
    total, size, _ = task.train_step(sample, model, criterion, trainer.optimizer, 0)
    return float(total), float(loss), sample, size


@pytest.mark.parametrize("average", few(["", "--sentence-avg"], ""))
def test_the_objective(translation, teacher, tmp_path, average):
    options = f"--dropout 0 --criterion cross_entropy --teacher-path {teacher} {average}"
    bleu = "--eval-bleu --eval-bleu-args {} --eval-bleu-detok space"
    trainer, epochs = in_process(plain(translation.train(tmp_path, LOSS, options, bleu)))
    model, learnt = trainer.get_model(), trainer.task.session.pruners[0].teacher.model
    assert trainer.task.sequence_generator.model.models[0] is model is not learnt
    same(dict(learnt.state_dict()), weights_of(teacher))
    total, loss, sample, size = step(trainer, next(iter(epochs.next_epoch_itr(shuffle=False))))
    assert size == (sample["nsentences"] if average else sample["ntokens"])
    states = []
    with torch.no_grad():
        for each in (model, learnt):
            logits, extra = each.eval()(**sample["net_input"])
            encoder = each.encoder(sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"], True)
            states.append((logits, encoder["encoder_states"], extra["inner_states"]))
    (mine, *inside), (theirs, *goal) = states
    target = sample["target"].ne(model.decoder.dictionary.pad())
    far = torch.nn.functional.kl_div(
        (mine / 3).log_softmax(-1), (theirs / 3).log_softmax(-1), log_target=True, reduction="none"
    )
    expected = 0.5 * 9 * far[target].sum() / target.sum()
    for ours, others, tokens in zip(inside, goal, (~encoder["encoder_padding_mask"][0], target)):
        for one, two in zip(ours, others):
            expected += 0.2 * (one - two)[tokens.T].square().mean()
    assert total == pytest.approx(loss + float(expected) * float(target.sum()), rel=1e-5) and total > loss


def test_a_student_that_is_its_teacher_has_nothing_to_learn(translation, teacher, tmp_path):
    options = "--distill-hidden 1 --distill-attention 1 --dropout 0 --label-smoothing 0"
    trainer, epochs = in_process(translation.train(tmp_path, options, f"--teacher-path {teacher}"))
    trainer.get_model().load_state_dict(weights_of(teacher))
    total, loss, *_ = step(trainer, next(iter(epochs.next_epoch_itr(shuffle=False))))
    assert total == pytest.approx(loss, rel=1e-6)
    assert all(abs(value) < 1e-9 for value in trainer.task.session.metrics().values())
    assert trainer.task.session.steps_per_epoch == len(epochs)


def test_heads_and_weights_are_exact_and_the_teacher_is_not_kept(beside, teacher):
    folder, out, _ = beside
    last = folder / "checkpoint_last.pt"
    assert mask_in(last).kept == 4 and nonzero(pruned_of(last)) == KEPT_OF_LEFT
    assert {name: value.shape for name, value in weights_of(last).items()} == {
        name: value.shape for name, value in weights_of(teacher).items()
    }
    kept = read(last)["extra_state"]["head_pruning"]
    assert kept["pruners"] == ["platon", "logits"] and kept["session"]["logits.teacher"].shape == (3,)
    # But for two versions and the embeddings' second name.
    assert len(read(last)["last_optimizer_state"]["state"]) == len(weights_of(last)) - 3
    for term in ("logits", "hidden"):
        values = logged(out, f"logits_{term}_loss")
        assert len(values) >= UPDATES - 1 and 0 < values[-1] < values[0]


@pytest.mark.slow
def test_resumed(beside, translation, teacher, runner, tmp_path):
    """Bit-equal, also where the teacher lies elsewhere; another teacher is refused."""
    folder, _, options = beside
    moved = shutil.copy(teacher, tmp_path / "moved.pt")
    (tmp_path / "parts").mkdir()
    shutil.copy(folder / "checkpoint_1_5.pt", tmp_path / "parts" / "checkpoint_last.pt")
    line = translation.train(tmp_path / "parts", *options, f"--teacher-path {moved}", updates=UPDATES)
    another = write(translation.train(tmp_path, "--seed 6"), tmp_path / "another.pt")
    assert "distilled from another teacher" in runner.fail("train", [*line, "--teacher-path", another])
    runner.run("train", line)
    first, second = folder / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt"
    same_training_state(first, second)
    same(read(first)["extra_state"]["head_pruning"], read(second)["extra_state"]["head_pruning"])


def test_a_half_precision_run_is_resumed(translation, teacher, tmp_path):
    """fairseq halves the model after it was built, and loads the checkpoint before the teacher has followed."""
    half = "--fp16 --fp16-no-flatten-grads --fp16-init-scale 4"
    line = translation.train(tmp_path, f"--distill-logits 1 --teacher-path {teacher} {half}")
    trainer, epochs = in_process(line)
    trainer.train_step([next(iter(epochs.next_epoch_itr(shuffle=False)))])
    trainer._gathered_optim_state = None  # fairseq-train sets it
    trainer.save_checkpoint(str(tmp_path / "half.pt"), {})
    again, _ = in_process(line)
    again.load_checkpoint(str(tmp_path / "half.pt"))
    assert again.task.session.step == trainer.task.session.step


@pytest.mark.parametrize("task", few(MODELS, "language_modeling"))
def test_tasks_of_one_language(english, tmp_path, task):
    def line(*options):
        return test_other_tasks.command(english, tmp_path, f"{task}_head_pruning", MODELS[task], *options)

    teacher = write(line("--seed 5"), tmp_path / "teacher.pt")
    trainer, epochs = in_process(line(LOSS, f"--teacher-path {teacher} --distill-attention 1 --distill-task 0"))
    sample, found = next(iter(epochs.next_epoch_itr(shuffle=False))), []
    for _ in range(12):
        trainer.train_step([sample])
        found.append(trainer.task.session.metrics())
    for term in ("logits", "hidden"):
        assert 0 < found[-1][f"logits_{term}_loss"] < found[0][f"logits_{term}_loss"], term
    assert found[-1]["logits_attention_loss"] > 0


@pytest.mark.slow
def test_a_wider_and_deeper_teacher_teaches_logits_only(translation, tmp_path):
    wide = "--encoder-embed-dim 24 --decoder-embed-dim 24 --encoder-layers 3"
    teacher = write(translation.train(tmp_path, wide), tmp_path / "wide.pt")
    trainer, epochs = in_process(translation.train(tmp_path, f"--distill-logits 1 --teacher-path {teacher}"))
    trainer.train_step([next(iter(epochs.next_epoch_itr(shuffle=False)))])
    assert np.isfinite(trainer.task.session.metrics()["logits_logits_loss"])
    with pytest.raises(HeadPruningError, match="student are 16 wide and those of its teacher 24.*leave --distill-hid"):
        in_process(translation.train(tmp_path, LOSS, f"--teacher-path {teacher}"))
    deep = write(translation.train(tmp_path, "--encoder-layers 3"), tmp_path / "deep.pt")
    with pytest.raises(HeadPruningError, match="several stacks of layers.*give the pairs as --distill-layers"):
        in_process(translation.train(tmp_path, LOSS, f"--teacher-path {deep}"))


def test_a_waiting_teacher_that_does_not_fit_is_told_of_in_the_first_update(translation, teacher, runner, tmp_path):
    trained = f"--teacher-path {teacher} --finetune-from-model {teacher}"
    pairs = f"{SUBSET} --distill-hidden 1 --distill-layers 0:99 {trained}"
    done = runner.start("train", translation.train(tmp_path / "run", pairs, updates=40))
    assert done.wait() == 1 and not logged(done.out, "num_updates")
    assert "error: --distill-layers 0:99 names the pair 0:99, but the student has 6" in done.err
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.slow
def test_mistakes(translation, teacher, english, tmp_path):
    foreign = write(
        test_other_tasks.command(english, tmp_path, "language_modeling", MODELS["language_modeling"]),
        tmp_path / "foreign.pt",
    )
    state = read(teacher)
    state["model"]["encoder.embed_tokens.weight"] = state["model"]["encoder.embed_tokens.weight"][:-1]
    torch.save(state, small := tmp_path / "small.pt")
    cutoff = "--adaptive-softmax-cutoff 4,8 --criterion adaptive_loss --ddp-backend legacy_ddp"
    line = plain(translation.train(tmp_path, cutoff))
    line.remove("--share-decoder-input-output-embed")  # fairseq writes what it cannot read, with both
    adaptive = write(line, tmp_path / "adaptive.pt")
    for options, sentence in (
        ("--distill logits", "cannot be its own teacher; give the model to learn from as --teacher-path"),
        ("--distill logits --teacher-path none.pt", "There is no checkpoint none.pt"),
        (
            f"--distill logits --teacher-path {foreign}",
            "TransformerLanguageModel and the student a TransformerModel",
        ),
        (f"--distill logits --teacher-path {small}", "cannot be loaded .*same dictionaries"),
        (f"--distill logits --teacher-path {adaptive}", "an adaptive softmax gives no logits"),
        (f"--teacher-path {teacher}", "--teacher-path belongs to .* no distiller is chosen"),
        (f"--distill spd --teacher-path {teacher}", "A student of SPD starts as its teacher"),
    ):
        with pytest.raises(HeadPruningError, match=sentence):
            in_process(translation.train(tmp_path, options))


def test_a_pruned_teacher_keeps_its_heads_pruned(beside, translation, tmp_path):
    last = beside[0] / "checkpoint_last.pt"
    half = "--fp16 --fp16-no-flatten-grads --fp16-init-scale 4 --store-ema"
    options = f"--distill-hidden 1 --teacher-path {last} {half}"
    trainer, epochs = in_process(translation.train(tmp_path, options))
    learnt = trainer.task.session.pruners[0].teacher.model
    assert (keeper_of(learnt).gates.evaluation_values > 0.5).sum() == 4
    trainer.train_step([next(iter(epochs.next_epoch_itr(shuffle=False)))])
    assert {parameter.dtype for parameter in learnt.parameters()} == {torch.float16}
    assert all(np.isfinite(value) for value in trainer.task.session.metrics().values())


@pytest.mark.parametrize("average", few(["", "--sentence-avg"], ""))
def test_gates_that_learn_to_the_end_do_not_learn_from_the_teacher(translation, teacher, tmp_path, average):
    """Unless told to."""
    found = {}
    for name, more in (("alone", ""), ("taught", LOSS), ("mixed", f"{LOSS} --distill-while-choosing")):
        more = f"{more} --teacher-path {teacher}" if more else ""
        ste = f"--dropout 0 --num-of-heads 4 --joint-pruning --use-ste --gate-clip-norm 0 {average} {more}"
        trainer, iterator = in_process(translation.train(tmp_path / name, ste))
        batches = iterator.next_epoch_itr(shuffle=False)
        trainer.train_step([next(batches), next(batches)])
        found[name] = trainer.task.session.pruners[0].adam.first.copy()
    size = np.abs(found["alone"]).max()
    np.testing.assert_allclose(found["taught"], found["alone"], rtol=0, atol=1e-4 * size)
    assert np.abs(found["mixed"] - found["alone"]).max() > 1e-2 * size
