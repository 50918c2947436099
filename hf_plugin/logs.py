"""The scripts' log, in the style of transformers' examples."""

import logging
import sys

import transformers


def set_up(level: int = logging.INFO) -> None:
    """Send this package's and the core's messages to standard error, beside transformers' own."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        stream=sys.stderr,
    )
    for name in ("hf_plugin", "head_pruning"):
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity(level)
