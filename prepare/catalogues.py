"""Reading German-English pairs out of the translation catalogues in a wheel, without unpacking or installing it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import read_mo
from babel.messages.pofile import read_po

from prepare.files import PrepareError

Pair = tuple[str, str]
"""A German string and the English one it translates."""

_GETTEXT = re.compile(r"(.*/de(?:_DE)?/LC_MESSAGES/[^/]+)\.(po|mo)")
_JSON = re.compile(r"(.*/translations/)de\.json")


def pairs(wheel: Path) -> list[Pair]:
    """Every German-English pair in ``wheel``, in the order of the names of its catalogues, duplicates kept.

    Catalogues are gettext's (``de/LC_MESSAGES/*.po``, or ``*.mo`` where there is no ``.po`` beside it; English is the
    message id; fuzzy, obsolete and untranslated entries are left out) and nested JSON (``translations/de.json`` with
    ``translations/en.json`` beside it). PrepareError when the wheel or a catalogue is unreadable.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return list(_walk(archive))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise PrepareError(f"Could not read the translations in {wheel}: {error}.") from error


def _walk(archive: zipfile.ZipFile) -> Iterator[Pair]:
    names = set(archive.namelist())
    for name in sorted(names):
        if match := _GETTEXT.fullmatch(name):
            # A .mo file is compiled from the .po file beside it and says no more.
            if match[2] == "po" or f"{match[1]}.po" not in names:
                read: Callable[..., Catalog] = read_po if match[2] == "po" else read_mo
                yield from _gettext(read(io.BytesIO(archive.read(name))))
        elif (match := _JSON.fullmatch(name)) and f"{match[1]}en.json" in names:
            yield from _nested(json.loads(archive.read(name)), json.loads(archive.read(f"{match[1]}en.json")))


def _gettext(catalogue: Catalog) -> Iterator[Pair]:
    for message in catalogue:
        if not message.id or message.fuzzy:
            continue
        english = message.id if isinstance(message.id, (tuple, list)) else (message.id,)
        german = message.string if isinstance(message.string, (tuple, list)) else (message.string,)
        yield from ((de, en) for de, en in zip(german, english) if de)


def _nested(german: object, english: object) -> Iterator[Pair]:
    if isinstance(german, dict) and isinstance(english, dict):
        for key, value in german.items():
            yield from _nested(value, english.get(key))
    elif isinstance(german, str) and isinstance(english, str):
        yield german, english
