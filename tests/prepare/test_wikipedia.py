"""``python -m prepare.wikipedia`` on local corpora: what it writes, and that nothing depends on how."""

import importlib.util
import json
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentencex")

from datasets import concatenate_datasets  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hf_plugin.pretraining.folder import open_pairs, read_about, statistics  # noqa: E402
from prepare.corpus import PUNKT_LANGUAGES, Corpus, local_files, sentences_of, splitter  # noqa: E402
from prepare.files import PrepareError  # noqa: E402
from prepare.segment_pairs import PairOptions, pairs_of_shard  # noqa: E402
from prepare.spread import documents_of, spread, spread_path  # noqa: E402
from prepare.wikipedia import Options, _Shards, main  # noqa: E402
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


DOCUMENT = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@settings(max_examples=4, deadline=None)
@given(
    data=st.data(), shards=st.integers(4, 6), files=st.sampled_from([1, 2, 7]), kind=st.sampled_from(["txt", "jsonl"])
)
def test_four_processes_write_what_one_writes(place, data, shards, files, kind):
    """Of documents of any lengths, whether shards are of whole files or not."""
    number = shards * (2 if files < shards else 3)
    documents = data.draw(st.lists(DOCUMENT, min_size=number, max_size=number + 5))
    texts = [" ".join(" ".join(WORDS[:words]) + "." for words in document) for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for i in range(files):
            mine = texts[i::files]
            held = "\n\n".join(mine) if kind == "txt" else "".join(json.dumps({"text": text}) + "\n" for text in mine)
            (corpus / f"{i}.{kind}").write_text(held, encoding="utf-8")
        for workers in (1, 4):
            out = f"{folder}/{workers}"
            assert prepare(place, corpus, out, f"--workers={workers}", f"--shards={shards}") == 0
        assert shards_of(folder, 1) == shards_of(folder, 4) and len(shards_of(folder, 4)) == 2 * shards


def shards_of(folder, workers):
    return shards(Path(folder, str(workers)))


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="bytes that are read are counted by Linux")
def test_how_much_is_read_does_not_grow_with_the_shards(place, tmp_path, made):
    text = "\n\n".join(" ".join(WORDS * 20) + "." for _ in range(200))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")

    def read(number: int) -> int:
        def total() -> int:
            return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])

        before = total()
        assert prepare(place, tmp_path / "a.txt", tmp_path / str(number), f"--shards={number}", "--workers=1") == 0
        return total() - before

    assert read(32) < read(4) + len(text)


def test_documents_are_spread_as_they_come_and_only_once(tmp_path):
    texts = [f"{i} é\u2028\n" for i in range(20)]
    spread_path(tmp_path, 0, 3).with_name(spread_path(tmp_path, 0, 3).name + ".part").write_text("of a killed run")
    told = []
    spread(iter(texts), tmp_path, [0, 2], 3, told.append, waiting_characters=10)
    assert [list(documents_of(spread_path(tmp_path, i, 3))) for i in (0, 2)] == [texts[0::3], texts[2::3]]
    assert sum(told) == 20 and len(list(tmp_path.iterdir())) == 2
    spread_path(tmp_path, 0, 3).write_text('"a"\n"b', encoding="utf-8")
    with pytest.raises(PrepareError, match="is damaged; remove it"):
        list(documents_of(spread_path(tmp_path, 0, 3)))


def test_memory_does_not_grow_with_the_corpus(place, tmp_path):
    """Neither of spreading a corpus nor of making its pairs."""

    def peaks(documents: int) -> list[int]:
        path = tmp_path / f"{documents}.parquet"
        pq.write_table(pa.table({"text": [f"{WORDS[i % 20]} a." for i in range(documents)]}), path, 200)
        corpus = Corpus((path,))
        shards = _Shards(Options(tmp_path / "none", corpus, str(place / "bert"), PairOptions()), PairOptions(), 1)
        found = []
        for work in (
            lambda: spread(corpus.documents(), tmp_path, range(4), 4, lambda number: None, waiting_characters=1000),
            lambda: sum(1 for _ in pairs_of_shard(shards.documents(0, lambda number: None), PairOptions(), 0)),
        ):
            tracemalloc.start()
            work()
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return found

    peaks(10)  # what is loaded and kept once
    small, large = peaks(1010), peaks(4040)
    assert all(b < 1.5 * a for a, b in zip(small, large)), (small, large)


def test_a_data_set_in_the_layout_of_the_hubs_is_streamed(place, tmp_path):
    texts = pq.read_table(place / "parquet" / "a.parquet")["text"].to_pylist()
    folder = tmp_path / "wikipedia" / "20231101.xx"
    folder.mkdir(parents=True)
    for i in range(3):
        rows = {"id": [str(j) for j in range(20)], "url": [""] * 20, "title": [""] * 20, "text": texts[i::3]}
        pq.write_table(pa.table(rows), folder / f"train-{i:05d}-of-00003.parquet")
    about = "configs:\n- config_name: 20231101.xx\n  data_files:\n  - split: train\n    path: 20231101.xx/train-*\n"
    (folder.parent / "README.md").write_text(f"---\n{about}---\n", encoding="utf-8")
    words = [
        f"--dataset={folder.parent}:20231101.xx",
        f"--tokenizer={place / 'bert'}",
        "--max_seq_length=32",
        "--quiet",
    ]
    words += ["--workers=1", f"--cache_dir={tmp_path / 'cache'}"]
    assert main([*words, f"--data_dir={tmp_path / 'own'}"]) == 0
    assert read_about(tmp_path / "own")["shards"] == 3  # its files
    assert prepare(place, folder, tmp_path / "local", "--workers=1") == 0
    assert shards(tmp_path / "own") == shards(tmp_path / "local")
    # More shards than it has files: its documents are spread, in their order.
    assert main([*words, f"--data_dir={tmp_path / 'more'}", "--shards=5"]) == 0
    assert prepare(place, folder, tmp_path / "local5", "--workers=1", "--shards=5") == 0
    assert shards(tmp_path / "more") == shards(tmp_path / "local5")


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


def test_options_that_cannot_be_are_named_as_they_are_spelled_here(place, capsys):
    assert prepare(place, "text", "x", f"--tokenizer={place / 'text'}") == 1
    said = capsys.readouterr().err
    assert "give --tokenizer with" in said and "tokenizer_name" not in said
    with pytest.raises(SystemExit):
        prepare(place, "text", "x", "--workers=0")
    assert "--workers must be at least 1" in capsys.readouterr().err


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
    assert list(Corpus((tmp_path / "a.txt",)).documents()) == ["a b c.\nd e."] * 3
    (tmp_path / "a.jsonl").write_text('{"text": "a b c."}\n{"text": null}\n')
    assert list(Corpus((tmp_path / "a.jsonl",)).documents()) == ["a b c.", ""]


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


def test_languages_of_punkt(tmp_path, monkeypatch, place, capsys):
    assert prepare(place, "text", "xx", "--sentences=punkt", "--language=xx") == 1
    assert "does not know the language 'xx'; give --language one of cs, da, de, " in capsys.readouterr().err
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(PrepareError, match="are not there for german; download them"):
        splitter("punkt", "de")
    from nltk.tokenize.punkt import PunktParameters, save_punkt_params

    parameters = PunktParameters()
    parameters.abbrev_types.add("bzw")
    folder = tmp_path / "tokenizers" / "punkt_tab" / PUNKT_LANGUAGES["de"]
    folder.mkdir(parents=True)
    save_punkt_params(parameters, str(folder))
    for language in ("de", "german"):
        assert splitter("punkt", language)("Es ist rot bzw. gelb. Es geht.") == ["Es ist rot bzw. gelb.", "Es geht."]


@pytest.mark.skipif(importlib.util.find_spec("nltk") is not None, reason="NLTK is installed")
def test_punkt_without_its_package():
    with pytest.raises(PrepareError, match="punkt, which is not installed"):
        splitter("punkt", "de")
