"""The errors a user can cause: one sentence, naming the cause and the cure."""


class HeadPruningError(ValueError):
    """Bad input. The message is one sentence that names the cause and the cure."""


class UnfiredSiteError(HeadPruningError):
    """A targeted site never ran, so its gate would silently do nothing."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, for a sentence of ours: on one line, never empty."""
    return " ".join(str(error).split()) or repr(error)
