"""Every task of fairseq has one that prunes: five of them train, keep their state, and decode as they were kept."""

import shlex

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.tasks import TASK_REGISTRY

from head_pruning import HeadMask, HeadPruningError
from head_pruning.cli import main
from tests.fairseq.command_lines import DSP, MACHINE
from tests.fairseq.files import mask_in, read
from tests.fairseq.in_process import in_process
from tests.fairseq.runner import PLUGIN
from tests.few import few

WIDTH = "--encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-layers 2 --encoder-attention-heads 4"
BOTH = f"{WIDTH} --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 --decoder-layers 2 --decoder-attention-heads 4"
UPDATES = 4


@pytest.fixture(scope="module")
def shared(translation, tmp_path_factory):
    """The corpus with one dictionary for both languages, as the multilingual tasks want it, and other tasks' folders.

    ``mono`` has the English side alone, ``classes`` sentences with labels, ``speech`` features with texts.
    """
    folder = tmp_path_factory.mktemp("tasks")
    words = sorted(
        {line.split()[0] for side in ("de", "en") for line in (translation.data / f"dict.{side}.txt").open()}
    )
    for name, files in {"pairs": ("dict.de.txt", "dict.en.txt"), "mono": ("dict.txt",)}.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    source = [str(translation.data.parent / f"train.{side}") for side in ("de", "en")]
    text = [open(path, encoding="utf-8").read().splitlines()[:64] for path in source]
    for number, side in enumerate(("de", "en")):
        binarise(folder / "pairs" / f"train.de-en.{side}", text[number], words)
        binarise(folder / "pairs" / f"train.en-de.{side}", text[number], words)
    binarise(folder / "mono" / "train", text[1], words)
    for part, lines, names in (("input0", text[1], words), ("label", ["yes", "no"] * 32, ["yes", "no"])):
        (folder / "classes" / part).mkdir(parents=True)
        listed = "".join(f"{name} 1\n" for name in names)
        (folder / "classes" / part / "dict.txt").write_text(listed, encoding="utf-8")
        binarise(folder / "classes" / part / "train", lines, names)
    speech(folder / "speech", text[1], words)
    return folder


def binarise(prefix, lines, words):
    """Write lines as fairseq-preprocess does."""
    from fairseq.data import Dictionary, indexed_dataset

    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
    for line in lines:
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False))
    builder.finalize(f"{prefix}.idx")


def speech(folder, lines, words):
    """Write features as numbers that follow from the words, and a table of them."""
    folder.mkdir()
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    (folder / "config.yaml").write_text("vocab_filename: dict.txt\ninput_feat_per_channel: 8\n", encoding="utf-8")
    rows = ["id\taudio\tn_frames\ttgt_text"]
    for number, line in enumerate(lines):
        values = np.repeat([[words.index(w) + i for i in range(8)] for w in line.split()], 4, axis=0)
        np.save(folder / f"{number}.npy", np.sin(values).astype("float32"))
        rows.append(f"{number}\t{folder / f'{number}.npy'}\t{len(values)}\t{line}")
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


LANGUAGES = f"--lang-pairs de-en,en-de --criterion cross_entropy {BOTH}"
TASKS = {
    "translation_multi_simple_epoch": ("pairs", f"{LANGUAGES} --arch transformer --langs de,en --max-tokens 90", 24),
    "multilingual_translation": (
        "pairs",
        f"{LANGUAGES} --arch multilingual_transformer --share-encoders --share-decoders --max-tokens 90 "
        "--share-encoder-embeddings --share-decoder-embeddings",
        24,
    ),
    "denoising": (
        "mono",
        f"--arch bart_base --criterion cross_entropy {BOTH} --mask 0.3 --mask-length word --replace-length 1 "
        "--tokens-per-sample 24 --sample-break-mode eos --batch-size 8",
        24,
    ),
    "sentence_prediction": (
        "classes",
        f"--arch roberta_base --criterion sentence_prediction {WIDTH} --num-classes 2 --batch-size 8",
        8,
    ),
    "speech_to_text": (
        "speech",
        f"--arch s2t_transformer --criterion label_smoothed_cross_entropy {BOTH} --conv-channels 16 --max-tokens 400",
        24,
    ),
}


def line_of(shared, save_dir, name, *options):
    folder, own, _ = TASKS[name]
    run = f"--user-dir {shlex.quote(PLUGIN)} --task {name}_head_pruning --optimizer adam --lr 0.01 --dropout 0 \
        --max-update {UPDATES} --disable-validation --cooldown-steps 2"
    words = [word for part in (run, own, *options) for word in shlex.split(part)]
    return [shared / folder, *words, *MACHINE, "--save-dir", save_dir]


def train(trainer, iterator, updates):
    trainer.begin_epoch(1)
    batches = iterators.GroupedIterator(iterator.next_epoch_itr(shuffle=True), 1)
    for batch, _ in zip(batches, range(updates)):
        trainer.train_step(batch)


@pytest.mark.parametrize("name", few(TASKS, "multilingual_translation"))
def test_heads_and_weights_of_any_task(shared, tmp_path, name):
    options = f"{DSP} --cooldown-steps 2 --weight-pruner magnitude --final-threshold 0.5 --pruner-warmup-steps 1"
    line = line_of(shared, tmp_path, name, options)
    trainer, iterator = in_process(line)
    train(trainer, iterator, UPDATES)
    task, session = trainer.task, trainer.task.session
    assert type(task).__mro__[2] is TASK_REGISTRY[name] and session.total_steps == UPDATES
    assert session.unit_map.num_heads == TASKS[name][2] and session.head_mask().kept == 4
    assert trainer.get_num_updates() == UPDATES
    assert np.abs(session.state_dict()["dsp.adam.first"]).min() > 0  # every gate has had a gradient
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, None)
    last = tmp_path / "checkpoint_last.pt"
    assert mask_in(last) == session.head_mask() == HeadMask.load(tmp_path / "masks.safetensors")

    again, _ = in_process(line)
    again.load_checkpoint(str(last))
    assert again.task.session.head_mask() == session.head_mask() and again.get_num_updates() == UPDATES

    # The masked export is a checkpoint of fairseq's own task, whose removed heads do nothing.
    main(["export", str(last), str(tmp_path / "masked.pt"), "--to", "masked"])
    models, _, plain = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "masked.pt")])
    assert type(plain) is TASK_REGISTRY[name]
    kept = again.get_model().eval()
    batch = next(iter(iterator.next_epoch_itr(shuffle=False)))
    with torch.no_grad(), again.task.evaluating():
        for ours, theirs in zip(inputs(again.task, kept, batch), inputs(plain, models[0].eval(), batch)):
            torch.testing.assert_close(ours[0](**ours[1])[0], theirs[0](**theirs[1])[0], atol=2e-5, rtol=0)
    if name == "multilingual_translation":  # as a run on a GPU stores what two pairs of languages share
        state = read(last)
        state["model"] = {key: tensor.clone() for key, tensor in state["model"].items()}
        torch.save(state, tmp_path / "copies.pt")
        main(["export", str(tmp_path / "copies.pt"), str(tmp_path / "again.pt"), "--to", "masked"])
        one, other = (read(tmp_path / found)["model"] for found in ("masked.pt", "again.pt"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def inputs(task, model, batch):
    """Each model that a batch goes through, with its part of the batch."""
    if "net_input" not in batch:
        return [(model.models[pair], part["net_input"]) for pair, part in batch.items()]
    features = {"features_only": True} if hasattr(model, "classification_heads") else {}
    return [(model, {**batch["net_input"], **features})]


def test_options_that_today_s_numpy_would_break(translation, tmp_path):
    line = translation.train(tmp_path, "--pruner random --num-of-heads 4 --num-batch-buckets 3")
    trainer, iterator = in_process(line)
    train(trainer, iterator, 1)
    lengths = {batch["net_input"]["src_tokens"].shape[1] for batch in iterator.next_epoch_itr(shuffle=False)}
    assert trainer.get_num_updates() == 1 and len(lengths) <= 3


def test_every_task_has_one_that_prunes():
    plain = {name for name in TASK_REGISTRY if not name.endswith("_head_pruning")}
    assert {f"{name}_head_pruning" for name in plain if not name.startswith("translation_watched")} <= set(
        TASK_REGISTRY
    )


def test_a_task_that_does_not_prune_is_told_of(translation, tmp_path):
    line = translation.train(tmp_path, "--num-of-heads 4 --joint-pruning", task="translation")
    with pytest.raises(HeadPruningError, match="use --task translation_head_pruning") as error:
        in_process(line)
    assert "--num-of-heads and --joint-pruning are options of tasks that prune" in str(error.value)


def test_a_run_without_a_method_is_warned(translation, tmp_path, caplog):
    in_process(translation.train(tmp_path))
    assert [m for m in caplog.messages if "no method is chosen" in m and "use --task translation" in m]
