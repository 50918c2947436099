"""The text inside IWSLT's TED files: tagged training text and dev/test XML."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Dropped wherever they stand in a line, as the original pipeline does.
_DROPPED = ("<url>", "<talkid>", "<keywords>")
# Other years' files have these as well; the 2014 files do not, so the result there is the same.
_DROPPED_AT_START = re.compile(r"\s*</?(speaker|reviewer|translator|doc)\b")
_UNWRAPPED = re.compile(r"</?(?:title|description)>")
_SEGMENT_START = re.compile(r'<seg id="[0-9]*">\s*')
_SEGMENT_END = re.compile(r"\s*</seg>\s*")


def training_text(lines: Iterable[str]) -> list[str]:
    """The text lines of a ``train.tags`` file.

    Lines of meta data are left out; titles and descriptions stay, without their tags. Inner and
    outer spaces are kept. Apply it to both languages: line i of one pairs with line i of the other.
    """
    return [
        _UNWRAPPED.sub("", line)
        for line in lines
        if not any(tag in line for tag in _DROPPED) and not _DROPPED_AT_START.match(line)
    ]


def segment_text(lines: Iterable[str]) -> list[str]:
    """The text of each line of a dev/test XML file that holds a ``<seg id=...>``, in order.

    The segment tags and the white space beside them go, a right single quotation mark becomes
    an apostrophe. Entities (``&amp;``) are left as they are, as the original pipeline does.
    """
    return [
        _SEGMENT_END.sub("", _SEGMENT_START.sub("", line)).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        for line in lines
        if "<seg id" in line
    ]


def split_valid(lines: list[str], every: int = 23) -> tuple[list[str], list[str]]:
    """``(train, valid)``: lines ``every``, 2*``every``, ... (counted from 1) are valid, the rest train."""
    valid = lines[every - 1 :: every]
    train = [line for number, line in enumerate(lines, 1) if number % every]
    return train, valid
