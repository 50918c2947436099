"""What the site has beside the pages of docs/: the README as its home, the files that pages link to, the API.

mkdocs calls the functions (``hooks`` in mkdocs.yml); mkdocstrings uses :class:`Roles`. A link of a page to a file
outside of docs/, such as ``../benchmarks/results/inference.md``, works on GitHub as it stands; here the file becomes a
page below ``source/`` and the link leads there. A link to what does not exist ends the build.
"""

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Iterator

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME, PAGES, SOURCE, API = "README.md", "docs", "source", "api"
# What users import, by package; of the folders in them each becomes a page of its own.
PACKAGES = ("head_pruning", "hf_plugin", "fairseq_plugin")
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".sh": "sh", ".txt": "text", ".yml": "yaml", ".json": "json", "": "text"}

_FENCED = re.compile(r"^(`{3,})[^\n]*\n.*?^\1\s*?$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)(\))")


def _links(text: str) -> Iterator[str]:
    """The targets of a page's links, but for those in blocks of code."""
    for match in _LINK.finditer(_FENCED.sub("", text)):
        yield match.group(2)


def _repository_path(origin: str, link: str) -> "str | None":
    """The file that a link in ``origin`` leads to, both relative to the repository; None for other links."""
    target = link.partition("#")[0]
    if not target or re.match(r"[a-z]+:", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _page_of(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path == HOME:
        return "index.md"
    if path.startswith(f"{PAGES}/"):
        return path.removeprefix(f"{PAGES}/")
    suffix = PurePosixPath(path).suffix
    return f"{SOURCE}/{path}" if suffix == ".md" or suffix in PICTURES else f"{SOURCE}/{path}.md"


def _origin_of(page: str) -> "str | None":
    """The inverse of :func:`_page_of` for pages written in Markdown."""
    if page == "index.md":
        return HOME
    if page.startswith(f"{SOURCE}/"):
        return page.removeprefix(f"{SOURCE}/")
    return None if page.startswith(f"{API}/") else f"{PAGES}/{page}"


def _linked_files(files: Files) -> set[str]:
    """The files outside of docs/ that pages link to, and those that linked Markdown links to in turn."""
    queue = [HOME, "CONTRIBUTING.md", *(f"{PAGES}/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(queue)
    while queue:
        path = queue.pop()
        if not path.endswith(".md"):
            continue
        for link in _links((ROOT / path).read_text(encoding="utf-8")):
            target = _repository_path(path, link)
            if target is None or target in seen:
                continue
            if target.startswith("..") or not (ROOT / target).is_file():
                raise PluginError(f"{path} links to {link}, and there is no file {target}.")
            seen.add(target)
            queue.append(target)
    return {path for path in seen if path != HOME and not path.startswith(f"{PAGES}/")}


def _listing(path: str) -> str:
    """A page that shows a file."""
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text(encoding='utf-8')}````\n"


def _api_pages() -> Iterator[tuple[str, str, str]]:
    """Title, place and text of each page of the API reference: what a package exports, then its modules by folder."""
    for package in PACKAGES:
        title = f"What `{package}` exports" if package != "fairseq_plugin" else "What the user-dir exports"
        yield package, f"{API}/{package}.md", f"# {title}\n\n" + _directive(package, members=True)
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            dotted = ".".join(folder.relative_to(ROOT).parts)
            modules = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
            if modules:
                text = "".join(_directive(f"{dotted}.{module}") for module in modules)
                yield f"{dotted}.*", f"{API}/{dotted}.modules.md", f"# Modules of `{dotted}`\n\n{text}"


def _directive(dotted: str, *, members: bool = False) -> str:
    options = "    options:\n      show_root_heading: false\n      show_submodules: false\n" if members else ""
    return f"::: {dotted}\n{options}\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the API reference to the navigation."""
    config.nav.append({"API reference": [{title: place} for title, place, _ in _api_pages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/."""
    linked = _linked_files(files)
    files.append(File.generated(config, "index.md", content=(ROOT / HOME).read_text(encoding="utf-8")))
    for path in sorted(linked):
        place, source = _page_of(path), ROOT / path
        if source.suffix in PICTURES:
            files.append(File.generated(config, place, abs_src_path=str(source)))
            continue
        text = source.read_text(encoding="utf-8") if source.suffix == ".md" else _listing(path)
        files.append(File.generated(config, place, content=text))
    for _, place, text in _api_pages():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where the files are in the site."""
    here = page.file.src_uri
    origin = _origin_of(here)
    if origin is None or not origin.endswith(".md"):
        return markdown

    def lead(match: re.Match) -> str:
        before, link, after = match.groups()
        target = _repository_path(origin, link)
        if target is None:
            return match.group(0)
        _, mark, anchor = link.partition("#")
        place = posixpath.relpath(_page_of(target), posixpath.dirname(here) or ".")
        return f"{before}{place}{mark}{anchor}{after}"

    # Blocks of code stay as they are.
    parts, last = [], 0
    for block in _FENCED.finditer(markdown):
        parts += [_LINK.sub(lead, markdown[last : block.start()]), block.group(0)]
        last = block.end()
    return "".join([*parts, _LINK.sub(lead, markdown[last:])])


_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`(~?)([\w.]+)`")
_LITERAL = re.compile(r"``(.+?)``")


class Roles(griffe.Extension):
    """Shows the cross-references of docstrings, such as :func:`head_pruning.surgery.remove_heads`, as code."""

    def on_instance(self, *, obj: griffe.Object, **options: object) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(
                lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", obj.docstring.value
            )
            obj.docstring.value = _LITERAL.sub(r"`\1`", text)
