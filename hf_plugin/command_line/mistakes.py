"""What the scripts share: a mistake ends with one sentence."""

import re
import sys
from typing import Callable

from head_pruning import HeadPruningError
from head_pruning.options import dashed, underscored
from head_pruning.registry import option_fields


def main(run: Callable[[], None]) -> None:
    """Call ``run``; what a user can mend is printed as ``error: sentence`` and ends the process with status 1.

    That is a HeadPruningError, or an OSError such as a full disk. Status 130: interrupted.
    """
    try:
        run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if not error.strerror:
            raise
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}.")
    except HeadPruningError as error:
        sys.exit(f"error: {with_underscores(str(error))}")


def with_underscores(sentence: str) -> str:
    """The pruners' options in ``sentence`` as these scripts spell them: ``--num_of_heads``, not ``--num-of-heads``."""
    return _spelt(sentence, underscored)


def as_arguments(sentence: str) -> str:
    """The pruners' options in ``sentence`` as a call in Python has them: ``num_of_heads``."""
    return _spelt(sentence, str)


def _spelt(sentence: str, spelling: Callable[[str], str]) -> str:
    ours = {dashed(name): spelling(name) for name in option_fields()}
    return re.sub(r"(?<![\w-])--[\w-]+", lambda found: ours.get(found[0], found[0]), sentence)
