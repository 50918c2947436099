"""``head-pruning report``: the page, opened by a parser of HTML, and what it is made of."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from head_pruning import AttentionSite, FeedForwardSite, HeadMask, HeadPruningError, UnitMap
from head_pruning.cli import main
from head_pruning.report.artifacts import write_artifacts
from head_pruning.report.page import build_sections, pareto, points_of, write_page
from head_pruning.report.runs import Run, find_runs

SITES = UnitMap(tuple(AttentionSite(f"layer{i}", "encoder_self", f"{i}", 4, 8, f"{i}.out") for i in range(6)))
SCORES = {"dsp": 0.9, "<b>&": 0.8}
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes and texts; an element that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def write_run(folder: Path, method: str, keep: int, score: float, seed: int = 0) -> None:
    mask = np.zeros(24, dtype=bool)
    mask[np.random.default_rng(seed).permutation(24)[:keep]] = True
    options, versions = {"num_of_heads": keep}, {"transformers": "5.23"}
    folder.mkdir(parents=True)
    write_artifacts(
        folder, HeadMask(SITES, mask), method=method, options=options, versions=versions, parameters=(1000, 500 + keep)
    )
    (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": score, "eval_loss": 1.0, "name": "x"}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("report") / "runs"
    for method, score in SCORES.items():
        for keep in (4, 8):
            for seed in (1, 2):
                name = re.sub(r"\W+", "other", method)
                write_run(place / f"{name}-{keep}-{seed}", method, keep, score + keep / 100 + seed / 1000, seed)
    (place / "dense").mkdir()
    (place / "dense" / "all_results.json").write_text('{"eval_accuracy": 0.95}')
    write_run(place / "dsp-4-1" / "checkpoint-3", "dsp", 1, 0.1)  # no run of its own
    return place


@pytest.fixture(scope="module")
def page(place):
    folder = place.parent
    main(
        [
            "report",
            str(place),
            "--output",
            str(folder / "r.html"),
            "--markdown",
            str(folder / "r.md"),
            "--title",
            "A<B",
        ]
    )
    return Page((folder / "r.html").read_text())


def test_the_page_needs_nothing_else(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes)
    assert not page.all("link") and not any("src" in each for each in page.all("script"))
    assert not re.search(r"url\(|@import|https?:", "".join(page.text("style") + page.text("script")))


def test_every_run_has_a_row(page):
    assert len(page.all("tr")) == 1 + 9
    headers = [text for tag, text in page.texts if tag == "th"]
    assert headers[:5] == ["run", "method", "eval_accuracy", "heads", "parameters in the file"]
    names = [text for text in headers if text.startswith("runs/")]
    assert names[:3] == ["runs/dsp-8-2", "runs/dsp-8-1", "runs/dense"] and len(names) == 9
    assert {"4 of 24", "8 of 24", "0.982", "508", "<b>&", "dense"} <= set(page.text("td"))
    assert page.text("code").count("num_of_heads=8") == 4
    assert "head_pruning 0.1.0" in page.text("li") and "transformers 5.23" in page.text("li")
    assert page.text("strong") == ["0.95"] and page.text("h1") == ["A<B"]


def test_who_does_not_see_it_can_read_it(page):
    assert page.all("html") == [{"lang": "en"}]
    pictures = page.all("img")
    assert len(pictures) == 3 and page.text("h3") == [
        "eval_accuracy over heads kept", "eval_accuracy over parameters that are not zero",
        "Heads that are kept, by site",
    ]  # fmt: skip
    assert pictures[0]["alt"] == (
        "eval_accuracy over heads kept, 4 points of 2 methods. "
        "Not beaten in both: 0.9415 at 4 (dsp); 0.9815 at 8 (dsp)."
    )
    assert "with 4 of 24 heads" in pictures[2]["alt"] and "8/24" in "".join(page.text("pre"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
    assert all("scope" in each for each in page.all("th")) and page.all("a")[0]["href"] == "#main"
    # What scrolls can be reached by keys.
    (region,) = [each for each in page.all("div") if each.get("class") == "scroll"]
    assert region["tabindex"] == "0" and region["role"] == "region"


def test_its_pictures_are_whole(page):
    for picture in page.all("img"):
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert xml.etree.ElementTree.fromstring(b64decode(data)).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_as_markdown(page, place):
    text = (place.parent / "r.md").read_text()
    assert text.count("\n| runs/") == 9 and "| runs/dense | dense | 0.95 |" in text
    for name in re.findall(r"\]\((r-figures/[\w-]+)\.png\)", text):
        assert (place.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert xml.etree.ElementTree.parse(place.parent / f"{name}.svg") is not None
    assert text.count("](r-figures/") == 3


def test_a_front_and_what_seeds_spread(place):
    runs = find_runs([place])
    points = points_of(runs, "heads")
    assert sorted((p.curve, p.where, len(p.runs), round(p.high - p.low, 6)) for p in points) == [
        ("<b>&", 4, 2, 0.001), ("<b>&", 8, 2, 0.001), ("dsp", 4, 2, 0.001), ("dsp", 8, 2, 0.001),
    ]  # fmt: skip
    assert [(p.curve, p.where) for p in pareto(points)] == [("dsp", 4), ("dsp", 8)]
    assert [(p.curve, p.where) for p in pareto(points, lower=True)] == [("<b>&", 4)]


@pytest.mark.parametrize("names", [("mnli-1", "sst2-1"), ("a", "b")])
def test_runs_that_are_no_seeds_of_one_are_points_of_their_own(tmp_path, names):
    for name, score in zip(names, (0.6, 0.8)):
        write_run(tmp_path / name, "dsp", 4, score)
    assert [point.score for point in points_of(find_runs([tmp_path]), "heads")] == [0.6, 0.8]


def test_nor_are_runs_of_other_models(tmp_path):
    for number, score in enumerate((0.6, 0.8)):
        write_run(tmp_path / f"run{number}", "dsp", 4, score)
    path = tmp_path / "run1" / "pruning.json"
    path.write_text(path.read_text().replace('"heads_total": 24', '"heads_total": 36'))
    assert [point.score for point in points_of(find_runs([tmp_path]), "heads")] == [0.6, 0.8]


def test_only_what_is_known_to_be_whole_is_without_pruning(tmp_path):
    cells = tmp_path / "cells"
    cells.mkdir()
    for method, numbers in {"full": {}, "own": {}, "dense": {}, "dsp": {"heads_kept": 24, "heads_total": 24}}.items():
        cell = {
            "name": method, "values": {"method": method}, "commands": ["x"], "folder": method, "score_name": "score",
            "seconds": 1, "numbers": {"score": 1.0, **numbers},
        }  # fmt: skip
        (cells / f"{method}.json").write_text(json.dumps(cell))
    assert {run.name for run in find_runs([tmp_path]) if run.dense} == {"dense", "dsp"}


def test_the_parameters_of_a_compact_checkpoint_of_fairseq(tmp_path):
    write_run(tmp_path / "run", "dsp", 4, 0.5)
    (tmp_path / "run" / "checkpoint_last.pt").write_bytes(b"12345")
    assert find_runs([tmp_path])[0].numbers["parameters"] == 1000
    path = tmp_path / "run" / "pruning.json"
    path.write_text(
        path.read_text().replace('"nonzero_parameters"', '"compact_parameters": 700, "nonzero_parameters"')
    )
    assert find_runs([tmp_path])[0].numbers["parameters"] == 700


def test_the_cells_of_a_sweep(tmp_path):
    """Their commands and values; models that they left beside their own; folders that are gone."""
    sweep = tmp_path / "sweep"
    for seed in (1, 2):
        name = f"dsp-seed{seed}"
        write_run(sweep / "runs" / name, "dsp", 4, 0.5 + seed / 100)
        write_run(sweep / "runs" / name / "sizes" / "heads2", "dsp", 2, 0.3 + seed / 100)
        cell = {
            "name": name, "values": {"method": "DSP, mine", "seed": seed, "task": "CoLA"},
            "commands": ["a 'b c'", "d"],
            "folder": f"runs/{name}", "score_name": "eval_accuracy", "seconds": 3,
            "numbers": {"score": 0.5 + seed / 100, "heads_kept": 4, "heads_total": 24, "latency_ms": 7.5},
        }  # fmt: skip
        (sweep / "cells").mkdir(exist_ok=True)
        (sweep / "cells" / f"{name}.json").write_text(json.dumps(cell))
    shutil.rmtree(sweep / "runs" / "dsp-seed2")
    runs = {run.name: run for run in find_runs([sweep, sweep / "runs"])}  # each folder once
    assert list(runs) == ["dsp-seed1", "dsp-seed1/sizes/heads2", "dsp-seed2"]
    assert runs["dsp-seed1/sizes/heads2"].numbers["heads_kept"] == 2 and not runs["dsp-seed2"].kept
    assert {run.method for run in runs.values()} == {"DSP, mine"}
    write_page(list(runs.values()), tmp_path / "r.html", "t")
    page = Page((tmp_path / "r.html").read_text())
    assert page.text("h2")[0] == "CoLA eval_accuracy" and "a 'b c'\nd" in page.text("code")
    assert [text for tag, text in page.texts if tag == "th"][2:5] == ["seed", "eval_accuracy", "heads"]
    assert page.text("h3")[0] == "eval_accuracy over heads kept" and len(page.text("h3")) == 3


def test_runs_of_several_tasks_and_scores_stay_apart(tmp_path):
    numbers = [{"score": 1.0, "heads_kept": 2}, {"score": 2.0, "heads_kept": 3}, {"heads_kept": 3}]
    runs = [
        Run("a", tmp_path, "x", numbers[0], "eval_loss"),
        Run("b", tmp_path, "x", numbers[1], "eval_loss"),
        Run("c", tmp_path, "x", numbers[0], "eval_accuracy"),
        Run("d", tmp_path, "x", numbers[2]),
    ]
    sections = build_sections(runs, tmp_path)
    assert [(part.title, [run.name for run in part.runs]) for part in sections] == [
        ("eval_accuracy", ["c"]), ("eval_loss", ["a", "b"]), ("without a score", ["d"]),
    ]  # fmt: skip
    assert len(sections[1].figures) == 1 and not sections[2].figures


def test_masks_of_heads_and_of_units_stand_in_one_picture(tmp_path):
    """So that they can be compared; what has no place beside them is named."""
    blocks = tuple(FeedForwardSite(f"ffn{i}", f"{i}", 3, f"{i}.in", f"{i}.out") for i in range(6))
    heads, foreign = UnitMap(SITES.attention, blocks), UnitMap(SITES.attention[:1])
    runs = []
    for name, sites in (("heads", heads), ("both", heads.numbering("both")), ("other", foreign)):
        (tmp_path / name).mkdir()
        HeadMask(sites, np.arange(sites.num_heads) < 4).save(tmp_path / name / "masks.safetensors")
        runs.append(Run(name, tmp_path / name, "dsp", {"heads_kept": 4}, kept={"layer0": [0]}))
    (figure,) = build_sections(runs, tmp_path)[0].figures
    assert "both with 4 of 24 heads and 0 of 18 units" in figure.text
    assert "heads with 4 of 24 heads and 18 of 18 units" in figure.text
    assert figure.text.endswith("Left out, as other models' masks: other.")


def test_folders_without_a_run(tmp_path):
    with pytest.raises(HeadPruningError, match="There is no folder .*nowhere; give"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(HeadPruningError, match="holds no all_results.json, pruning.json or finished cells"):
        find_runs([tmp_path])
    (tmp_path / "pruning.json").write_text('{"method": 3}')
    with pytest.raises(HeadPruningError, match="pruning.json is damaged"):
        find_runs([tmp_path])


HOSTILE = ["_a", "$x^{$", "a|b`c``", "<script>alert(1)</script>", "two\nlines", "![x](y)"]


def test_hostile_names_are_shown_as_they_are(tmp_path):
    runs = [
        Run(name, tmp_path, name, {"score": i, "heads_kept": i}, "eval_$s{$", {"no|te": name}, [f"a `{name}` | b"])
        for i, name in enumerate(HOSTILE)
    ]
    write_page(runs, tmp_path / "r.html", "<b>$t$", tmp_path / "my r.md")
    page = Page((tmp_path / "r.html").read_text())
    assert len(page.all("script")) == 1 and not page.all("b") and "<script>alert(1)</script>" in page.text("th")
    svg = (tmp_path / "my r-figures" / "1-heads.svg").read_text()
    assert "_a, no|te _a -->" in svg and "$x^{$" in svg
    text = (tmp_path / "my r.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(HOSTILE)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
    assert r"\<script\>" in text and "](my%20r-figures/" in text
    assert "````a `a\\|b`c``` \\| b````" in text and r"!\[x\](y)" in text


def test_a_page_is_not_written_over_by_its_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HeadPruningError, match="sub/../page is to be both HTML and Markdown; name two files"):
        write_page([], tmp_path / "page", "t", "sub/../page")
    assert not list(tmp_path.iterdir())


def test_the_parameters_of_a_model_are_counted_once(tmp_path):
    """Without those of a compressed copy, of other precisions, or of shards that an earlier model left beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "all_results.json").write_text('{"eval_loss": 1.0}')
    files = {"model.compressed": 1, "model.fp16": 5, "model.bf16-00001-of-00001": 11,
             "model-00001-of-00002": 20, "model-00002-of-00002": 30, "model": 70}  # fmt: skip
    for (name, size), counted in zip(files.items(), (None, 5, 11, 20, 50, 70)):
        save_file({"a": torch.zeros(size)}, folder / f"{name}.safetensors")
        (run,) = find_runs([folder])
        assert run.numbers.get("parameters") == counted, name


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch):
    odd = os.fsdecode(b"caf\xe9")
    for place in (tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / odd):
        place.mkdir(parents=True)
        (place / "all_results.json").write_text('{"eval_accuracy": 0.5, "eval_f1": 0.3}')
    monkeypatch.chdir(tmp_path / "a")
    runs = find_runs(["../a/out", "../b/out", f"../{odd}"])
    assert [run.name for run in runs] == ["../a/out", "../b/out", "caf?"]
    assert [run.name for run in find_runs(["."])] == ["a/out"]
    write_page(runs, tmp_path / "r.html", "t")


def test_the_score_that_is_asked_for(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "all_results.json").write_text('{"eval_accuracy": 0.5, "eval_f1": 0.3}')
    cell = {"name": "x", "values": {}, "commands": [], "folder": "runs/x", "score_name": "eval_accuracy",
            "numbers": {"score": 0.5}, "seconds": 1}  # fmt: skip
    (tmp_path / "cells" / "x.json").write_text(json.dumps(cell))
    for score, found in ((None, ("eval_accuracy", 0.5)), ("eval_f1", ("eval_f1", 0.3))):
        assert [(run.score_name, run.score) for run in find_runs([tmp_path], score)] == [found]
    with pytest.raises(HeadPruningError, match="No run has a finite eval_f2 in its all_results.json; name another"):
        find_runs([tmp_path], "eval_f2")


def many_runs(folder: Path, count: int) -> list[Run]:
    return [
        Run(f"run{i}", folder, f"method {i % 12}", {"score": i / count, "heads_kept": i % 140, "latency_ms": 1 + i},
            "eval_accuracy", {"seed": i % 5, "heads": i % 140}, [f"python train.py --seed {i}"])
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_a_thousand_rows_without_overflow(tmp_path, width):
    names = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome", "msedge")
    browser = os.environ.get("HEAD_PRUNING_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine, and HEAD_PRUNING_CHROMIUM names none")
    write_page(many_runs(tmp_path, 1000), tmp_path / "r.html", "t")
    probe = (
        "<script>const begin = performance.now(); [...document.querySelectorAll('thead button')]"
        ".find(each => each.textContent === 'eval_accuracy').click();"
        "document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth,"
        "document.querySelectorAll('tbody tr').length, document.querySelector('[aria-sort]').ariaSort,"
        "document.querySelector('tbody th').textContent, performance.now() - begin])</script></body>"
    )
    text = (tmp_path / "r.html").read_text().replace("</body>", probe)
    (tmp_path / "probed.html").write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    url = (tmp_path / "probed.html").as_uri()
    shown = subprocess.run(
        [browser, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )
    title = html.unescape(re.search("<title>(.*?)</title>", shown.stdout)[1])
    wide, inner, rows, order, first, milliseconds = json.loads(title)
    assert wide <= inner and rows == 1000 and order == "ascending" and first == "run0" and milliseconds < 5000
    picture = tmp_path / "shot.png"
    subprocess.run([browser, *flags, f"--screenshot={picture}", url], timeout=120, check=True, capture_output=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
