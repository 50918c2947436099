"""What scripts that run fairseq's commands share."""

import re

from head_pruning import HeadPruningError

# glibc gives large buffers back to the system after each use and faults them in anew; let it keep them.
# Waiting threads that spin slow other processes down.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "40000000000",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def bleu_of(output: str) -> float:
    """The BLEU that fairseq-generate printed last. Raises HeadPruningError when it printed none."""
    found = re.findall(r"BLEU4? = ([\d.]+)", output)
    if not found:
        raise HeadPruningError("fairseq-generate printed no BLEU; its test set has no references.")
    return float(found[-1])
