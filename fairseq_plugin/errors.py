"""A user's mistake ends fairseq's commands with one sentence, not with a traceback."""

import sys
from typing import Optional

from head_pruning import HeadPruningError


def sentence_of(error: Optional[BaseException]) -> Optional[str]:
    """The sentence of the first HeadPruningError in the chain of causes (fairseq wraps errors of loading)."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, HeadPruningError):
            return str(error)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def install() -> None:
    """Print HeadPruningErrors as one line; the exit status stays non-zero."""
    previous = sys.excepthook
    if getattr(previous, "prints_sentences", False):
        return

    def hook(kind, error, traceback):
        sentence = sentence_of(error)
        if sentence is None:
            previous(kind, error, traceback)
        else:
            print(f"error: {sentence}", file=sys.stderr)

    hook.prints_sentences = True
    sys.excepthook = hook
