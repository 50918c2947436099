"""The README and the pages of docs/, as tests read them: blocks of code, tables, links, headings.

``python -m tests.documents`` writes the options of all registered methods into docs/methods.md.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from head_pruning import methods

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- options: written by python -m tests.documents -->\n", "<!-- end of options -->\n"
# Of the registry's methods.
KINDS = ("heads", "weights", "distils", "quantizes")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0]}"


def read(path: Path) -> str:
    """A page's text."""
    return path.read_text(encoding="utf-8")


def blocks(language: str) -> list[Block]:
    """All fenced blocks of a language, page after page."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(path.relative_to(ROOT).as_posix(), found[1], found[2])
        for path in PAGES
        for found in fenced.finditer(read(path))
        if found[1] == language
    ]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```\w*\n.*?^```$", "", read(path), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Page and command line of every line of a shell block, continued lines joined, comments left out."""
    return [
        (block.page, line.partition(" #")[0].strip())
        for block in blocks("sh")
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def links(path: Path) -> Iterator[str]:
    """The targets of a page's links."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    for found in re.finditer(r"\]\(([^()\s]+)\)", text):
        yield found[1]


def anchors(path: Path) -> set[str]:
    """What ``page#anchor`` may name: the headings of a page, as GitHub spells them."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def table(text: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called ``first``, by column."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def registered() -> dict:
    """All registered methods by name."""
    return {name: method for kind in KINDS for name, method in methods(kind).items()}


def kinds() -> dict[str, str]:
    """What each registered method prunes, by its name."""
    return {name: kind for kind in KINDS for name in methods(kind)}


def option_groups() -> dict[str, tuple[str, list[dataclasses.Field]]]:
    """Each config class that adds options: name to the first line of its docstring and these options."""
    found: dict[str, tuple[str, list[dataclasses.Field]]] = {}
    for method in registered().values():
        for config in reversed(method.config.__mro__):
            if not dataclasses.is_dataclass(config):
                continue
            inherited = {
                field.name for base in config.__bases__ if dataclasses.is_dataclass(base)
                for field in dataclasses.fields(base)
            }  # fmt: skip
            own = [field for field in dataclasses.fields(config) if field.name not in inherited]
            if own:
                found[config.__name__] = (config.__doc__.strip().splitlines()[0], own)
    return found


def groups_of(method) -> list[str]:
    """The names of the option groups that a method has."""
    names = {config.__name__ for config in method.config.__mro__}
    return [name for name in option_groups() if name in names]


def option_tables() -> str:
    """The options of all methods in Markdown, a table for each group."""
    lines = []
    for name, (title, fields) in option_groups().items():
        lines += [f"### {name}", "", title, "", "| option | default | meaning |", "| --- | --- | --- |"]
        for field in fields:
            default = "" if field.default is None else f"`{field.default}`"
            meaning = field.metadata["help"].replace("|", "\\|")
            lines.append(f"| `--{field.name.replace('_', '-')}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def with_option_tables(text: str) -> str:
    """A page of methods with the options as they are registered now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{option_tables()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    METHODS.write_text(with_option_tables(read(METHODS)), encoding="utf-8")
    print(f"wrote the options of {len(registered())} methods into {METHODS.relative_to(ROOT)}")
