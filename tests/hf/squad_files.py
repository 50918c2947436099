"""A place to run the manual's SQuAD commands in: data/squad/, and the two models' folders with tiny models in them."""

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer, DebertaV2Config, DebertaV2Model, DebertaV2Tokenizer

WORDS = [f"{first}{second}" for first in "bdfgklmnpr" for second in ("ar", "em", "il", "on")]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "follows", "?", ".", ",", "the", *WORDS]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 32}
HEADS = 24
# Appended to the manual's lines: tiny schedules, no GPU, quiet.
TINY = """--max_steps 12 --per_device_train_batch_size 4 --learning_rate 1e-3 --use_cpu --disable_tqdm True
    --cache_dir cache --max_seq_length 48 --max_query_length 12 --doc_stride 16""".split()


def articles(questions: int, seed: int, unanswerable: bool) -> list[dict]:
    """Texts of random words, some longer than a window, and questions for the word that follows another one."""
    draw = random.Random(seed)
    found = []
    for i in range(questions // 2):
        words = draw.sample(WORDS, 12) if i % 4 else draw.sample(WORDS, 40) + draw.sample(WORDS, 20)
        context = "The " + " ".join(words[:-1]).title() + f", {words[-1]}."
        qas = []
        for j in range(2):
            place = draw.randrange(len(words) - 1)
            answer = words[place + 1] if place == len(words) - 2 else words[place + 1].title()
            asked = {"id": f"{seed}-{i}-{j}", "question": f"What follows {words[place]} ?"}
            begin = len("The ") + sum(len(word) + 1 for word in words[: place + 1]) - 1
            asked["answers"] = [{"text": answer, "answer_start": context.index(answer, begin)}]
            if unanswerable:
                asked["is_impossible"] = bool(j)
                if j:
                    asked |= {"question": "What follows zzz ?", "plausible_answers": asked["answers"], "answers": []}
            qas.append(asked)
        found.append({"title": f"Text {i}", "paragraphs": [{"context": context, "qas": qas}]})
    return found


def write_squad(folder: Path, version: str = "1.1", train: int = 32, dev: int = 16) -> Path:
    """Train and dev in SQuAD's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", train), ("dev", dev))):
        data = {"version": version, "data": articles(count, seed, version == "2.0")}
        (folder / f"{name}-v{version}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def write_bert(place: Path) -> Path:
    """A tiny untrained BERT with its uncased tokenizer."""
    place.mkdir(parents=True)
    (place / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizer.from_pretrained(place, do_lower_case=True).save_pretrained(place)
    torch.manual_seed(0)
    config = BertConfig(**SIZES, vocab_size=len(VOCABULARY), max_position_embeddings=512)
    BertModel(config, add_pooling_layer=False).save_pretrained(place)
    return place


def write_deberta(place: Path) -> Path:
    """A tiny untrained DeBERTa-v3 with its cased tokenizer."""
    place.mkdir(parents=True)
    pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0), ("[MASK]", 0.0)]
    shown = {form for word in VOCABULARY[5:] for form in (word, word.title())}
    pieces += [(f"▁{word}", -2.0) for word in sorted(shown)] + [(letter, -9.0) for letter in "▁.,?abcdefghiklmnoprtw"]
    DebertaV2Tokenizer(vocab=pieces, unk_id=3).save_pretrained(place)
    torch.manual_seed(0)
    config = DebertaV2Config(
        **SIZES,
        **{"vocab_size": len(pieces), "type_vocab_size": 0, "relative_attention": True, "position_buckets": 16},
        **{"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "share_att_key": True},
        **{"norm_rel_ebd": "layer_norm", "max_relative_positions": -1, "layer_norm_eps": 1e-7},
    )
    DebertaV2Model(config).save_pretrained(place)
    return place


def write_squad_place(place: Path) -> Path:
    """The folder that the manual's commands are run in, with both versions of SQuAD."""
    write_squad(place / "data" / "squad", "1.1")
    write_squad(place / "data" / "squad", "2.0")
    write_bert(place / "bert-base-uncased")
    write_deberta(place / "microsoft" / "deberta-v3-base")
    return place
