"""A place to run the manual's commands in: data/MNLI/, and bert-base-uncased/ holding a tiny BERT."""

from pathlib import Path

from transformers import BertTokenizer

from tests import forked
from tests.hf.glue_files import LABELS, OFFICIAL
from tests.hf.tiny import tiny_bert

ROOT = Path(__file__).resolve().parents[2]
HEADS = 24  # 2 layers of 12
WORDS = [f"w{i}" for i in range(20)]
# Appended to the manual's lines: tiny schedules, no GPU, quiet.
TINY = "--max_steps 12 --per_device_train_batch_size 4 --learning_rate 1e-3 --use_cpu --disable_tqdm True".split()


def write_model(place: Path, **options) -> Path:
    """A tiny untrained encoder with its tokenizer."""
    place.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (place / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer.from_pretrained(place).save_pretrained(place)
    sizes = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 32, "vocab_size": len(words)}
    tiny_bert(**{**sizes, **options}).bert.save_pretrained(place)
    return place


def write_task(data: Path, folder: str, rows: int = 24) -> Path:
    """A GLUE task in its official layout, with more rows than the six of ``glue_files``."""
    target = data / folder
    target.mkdir(parents=True)
    labels = LABELS[folder]
    for stem, (header, pattern) in OFFICIAL[folder].items():
        lines = [] if header is None else [header]
        for i in range(rows):
            a, b = f"w{i % 20} w{(i * 7) % 20} w{(i * 3) % 20}", f"w{(i * 5) % 20} w{i % 11}"
            lines.append(pattern.format(i=i, a=a, b=b, y=labels[i % len(labels)]))
        (target / f"{stem}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def write_place(place: Path, *folders: str) -> Path:
    """The folder that the manual's commands are run in."""
    for folder in folders or ("MNLI",):
        write_task(place / "data", folder)
    write_model(place / "bert-base-uncased")
    return place


def start(place: Path, *command: str) -> forked.Command:
    """Start ``python command`` in ``place``."""
    return forked.Command("transformers", command, place)
