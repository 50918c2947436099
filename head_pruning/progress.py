"""Progress bars, and plain lines in their place where nobody watches."""

import re
import sys
from typing import Any, TextIO

_SECONDS = 30.0  # from one line to the next
_MOVES = re.compile(r"\x1b\[\w|[\r\n]")


class _Lines:
    """A file for tqdm: what it draws over and over comes as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = _MOVES.sub("", text).strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def bar_options() -> dict[str, Any]:
    """What tqdm must be told: nothing on a terminal; in a file or a pipe, to write a line now and then."""
    if sys.stderr.isatty():
        return {}
    return {"file": _Lines(sys.stderr), "mininterval": _SECONDS, "ascii": True, "ncols": 100}
