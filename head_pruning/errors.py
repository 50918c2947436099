"""The errors a user can cause: one sentence, naming the cause and the cure."""


class HeadPruningError(ValueError):
    """Bad input. The message is one sentence that names the cause and the cure."""


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
