"""run_pretraining and the two scripts of Prune Once for All: teacher, student, resuming, masking, refusals."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForPreTraining, DistilBertConfig, DistilBertForMaskedLM

from head_pruning import HeadPruningError
from head_pruning.weights import load_weight_masks
from hf_plugin.command_line.arguments import parse
from hf_plugin.pretraining.batches import IGNORED, Masker, Template, word_starts
from hf_plugin.pretraining.folder import read_about
from hf_plugin.pretraining.run import PretrainingRun, run, split_pairs
from prepare.wikipedia import main as prepare
from tests.hf.script_runs import ROOT, TINY, WORDS, write_model
from tests.hf.training.test_two_ranks import free_port

pytest.importorskip("sentencex")

SCRIPTS = ROOT / "research" / "prune-once-for-all"
# Epochs of 9 updates: the run is stopped in the second, while sparsity rises and before it rewinds once more.
KILLED = 10
SHORT = [*TINY, "--save_steps", str(KILLED), "--logging_steps", "1", "--max_steps", "14"]
SCHEDULE = "--policy_end_step 12 --end_pruning_step 13 --pruning_frequency 2".split()


def lines_of(script: str) -> list[list[str]]:
    """The commands of a script, word for word as the shell hands them over."""
    environment = {**os.environ, "PYTHON": "echo", "CORPUS": "corpus", "DATA": "pairs", "TEACHER": "teacher"}
    environment |= {"STUDENT": "student"}
    done = subprocess.run(["bash", SCRIPTS / script], env=environment, capture_output=True, text=True, check=True)
    return [shlex.split(line.replace("\\", "\\\\")) for line in done.stdout.splitlines()]


def flags(words: list[str]) -> dict[str, str]:
    """Names of flags to their values."""
    found = {}
    for word in words:
        if word.startswith("--"):
            found[name := word[2:]] = ""
        elif found:
            found[name] = word
    return found


def write_corpus(path) -> None:
    draw = np.random.default_rng(1)
    texts = [
        " ".join(" ".join(draw.choice(WORDS, size=draw.integers(2, 9))) + "." for _ in range(draw.integers(2, 28)))
        for _ in range(14)
    ]
    path.mkdir()
    (path / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, and a tiny BERT that is called as in the scripts."""
    place = tmp_path_factory.mktemp("pretraining")
    write_model(place / "bert-base-uncased", max_position_embeddings=512)
    write_corpus(place / "corpus")
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def teacher(place):
    """What teacher_preparation.sh makes in a few updates: its line and the metrics."""
    make_pairs, train = lines_of("teacher_preparation.sh")
    assert make_pairs[:2] == ["-m", "prepare.wikipedia"] and train[:2] == ["-m", "hf_plugin.run_pretraining"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert prepare([*make_pairs[2:], "--max_seq_length=64", "--quiet"]) == 0
        return train[2:], run(parse([*train[2:], *SHORT], "run_pretraining"))


@pytest.fixture(scope="module")
def student(place, teacher):
    """What student_pruning.sh makes of it."""
    (line,) = lines_of("student_pruning.sh")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return line[2:], run(parse([*line[2:], *SHORT, *SCHEDULE], "run_pretraining"))


def test_the_scripts_hold_the_recipe():
    shared = {"max_steps": "100000", "per_device_train_batch_size": "256", "warmup_ratio": "0.01"}
    shared |= {"weight_decay": "0.01", "learning_rate": "5e-5", "mlm_probability": "0.15"}
    assert shared.items() <= flags(lines_of("teacher_preparation.sh")[1]).items()
    own = {"distill_task": "0.5", "distill_logits": "0.5", "distill_temperature": "2.0", "target_sparsity": "0.9"}
    own |= {"policy_begin_step": "0", "policy_end_step": "50000", "pruning_frequency": "1000", "lr_rewind": ""}
    own |= {"end_pruning_step": "80000", "begin_pruning_step": "0", "initial_sparsity": "0.0"}
    assert {**shared, **own}.items() <= flags(lines_of("student_pruning.sh")[0]).items()


@pytest.mark.parametrize("percent", [90, 85])
def test_the_presets_of_students_are_the_script(percent):
    (line,) = lines_of("student_pruning.sh")
    words = [*line[2:], "--target_sparsity", f"{percent / 100}", "--use_cpu"]
    own = "--model_name_or_path teacher --teacher_path teacher --data_dir pairs --do_train --do_eval".split()
    own += ["--use_cpu", "--save_steps", "1000", "--save_total_limit", "2", "--output_dir", "student"]
    script = parse(words, "run_pretraining")
    preset = parse([*own, "--preset", f"pruneofa/student-{percent}"], "run_mlm")
    assert preset.training.to_dict() == script.training.to_dict() and preset.data == script.data
    for ours, theirs in zip(preset.pruners, script.pruners, strict=True):
        assert ours.name == theirs.name
        # The published pattern and the script's leave out the same of BERT.
        differing = {n for n, value in vars(ours.config).items() if value != getattr(theirs.config, n)}
        assert differing == ({"weights_exclude"} if ours.name == "gradual_magnitude" else set())


def test_documents_that_are_kept_back_when_pairs_are_made(here, teacher, caplog):
    about = read_about("pairs")
    train, validation = split_pairs("pairs", about, 5.0)
    assert len(train) + len(validation) == about["statistics"]["pairs"] and teacher[1]["eval_samples"] == len(
        validation
    )
    assert list(map(len, split_pairs("pairs", about, 0.0))) == [len(train) + len(validation), 0]
    with pytest.raises(
        HeadPruningError, match="with 5 % of its documents, not 7; give --validation_split_percentage 5"
    ):
        split_pairs("pairs", about, 7.0)
    assert not caplog.records
    del about["validation_percentage"]  # as earlier versions wrote it
    about["format"] = 1
    shutil.copytree("pairs", "old_pairs", ignore=shutil.ignore_patterns("validation*"))
    with open("old_pairs/pairs.json", "w", encoding="utf-8") as handle:
        json.dump(about, handle)
    first, last = split_pairs("old_pairs", read_about("old_pairs"), 20.0)
    assert len(first) == round(0.8 * len(train)) and [*first["first"], *last["first"]] == list(train["first"])
    assert "were made by an earlier version" in caplog.text


def test_a_teacher_is_prepared(here, teacher):
    _, metrics = teacher
    model = BertForPreTraining.from_pretrained("teacher")
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_mlm_loss"]))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_mlm_loss"] + metrics["eval_nsp_loss"], rel=0.05)
    assert 0 <= metrics["eval_nsp_accuracy"] <= 1
    assert (model.cls.predictions.decoder.weight == model.bert.embeddings.word_embeddings.weight).all()


def test_a_student_is_pruned_but_for_heads_and_embeddings(here, student):
    _, metrics = student
    weights = load_file("student/model.safetensors")
    pruned = {n for n in weights if n.endswith(".weight") and ".LayerNorm" not in n and ".embeddings." not in n}
    pruned = {name for name in pruned if not name.startswith("cls.")}
    assert "bert.pooler.dense.weight" in pruned and len(pruned) == 2 * 6 + 1
    for name, tensor in weights.items():
        share = (tensor == 0).float().mean().item()
        if name in pruned:
            assert share == pytest.approx(0.9, abs=1 / tensor.numel() ** 0.5 / 10), name
        elif tensor.dim() > 1:
            assert share < 0.05, name
    assert metrics["weights_total"] == sum(weights[name].numel() for name in pruned)
    history = _history(here / "student")
    factors = [entry["lr_factor"] for entry in history if "lr_factor" in entry]
    assert len(factors) == 14 and factors[-1] == pytest.approx(13)  # where the linear rate is a 13th
    assert all("logits_logits_loss" in entry for entry in history if "lr_factor" in entry)


@pytest.mark.parametrize("stage, more, files", [
    pytest.param("teacher", [], ["model.safetensors"], marks=pytest.mark.slow),
    ("student", SCHEDULE, ["model.safetensors", "masks.safetensors"]),
])  # fmt: skip
def test_a_killed_run_ends_bit_equal(here, request, stage, more, files):
    line, metrics = request.getfixturevalue(stage)
    killed = f"killed-{stage}"
    checkpoint = here / killed / f"checkpoint-{KILLED}"
    shutil.copytree(here / stage / checkpoint.name, checkpoint)
    assert 1 < json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] < 2
    again = run(parse([*line, *SHORT, *more, "--output_dir", killed], "run_pretraining"))
    if stage == "student":
        log = [each for each in _history(here / killed) if "weights_kept" in each]
        kept = {each["step"]: each["weights_kept"] for each in log}
        masks = [kept[step] for step in (KILLED, KILLED + 2, 14)]
        assert masks == sorted(set(masks), reverse=True)  # drawn after the run went on, twice
        rates = [each["lr_factor"] * each["learning_rate"] for each in log if each["step"] > KILLED]
        assert any(later > earlier for earlier, later in zip(rates, rates[1:]))  # and rewound
    for name in files:
        assert (here / killed / name).read_bytes() == (here / stage / name).read_bytes(), name
    assert again["eval_perplexity"] == metrics["eval_perplexity"]


def _history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def _built(*more: str) -> PretrainingRun:
    line = "--data_dir pairs --model_name_or_path teacher --do_train --output_dir built --overwrite_output_dir".split()
    return PretrainingRun(parse([*line, *TINY, *more], "run_pretraining"))


@pytest.mark.parametrize("more", [(), ("--distill", "--distill_logits", "0.5", "--temperature", "2")])
def test_logits_in_chunks_train_like_those_that_are_all_there(here, teacher, more):
    trainer = _built(*more).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.last_layer is not None
    found = []
    for last in (trainer.last_layer, None):
        trainer.last_layer = last
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        if more:
            trainer.session.before_update(0)
        torch.manual_seed(3)  # of dropout
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trainer.model.parameters())])
        trainer.model.zero_grad(set_to_none=True)
    for late, whole in zip(*found):
        torch.testing.assert_close(late, whole, rtol=1e-4, atol=1e-6)
    if more:
        assert trainer.session.pruners[0].config.distill_sum


def _distil(folder) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": len(WORDS) + 5, "dim": 16, "n_heads": 4, "n_layers": 1, "hidden_dim": 32}
    DistilBertForMaskedLM(DistilBertConfig(**sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained("bert-base-uncased").save_pretrained(folder)


def test_a_model_without_a_head_for_the_next_sentence_learns_words(here, teacher, caplog):
    _distil(here / "distil")
    words = "--data_dir pairs --model_name_or_path distil --do_train --do_eval --output_dir words".split()
    more = "--max_steps 2 --gradient_accumulation_steps 2 --gradient_checkpointing --bf16".split()
    with caplog.at_level("INFO"):
        metrics = run(parse([*words, *TINY, *more], "run_mlm"))
    assert "no head for the next sentence" in caplog.text
    assert "eval_nsp_loss" not in metrics and metrics["eval_mlm_loss"] == pytest.approx(metrics["eval_loss"], rel=0.05)


@pytest.mark.parametrize("start", ["teacher", "words-alone"])
def test_an_8_bit_model_scores_as_it_did_in_training(here, teacher, start):
    pytest.importorskip("torchao")
    if start == "words-alone":
        _distil(here / start)
    line = "--data_dir pairs --do_eval --model_name_or_path".split()
    more = [*TINY, "--do_train", "--do_quantization", "--max_steps", "2", "--output_dir", f"int8-{start}"]
    trained = run(parse([*line, start, *more], "run_pretraining"))
    more = ["--use_cpu", "--output_dir", f"int8-{start}-scored"]
    scored = run(parse([*line, f"int8-{start}", *more], "run_pretraining"))
    names = {name for name in trained if name.startswith("eval_") and "second" not in name and "runtime" not in name}
    assert len(names) >= 3 and {name: scored[name] for name in names} == {name: trained[name] for name in names}
    with pytest.raises(HeadPruningError, match=f"weights in int8-{start} are 8-bit integers"):
        run(parse([*line, f"int8-{start}", *TINY, "--do_train", "--output_dir", "refused"], "run_pretraining"))


@pytest.fixture(scope="module")
def plain(place, teacher):
    """A student's few updates, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return _student("plain")


def _student(out: str, *more: str) -> dict[str, float]:
    (line,) = lines_of("student_pruning.sh")
    own = "--max_steps 6 --policy_end_step 3 --end_pruning_step 4 --pruning_frequency 1 --output_dir".split()
    return run(parse([*line[2:], *TINY, "--logging_steps", "1", *own, out, *more], "run_pretraining"))


@pytest.mark.parametrize("flags, close", [
    pytest.param("--gradient_checkpointing", 1e-5, marks=pytest.mark.slow),
    ("--gradient_checkpointing --bf16", 2e-2),
    ("--torch_compile --torch_compile_backend eager", 1e-4),
])  # fmt: skip
def test_a_student_is_pruned_alike_however_it_computes(here, plain, flags, close):
    out = "-".join(flags.split()).replace("--", "")
    found = _student(out, *flags.split())
    assert found["weights_kept"] == plain["weights_kept"]
    for name in ("eval_mlm_loss", "eval_nsp_loss", "train_loss"):
        assert found[name] == pytest.approx(plain[name], rel=close), name
    for entry, expected in zip(_history(here / out), _history(here / "plain")):
        if "lr_factor" in expected:
            assert entry["logits_logits_loss"] == pytest.approx(expected["logits_logits_loss"], rel=close, abs=close)
    masks, others = (load_weight_masks(here / folder / "masks.safetensors") for folder in (out, "plain"))
    changed = sum(int((masks[name] != others[name]).sum()) for name in others)
    assert changed <= (0 if close < 1e-2 else 0.02 * plain["weights_total"])


def _masker(tokenizer, **options) -> Masker:
    return Masker(tokenizer, ["token_type_ids", "next_sentence_label"], seed=1, **options)


def test_what_is_masked(here):
    tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
    masker, special = _masker(tokenizer), set(tokenizer.all_special_ids)
    first, second = np.arange(5, 25, dtype=np.int32), np.arange(5, 15, dtype=np.int32)
    examples = [{"first": first, "second": second, "random": i % 2, "draw": (1, 0, i)} for i in range(600)]
    examples[0] = {**examples[0], "second": second[:3]}
    batch, again = masker(examples), masker(examples[::-1])
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name], again[name].flip(0))  # whatever batch a pair is in
    ids, asked = batch["input_ids"], batch["labels"] != IGNORED
    whole = torch.where(asked, batch["labels"], ids)
    assert whole[1].tolist() == [2, *first, 3, *second, 3]
    assert batch["token_type_ids"][1].tolist() == [0] * 22 + [1] * 11
    assert batch["attention_mask"].sum(1).tolist() == [26, *[33] * 599] and not asked[0, 26:].any()
    assert not any(int(t) in special for t in batch["labels"][asked])
    assert torch.equal(batch["label_rows"], asked.flatten().nonzero()[:, 0])
    assert batch["next_sentence_label"].tolist() == [0, 1] * 300
    share = Counter(
        "mask" if a == tokenizer.mask_token_id else "same" if a == b else "other"
        for a, b in zip(ids[asked].tolist(), batch["labels"][asked].tolist())
    )
    number = int(asked.sum())
    assert abs(number / 18000 - 0.15) < 0.01
    assert abs(share["mask"] / number - 0.8) < 0.03 and abs(share["other"] / number - 0.1) < 0.02
    other = masker([{**example, "draw": (1, 1, i)} for i, example in enumerate(examples)])
    assert not torch.equal(other["labels"], batch["labels"])  # another epoch


def test_whole_words_are_masked_together(here, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{'##' if i % 3 else ''}w{i}" for i in range(30))]
    shutil.copytree("bert-base-uncased", tmp_path / "pieces")
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "pieces" / name).unlink(missing_ok=True)
    (tmp_path / "pieces" / "vocab.txt").write_text("\n".join(words) + "\n")
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(tmp_path / "pieces")
    assert word_starts(tokenizer).tolist()[5:] == [i % 3 == 0 for i in range(30)]
    segment = np.arange(5, 35, dtype=np.int32)
    masker = _masker(tokenizer, whole_words=True, probability=0.3)
    ids, types, is_word = masker.template.fill(segment, segment)
    _, asked = masker.masked(ids, is_word, (0, 0, 0))
    groups = asked[is_word].reshape(20, 3)
    assert (groups.all(1) == groups.any(1)).all() and 0 < groups.any(1).sum() < 20
    assert not asked[~is_word].any() and Template.of(tokenizer) == masker.template


def test_the_mark_of_words_is_that_of_most_tokens():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["##", "a", "\u0120b", "c", "\u0120d", "####", "\u0120e"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))
    assert word_starts(tokenizer).tolist() == [False, False, True, False, True, False, True]


def test_refusals(here, teacher):
    with pytest.raises(HeadPruningError, match="holds no segment pairs.*prepare.wikipedia"):
        _built("--data_dir", "corpus")
    shutil.copytree("pairs", "others", dirs_exist_ok=True)
    about = json.loads((here / "pairs" / "pairs.json").read_text())
    for change, message in (
        ({"tokenizer": "x"}, "made with another tokenizer"),
        ({"max_length": 4096}, "pairs of up to 4096 tokens, but the model reads 512"),
        ({"shards": 2}, "lacks pairs-00000-of-00002.arrow"),
        ({"format": 9}, "of another version"),
    ):
        (here / "others" / "pairs.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(HeadPruningError, match=message):
            _built("--data_dir", "others")
    (here / "others" / "pairs.json").write_text(json.dumps(about))
    (here / "others" / "pairs-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(HeadPruningError, match="is damaged; remove it|is damaged .*; remove it"):
        _built("--data_dir", "others")
    for words, message in (
        ("--do_predict", "drop --do_predict"),
        ("--label_smoothing_factor 0.1", "drop --label_smoothing_factor"),
        ("--mlm_probability 0", "--mlm_probability 0 must be above 0"),
        ("--validation_split_percentage 100", "--validation_split_percentage 100 from 0"),
    ):
        with pytest.raises(HeadPruningError, match=message):
            _built(*words.split())


def test_the_flags_of_the_published_script(here):
    words = """--model_name_or_path teacher --datasets_name_config wikipedia:20200501.en bookcorpus --data_process_type
        segment_pair_nsp --dataset_cache_dir pairs --short_seq_probability 0.1 --keep_in_memory --use_wwm --do_train
        --distill --teacher_name_or_path teacher --cross_entropy_alpha 0.4 --knowledge_distillation_alpha 0.6
        --temperature 3 --output_dir x --preprocessing_num_workers 4 --do_prune --target_sparsity 0.9 --lr_rewind
        --model_type bert --config_name c --tokenizer_name t --cache_dir d --use_fast_tokenizer True
        --model_revision main --use_auth_token False --train_file a --validation_file b --overwrite_cache
        --validation_split_percentage 5 --max_seq_length 512 --mlm_probability 0.15 --pad_to_max_length False
        --max_train_samples 5 --max_eval_samples 5 --nsp_probability 0.5 --dataset_seed 42"""
    arguments = parse(shlex.split(words), "run_mlm")
    kd, masks = arguments.of("distils"), arguments.of("weights")
    assert (kd.name, kd.config.teacher_path, kd.config.distill_sum) == ("logits", "teacher", True)
    assert (kd.config.distill_task, kd.config.distill_logits, kd.config.distill_temperature) == (0.4, 0.6, 3.0)
    assert (masks.name, masks.config.lr_rewind) == ("gradual_magnitude", True)
    assert (arguments.data.data_dir, arguments.data.whole_word_mask) == ("pairs", True)
    assert any("data_process_type is ignored" in note for note in arguments.notes)


def test_the_published_configurations_are_flags(here, tmp_path):
    words = "--model_name_or_path teacher --data_dir pairs --do_train --output_dir x --do_prune --lr_rewind"
    config = "--pruning_config ../language-modeling/config/student_pruning_85_config.json"
    given = "--pruning_override '{\"pruning_frequency\": 500}' --end_pruning_step 60000"
    (found,) = parse(shlex.split(f"{words} {config} {given}"), "run_mlm").pruners
    apart = given.replace(": ", ":' '")
    assert vars(parse(shlex.split(f"{words} {config} {apart}"), "run_mlm").pruners[0].config) == vars(found.config)
    options = found.config
    assert (found.name, options.target_sparsity, options.pruning_frequency) == ("gradual_magnitude", 0.85, 500)
    assert (options.policy_end_step, options.end_pruning_step, options.lr_rewind) == (50000, 60000, True)
    assert (options.weights_include, options.weights_exclude) == (r"\.weight$", "(?:cls)|(?:teacher)")
    locked = parse(shlex.split(f"{words[:-12]} --pruning_config lock_config.json"), "run_mlm").of("weights")
    assert (locked.name, locked.config.weights_exclude) == ("lock", "(?:classifier)|(?:qa_outputs)|(?:teacher)")
    mine = {"scheduler": "iterative", "pruning_fn": "unstructured_magnitude", "explicit_prune": {"x": {}}}
    (tmp_path / "own.json").write_text(json.dumps(mine))
    for line, sentence in (
        ("--pruning_override '{}'", "--pruning_config, which is not given"),
        (f"{config} --pruning_override 0.9", "--pruning_override is no JSON object"),
        (f"{config} --pruning_override '{{\"frequency\": 5}}'", "has the unknown key 'frequency'"),
        (f"--pruning_config {tmp_path / 'own.json'}", "reads no explicit_prune out of a pruning configuration"),
    ):
        with pytest.raises(HeadPruningError, match=sentence):
            parse(shlex.split(f"{words} {line}"), "run_mlm")


PUBLISHED = "--model_name_or_path teacher --dataset_cache_directory pairs --do_train --output_dir x"
#: What each distillation of the published script means: task, logits, temperature, hidden, attention.
DISTILLATIONS = [
    ("--distill", (0.5, 0.5, 1.0, None, None)),
    ("--distill True --temperature 2", (0.5, 0.5, 2.0, None, None)),
    ("--distill --cross_entropy_alpha 0.3 --knowledge_distillation_alpha 0.7", (0.3, 0.7, 1.0, None, None)),
    ("--distill --cross_entropy_alpha 0.2 --cross_model_distillation distilbert", (0.2, 0.5, 1.0, 0.3, None)),
    ("--distill --cross_model_distillation distilbert", (0.5, 0.5, 1.0, None, None)),
    ("--cross_model_distillation tinybert --distill", (0.5, 0.5, 1.0, 1.0, 1.0)),
    ("--distill logits --distill_task 0.9", (0.9, 0.5, 1.0, None, None)),
]


@pytest.mark.parametrize("words, expected", DISTILLATIONS)
def test_published_distillation_has_its_defaults(words, expected):
    arguments = parse(f"{PUBLISHED} --teacher_name_or_path teacher {words}".split(), "run_mlm")
    (kd,) = arguments.pruners
    options, distilbert = kd.config, expected[3] not in (None, 1.0)
    names = ("distill_task", "distill_logits", "distill_temperature", "distill_hidden", "distill_attention")
    assert tuple(getattr(options, name) for name in names) == pytest.approx(expected)
    assert (kd.name, options.teacher_path, options.distill_sum) == ("logits", "teacher", True)
    assert options.distill_hidden_loss == ("cosine" if distilbert else "mse")
    assert options.distill_layers == ("last" if distilbert else None)
    assert options.distill_attention_padding == ("tinybert" in words)
    told = "\n".join(arguments.notes)
    assert "--distill adds --distill_" in told and "as in the published script" in told
    assert ("compares logits alone: 0.5 and 0.5" in told) == ("distilbert" in words and not distilbert)


def test_todays_distillation_keeps_its_own_defaults():
    (kd,) = parse(f"{PUBLISHED} --distill logits --teacher_path teacher".split(), "run_mlm").pruners
    assert (kd.config.distill_task, kd.weight("logits"), kd.config.distill_temperature) == (1.0, 1.0, 2.0)


def test_the_published_distillation_switched_off():
    words = "--distill False --teacher_name_or_path teacher --cross_model_distillation tinybert --temperature 2"
    arguments = parse(f"{PUBLISHED} {words}".split(), "run_mlm")
    assert not arguments.pruners
    ignored = "--teacher_name_or_path and --cross_model_distillation and --temperature are ignored."
    assert arguments.notes[-1].endswith(ignored)
    assert not parse(f"{PUBLISHED} --distill False".split(), "run_mlm").pruners


@pytest.mark.parametrize("words, sentence", [
    ("--teacher_name_or_path teacher", "--teacher_name_or_path is read with --distill only; add --distill"),
    ("--distill False --distill_logits 0.5", "--distill False and --distill_logits contradict each other"),
    ("--distill --cross_model_distillation mobile", "mobile is none of distilbert, tinybert"),
    ("--distill dfd --cross_model_distillation tinybert", "is a preset of --distill logits, but --distill is dfd"),
    ("--distill --cross_entropy_alpha 0.8 --cross_model_distillation distilbert", "0.8 and 0.5; lower --cross"),
    ("--distill maybe", "There is no distiller maybe"),
])  # fmt: skip
def test_mistakes_in_published_distillation(words, sentence):
    with pytest.raises(HeadPruningError, match=sentence):
        parse(f"{PUBLISHED} {words}".split(), "run_mlm")


@pytest.mark.parametrize("preset", ["distilbert", "tinybert"])
def test_a_published_preset_trains(here, teacher, preset):
    words = f"--model_name_or_path bert-base-uncased --data_dir pairs --do_train --output_dir preset-{preset}"
    words += " --distill --teacher_name_or_path teacher --cross_entropy_alpha 0.3 --logging_steps 1"
    done = PretrainingRun(
        parse([*words.split(), *TINY, "--max_steps", "1", "--cross_model_distillation", preset], "run_mlm")
    )
    done.run()
    (entry,) = [entry for entry in done.trainer.state.log_history if "logits_hidden_loss" in entry]
    assert entry["logits_hidden_loss"] > 0 and ("logits_attention_loss" in entry) == (preset == "tinybert")


@pytest.mark.slow
def test_two_ranks_are_one_that_accumulates(here, teacher):
    (line,) = lines_of("student_pruning.sh")
    shutil.copytree("teacher", "still", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((here / "still" / "config.json").read_text())
    dropped = {name: 0.0 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    (here / "still" / "config.json").write_text(json.dumps({**config, **dropped}))
    own = "--model_name_or_path still --teacher_path still --max_steps 6 --policy_end_step 3".split()
    words = [*line[2:], *SHORT, "--pruning_frequency", "1", "--end_pruning_step", "4", *own, "--logging_steps", "6"]
    words += ["--max_train_samples", "32"]  # an even number of batches
    port, ranks = free_port(), []
    for rank in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "hf_plugin.run_pretraining", *words, "--output_dir", "two"]
        command += ["--ddp_backend", "gloo"]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in ranks:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]
    run(parse([*words, "--output_dir", "one", "--gradient_accumulation_steps", "2"], "run_pretraining"))
    two, one = (load_file(f"{folder}/model.safetensors") for folder in ("two", "one"))
    start = load_file("still/model.safetensors")
    assert any(not torch.allclose(start[name], one[name], atol=1e-3) for name in one)
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
