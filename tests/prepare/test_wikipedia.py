"""``python -m prepare.wikipedia`` on local corpora: what it writes, and that nothing depends on how."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentencex")

from datasets import concatenate_datasets  # noqa: E402

from hf_plugin.pretraining.folder import open_pairs, read_about, statistics  # noqa: E402
from prepare.corpus import Corpus, local_files, sentences_of, splitter  # noqa: E402
from prepare.files import PrepareError  # noqa: E402
from prepare.wikipedia import main  # noqa: E402
from tests.hf.script_runs import WORDS, write_model  # noqa: E402

DOCUMENTS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, and the same documents as text, as JSON lines and as parquet."""
    place = tmp_path_factory.mktemp("corpus")
    write_model(place / "bert")
    draw = np.random.default_rng(1)

    def sentence() -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(2, 9))).capitalize() + "."

    texts = [
        "\n".join(" ".join(sentence() for _ in range(3)) for _ in range(draw.integers(1, 5))) for _ in range(DOCUMENTS)
    ]
    for kind in ("text", "json", "parquet"):
        (place / kind).mkdir()
    (place / "text" / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (place / "json" / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), place / "parquet" / "a.parquet")
    return place


def prepare(place, corpus, out, *more):
    """The command, on one of the corpora; the exit status."""
    words = [f"--data_dir={place / out}", f"--corpus={place / corpus}", f"--tokenizer={place / 'bert'}"]
    return main([*words, "--max_seq_length=32", "--shards=3", "--quiet", *more])


@pytest.fixture(scope="module")
def made(place):
    """The folder of one run."""
    assert prepare(place, "text", "made", "--workers=1") == 0
    return place / "made"


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


def test_a_run_leaves_pairs_and_what_they_are(made):
    about = read_about(made)
    pairs = concatenate_datasets([open_pairs(made, about, validation) for validation in (False, True)])
    assert about["statistics"] == statistics(made, about)
    assert len(pairs) == about["statistics"]["pairs"] > DOCUMENTS
    lengths = [len(row["first"]) + len(row["second"]) for row in pairs]
    assert max(lengths) == about["statistics"]["longest"] <= 32 - 3 and min(lengths) >= 2
    assert sum(lengths) == about["statistics"]["tokens"]
    assert sum(about["statistics"]["lengths"].values()) == len(pairs)
    share = about["statistics"]["random_pairs"] / len(pairs)
    assert share == np.mean(pairs["random"]) and abs(share - 0.5) < 3 * 0.5 / len(pairs) ** 0.5


@pytest.mark.parametrize("corpus", ["json", "parquet"])
def test_workers_and_formats_change_nothing(place, made, corpus):
    assert prepare(place, corpus, f"of_{corpus}", "--workers=4") == 0
    assert shards(place / f"of_{corpus}") == shards(made)


def test_a_stopped_run_goes_on_where_it_was(place, made, monkeypatch):
    import hf_plugin.pretraining.folder as folder

    real, written = folder.write_shard, []

    def cut_off(paths, pairs):
        if len(written) == 1:
            paths[0].write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(paths)
        return real(paths, pairs)

    monkeypatch.setattr(folder, "write_shard", cut_off)
    assert prepare(place, "text", "stopped", "--workers=1") == 130
    assert len(shards(place / "stopped")) == 2
    monkeypatch.setattr(folder, "write_shard", real)
    (place / "stopped" / "pairs-00001-of-00003.arrow").write_bytes(b"its other file is missing")
    kept = (place / "stopped" / "pairs-00000-of-00003.arrow").stat().st_mtime_ns
    assert prepare(place, "text", "stopped", "--workers=1") == 0
    assert shards(place / "stopped") == shards(made)
    assert (place / "stopped" / "pairs-00000-of-00003.arrow").stat().st_mtime_ns == kept


def test_pairs_made_otherwise_are_not_mixed(place, made, capsys):
    before = shards(made)
    assert prepare(place, "text", "made", "--workers=1", "--seed=7") == 1
    assert "another seed (42, not 7)" in capsys.readouterr().err and shards(made) == before


def test_corpora_that_cannot_be_read(place, tmp_path, capsys):
    assert prepare(place, "json", "x", "--text_column=body") == 1
    assert "no text in 'body' (it has id, text)" in capsys.readouterr().err
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(PrepareError, match="no file that ends in"):
        local_files(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("x")
    with pytest.raises(PrepareError, match="several kinds"):
        local_files(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    assert local_files(tmp_path) == (tmp_path / "a.txt",)


SENTENCES = "a b c. d e f. a c."


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", SENTENCES.encode() + b"\n\ncaf\xe9.", "a.txt cannot be read ('utf-8' codec"),
    ("a.jsonl", json.dumps({"text": SENTENCES}).encode() + b"\n{bad\n", "a.jsonl cannot be read (JSON parse error"),
    ("a.jsonl", b"[1]\n[2]\n", "a.jsonl cannot be read ("),
    ("a.txt", b"", "The corpus has no sentence in it"),
    ("a.txt", b" \n\n\t\n\n\n", "The corpus has no sentence in it"),
    ("a.jsonl", b'{"text": null}\n{"text": null}\n', "The corpus has no sentence in it"),
    ("a.txt", SENTENCES.encode(), "has one document, so none is another; give fewer --shards, and in text a blank"),
])  # fmt: skip
def test_files_that_hold_no_corpus(place, tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert prepare(place, tmp_path / name, tmp_path / "out", "--shards=1", "--workers=1") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("prepare-wikipedia: error: ") and words in said
    assert not list((tmp_path / "out").glob("*.part"))


def test_lines_of_windows_and_rows_without_text(place, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\r\n\r\n".join([b"a b c.\r\nd e."] * 3))
    assert list(Corpus((tmp_path / "a.txt",)).documents(0, 1)) == ["a b c.\nd e."] * 3
    (tmp_path / "a.jsonl").write_text('{"text": "a b c."}\n{"text": null}\n')
    assert list(Corpus((tmp_path / "a.jsonl",)).documents(0, 1)) == ["a b c.", ""]


def test_a_damaged_folder_is_not_counted(place, made, capsys):
    damaged = place / "damaged"
    shutil.copytree(made, damaged)
    shard = next(damaged.glob("pairs-*"))
    shard.write_bytes(shard.read_bytes()[:200])
    assert prepare(place, "text", "damaged", "--workers=1") == 1
    assert f"{shard} is damaged" in capsys.readouterr().err
    (damaged / "pairs.json").write_text("[]")
    assert prepare(place, "text", "damaged", "--workers=1") == 1
    assert "pairs.json is damaged" in capsys.readouterr().err


def test_whole_files_are_shards_where_there_are_enough(place, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"w{i}"}) + "\n")
    corpus = Corpus(local_files(tmp_path))
    parts = [list(corpus.documents(shard, 2)) for shard in range(2)]
    assert sorted(sum(parts, [])) == [f"w{i}" for i in range(5)] and all(parts)


def test_sentences_keep_all_words():
    text = "Dr. Smith went to Washington D.C. in Jan. 2020. He said hello.\nA list\n\n- of two"
    found = sentences_of(text, splitter("sentencex", "en"))
    assert found == ["Dr. Smith went to Washington D.C. in Jan. 2020.", "He said hello.", "A list", "- of two"]
