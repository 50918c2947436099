"""What scripts that run fairseq's commands share."""

import re

from head_pruning import HeadPruningError


def bleu_of(output: str) -> float:
    """The BLEU that fairseq-generate printed last. Raises HeadPruningError when it printed none."""
    found = re.findall(r"BLEU4? = ([\d.]+)", output)
    if not found:
        raise HeadPruningError("fairseq-generate printed no BLEU; its test set has no references.")
    return float(found[-1])
