"""The scripts' log, in the style of transformers' examples."""

import logging
import sys
from typing import Optional

import datasets
import transformers


def no_bars() -> None:
    """Without the progress bars of transformers and datasets, which fill files with carriage returns."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def set_up(level: Optional[int] = None) -> None:
    """Send this package's, the core's and the Trainer's messages to standard error.

    Args:
        level: least level that is shown; default: INFO.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        stream=sys.stderr,
    )
    for name in ("hf_plugin", "head_pruning", "transformers.trainer"):
        logging.getLogger(name).setLevel(logging.INFO if level is None else level)
