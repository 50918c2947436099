"""The demo corpus: catalogues in small made-up wheels, no network."""

import json
import subprocess
import zipfile

import pytest
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import write_po
from hypothesis import given
from hypothesis import strategies as st

from prepare import demo_data, wheels
from prepare.catalogues import pairs
from prepare.files import PrepareError
from prepare.packages import PACKAGES, Package
from prepare.pairs import Limits, clean, keep, split, template

SHAPES = ["das {} hat heute den {} gesehen", "warum wurde der {} nicht {} gemacht", "bitte {} nun den neuen {} ein"]


def catalogue(*entries):
    book = Catalog(locale="de")
    for english, german, flags in entries:
        book.add(english, german, flags=flags)
    return book


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if isinstance(content, Catalog):
                with archive.open(name, "w") as stream:
                    (write_po if name.endswith(".po") else write_mo)(stream, content)
            else:
                archive.writestr(name, content if isinstance(content, (str, bytes)) else json.dumps(content))
    return path


def fake(name, **changes):
    fields = dict(name=name, version="1.0", licence="MIT", filename=f"{name}.whl", sha256="0" * 64, megabytes=0.1)
    return Package(**{**fields, **changes})


def test_gettext_sources_are_read_without_fuzzy_obsolete_and_untranslated_entries(tmp_path):
    book = catalogue(("Save", "Sichern", ()), ("Open it", "Auf", ("fuzzy",)), ("Not yet", "", ()))
    book.add(("one file", "%d files"), ("eine Datei", "%d Dateien"))
    book.obsolete["Gone"] = book.add("Gone", "Weg")
    book.delete("Gone")
    found = pairs(wheel(tmp_path / "a.whl", {"a/locale/de/LC_MESSAGES/django.po": book}))
    assert found == [("Sichern", "Save"), ("eine Datei", "one file"), ("%d Dateien", "%d files")]


def test_a_compiled_catalogue_is_read_only_where_its_source_is_missing(tmp_path):
    book, other = catalogue(("Save", "Sichern", ())), catalogue(("Close", "Schliessen", ()))
    files = {
        "a/de/LC_MESSAGES/x.po": book,
        "a/de/LC_MESSAGES/x.mo": book,
        "a/de_DE/LC_MESSAGES/y.mo": other,
        "a/fr/LC_MESSAGES/x.po": book,
    }
    assert pairs(wheel(tmp_path / "a.whl", files)) == [("Sichern", "Save"), ("Schliessen", "Close")]


def test_json_catalogues_are_paired_by_key_and_need_both_languages(tmp_path):
    german = {"title": "Haus", "step": {"user": "Nutzer", "only": "allein"}, "odd": "Text"}
    english = {"title": "House", "step": {"user": "User"}, "odd": {"deeper": "text"}}
    files = {
        "a/translations/de.json": german,
        "a/translations/en.json": english,
        "b/translations/de.json": german,
        "c/other/de.json": german,
        "c/other/en.json": english,
    }
    assert pairs(wheel(tmp_path / "a.whl", files)) == [("Haus", "House"), ("Nutzer", "User")]


@pytest.mark.parametrize("content", ["{", "[1", b"\xff\xfe{"])
def test_a_broken_catalogue_is_named_in_the_error(tmp_path, content):
    path = wheel(tmp_path / "a.whl", {"a/translations/de.json": content, "a/translations/en.json": "{}"})
    with pytest.raises(PrepareError, match=r"a\.whl"):
        pairs(path)


def test_a_file_that_is_no_wheel_is_named_in_the_error(tmp_path):
    path = tmp_path / "a.whl"
    path.write_bytes(b"half a downl")
    with pytest.raises(PrepareError, match=r"a\.whl"):
        pairs(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Save 3 files to {folder}!", "save files to"),
        ("%(count)d von %s, %1$s oder %d", "von oder"),
        ("Größe: 10\u00a0MB", "grösse mb"),
        ("{0:.2f} %", ""),
    ],
)
def test_a_template_keeps_the_words_alone(text, expected):
    assert template(text) == expected


def test_cleaning_removes_markup_and_levels_quotes_and_space():
    assert clean("Die  <b>„neue“</b>\n Datei…") == 'Die "neue" Datei...'


@pytest.mark.parametrize(
    ("german", "english", "kept"),
    [
        ("Die Datei wurde nicht gefunden", "The file was not found", True),
        ("Datei nicht da", "The file was not found", False),
        ("The file was not found", "The file was not found!", False),
        ("Ja das ist so", "Yes, this is really how it has always been done around here", False),
        ("Die Seite https://x.de gibt es nicht", "The page https://x.de is not there", False),
        ("wort " * 30, "word " * 30, False),
    ],
)
def test_pairs_are_kept_by_length_ratio_and_content(german, english, kept):
    assert keep((german, english), Limits()) is kept


WORDS = st.sampled_from(["Haus", "haus!", "{a}", "%s", "42", "baum", "Baum", "die", "läuft", "%(x)s", "U-Bahn", "-"])
SENTENCES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=40), st.integers(0, 4), st.integers(0, 4))
def test_no_two_pairs_of_a_split_corpus_share_a_template_on_either_side(corpus, valid, test):
    try:
        splits = split(corpus, valid, test)
    except PrepareError:
        return
    assert (len(splits.valid), len(splits.test)) == (valid, test) and splits.train
    everything = splits.train + splits.valid + splits.test
    assert set(everything) <= set(corpus)
    for side in (0, 1):
        templates = [template(pair[side]) for pair in everything]
        assert len(set(templates)) == len(templates)


@given(st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_distinct_pairs(random):
    corpus = [(f"satz {chr(97 + i)}", f"sentence {chr(97 + i)}") for i in range(20)]
    shuffled = random.sample(corpus, len(corpus))
    assert split(corpus, 3, 5) == split(shuffled, 3, 5)


def test_a_missing_wheel_gives_one_sentence(tmp_path, monkeypatch):
    calls = []

    def no_pip(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(wheels.subprocess, "run", no_pip)
    with pytest.raises(PrepareError) as caught:
        wheels.fetch([fake("absent")], tmp_path / "cache", attempts=2, pause=0)
    message = str(caught.value)
    assert "absent 1.0" in message and "absent.whl" in message and message.endswith(".") and ". " not in message
    assert len(calls) == 2 and "--no-deps" in calls[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_fetched_wheel_is_moved_into_the_cache_and_not_fetched_again(tmp_path, monkeypatch):
    def pip(command, **options):
        folder = command[command.index("--dest") + 1]
        wheel(f"{folder}/a.whl", {})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    package = fake("a")
    assert wheels.fetch([package], tmp_path, pause=0) == {package: tmp_path / "a.whl"}
    monkeypatch.setattr(wheels.subprocess, "run", None)
    assert wheels.fetch([package], tmp_path) == {package: tmp_path / "a.whl"}


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheels.default_cache() == tmp_path / "head-pruning" / "wheels"


def test_the_packages_are_pinned_and_permissively_licensed():
    assert {package.licence for package in PACKAGES} <= {"MIT", "BSD-3-Clause", "Apache-2.0"}
    assert all(package.version in package.filename and len(package.sha256) == 64 for package in PACKAGES)


@pytest.fixture
def corpus(tmp_path):
    names = "hund katze vogel fisch pferd esel".split()
    german = {f"{s}{a}{b}": shape.format(a, b) for s, shape in enumerate(SHAPES) for a in names for b in names}
    english = {key: " ".join(reversed(text.upper().split())) + " please" for key, text in german.items()}
    files = {"a/translations/de.json": german, "a/translations/en.json": english}
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel(cache / "a.whl", files)
    return cache, demo_data.Settings(packages=(fake("a"),), valid=10, test=20, operations=30)


@pytest.mark.slow
def test_the_data_are_built_whole_and_only_once(corpus, tmp_path, monkeypatch, capsys):
    cache, settings = corpus
    dest = tmp_path / "demo"
    monkeypatch.setattr(demo_data, "Settings", lambda: settings)
    arguments = ["--dest", str(dest), "--cache", str(cache)]
    assert demo_data.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "train 78, valid 10, test 20" in shown and "MIT" in shown
    assert sorted(path.name for path in dest.iterdir()) == ["data-bin", "demo-data.json", "text"]
    assert (dest / "data-bin" / "train.de-en.de.idx").is_file()
    assert (dest / "data-bin" / "dict.de.txt").read_bytes() == (dest / "data-bin" / "dict.en.txt").read_bytes()
    assert len((dest / "text" / "test.de").read_text().splitlines()) == 20

    (cache / "a.whl").unlink()
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    assert demo_data.main(arguments) == 0
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before


def test_a_broken_build_leaves_no_data_and_one_sentence(corpus, tmp_path, monkeypatch, capsys):
    cache, settings = corpus
    monkeypatch.setattr(demo_data, "Settings", lambda: settings)
    (cache / "a.whl").write_bytes(b"no zip")
    dest = tmp_path / "demo"
    assert demo_data.main(["--dest", str(dest), "--cache", str(cache)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not dest.exists()
