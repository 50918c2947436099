"""The errors a user can cause: one sentence, naming the cause and the cure."""

import re

# All that a terminal would obey, or str.splitlines would break a line at, but the line feed.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class HeadPruningError(ValueError):
    """Bad input. The message is one sentence that names the cause and the cure.

    What it quotes may come from a damaged or a hostile file: its control characters are shown, not sent to a terminal.
    """

    def __init__(self, message: str = ""):
        super().__init__(_CONTROL.sub(lambda found: ascii(found[0])[1:-1], message))


class UnfiredSiteError(HeadPruningError):
    """A targeted site never ran, so its gate would silently do nothing."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, for a sentence of ours: on one line, never empty, nor longer than a paragraph.

    What torch says of a file with code advises to run it; that is not passed on.
    """
    text = " ".join(str(error).split())
    if "weights_only" in text or "Weights only load failed" in text:
        return "it is damaged or holds code, of which nothing was run"
    if type(error) is KeyError:
        return f"there is no {text:.100}"
    return text[:600] or repr(error)
