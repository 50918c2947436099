"""What the commands of this folder do with errors and interruptions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prepare.files import PrepareError


def run(
    name: str, prepare: Callable[[], Sequence[Path]], *, quiet: bool, errors: tuple[type[Exception], ...] = ()
) -> int:
    """Call ``prepare`` and name what it made; the exit status: 0, 1 after an error (one sentence on stderr), 130 if
    interrupted.

    ``name``: of the command, in front of every message. ``errors``: those beside PrepareError whose text is for users.
    """
    try:
        made = prepare()
    except (PrepareError, *errors) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{name}: error: {error.filename or 'A file'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    if not quiet:
        print(f"done: {', '.join(map(str, made))}", file=sys.stderr)
    return 0
