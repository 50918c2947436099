"""The pages of docs/ say what is so: links, lists and tables against the code."""

import importlib
import re
import subprocess

import pytest

from head_pruning import choose_methods, methods
from tests.documents import (
    METHODS,
    PAGES,
    ROOT,
    anchors,
    groups_of,
    kinds,
    links,
    option_groups,
    prose,
    read,
    registered,
    table,
    with_option_tables,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_file() and path.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(path), link


def test_every_page_is_linked_from_the_readme_and_in_the_navigation():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    linked = {link.removeprefix("docs/") for link in links(ROOT / "README.md") if link.startswith("docs/")}
    assert linked == pages
    shown = set(re.findall(r": ([\w-]+\.md)$", read(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert shown == pages | {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    packages = "head_pruning|hf_plugin|fairseq_plugin|prepare|benchmarks|examples|tests|requirements|docs"
    for path in re.findall(rf"`((?:{packages})/[\w/.-]*)`", prose(page)):
        if not re.search(r"[A-Z]{4}", path):  # METHOD.py: any
            assert (ROOT / path).exists() or (ROOT / path.replace(".*", ".md")).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_that_is_shown_exists(page):
    pytest.importorskip("transformers")
    # Entries of a checkpoint of fairseq, which look alike.
    entries = {"head_pruning.keep", "head_pruning.meta.version1", "head_pruning.removed.version1"}
    for name in set(re.findall(r"`(?:with )?((?:head_pruning|hf_plugin)(?:\.\w+)+)[(`]", prose(page))) - entries:
        parts, here = name.split("."), None
        for count in range(len(parts), 0, -1):
            try:
                here = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            break
        for part in parts[count:]:
            here = getattr(here, part)  # an AttributeError names what is not there


def test_the_families_are_those_of_the_tests():
    pytest.importorskip("transformers")
    from tests.hf.families import covered

    page = read(ROOT / "docs" / "models.md")
    listed = page.partition("`python -m tests.hf.families`")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert listed.replace("\n", " ").rstrip(".").split(", ") == covered()


def test_every_method_is_listed_with_its_file():
    rows = {row["method"].strip("`"): row for row in table(read(METHODS), "method")}
    assert set(rows) == set(registered())
    for name, method in registered().items():
        path = method.pruner.__module__.replace(".", "/") + ".py"
        assert rows[name]["prunes"] == kinds()[name]
        assert rows[name]["file"] == f"[{path}](../{path})" and (ROOT / path).is_file()
        assert rows[name]["what it does"].replace("\\*", "*") == method.pruner.__doc__.strip().splitlines()[0]


def test_every_method_has_all_its_options_and_no_others():
    rows = {row["method"].strip("`"): row for row in table(read(METHODS), "method")}
    shown = {}
    for section in re.split(r"^### ", read(METHODS), flags=re.MULTILINE)[1:]:
        shown[section.partition("\n")[0]] = [row["option"].strip("`") for row in table(section, "option")]
    assert set(shown) == {*option_groups(), "Michel"}
    for name, method in registered().items():
        groups = re.findall(r"\[(\w+)\]", rows[name]["options"])
        assert groups == groups_of(method)
        options = [option for group in groups for option in shown[group]]
        assert sorted(options) == sorted(
            f"--{field.replace('_', '-')}" for field in method.config.__dataclass_fields__
        )


def test_the_options_are_written_from_the_registry():
    assert read(METHODS) == with_option_tables(read(METHODS)), "run python -m tests.documents"


def test_the_method_that_a_number_of_heads_alone_means():
    (method,) = choose_methods({"num_of_heads": 4})
    assert f"`--num-of-heads` alone means {method.name}," in prose(METHODS)
    others = "|".join({*methods("heads")} - {method.name})
    count = "(?:num[-_]of[-_]heads(?: K)?`(?: alone)?|number of heads alone,?)"
    says = rf"{count}(?: means| is| the method is)? (?:{others})\b"
    for page in PAGES:
        assert not re.search(says, re.sub(r"\s+", " ", prose(page)), re.IGNORECASE), page.name


@pytest.mark.slow
def test_the_site_builds():
    """In an environment of its own, which the first call sets up."""
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (ROOT / "site" / "api" / "hf_plugin.html").read_text(encoding="utf-8")
    assert "HeadPruningTrainer" in page and "transformers' Trainer with a pruning session" in page
    assert (ROOT / "site" / "source" / "benchmarks" / "results" / "translation.png").is_file()
