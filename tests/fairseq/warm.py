"""Imported by a server of commands: the plugin, and one command line that was read, which is most of a short run.

A run finds that its --user-dir was imported before; one with another user-dir, or none, needs a server without this.
"""

from argparse import Namespace

from fairseq import options, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from tests.fairseq.runner import PLUGIN

utils.import_user_module(Namespace(user_dir=PLUGIN))
_LINE = ["data", "--user-dir", PLUGIN, "--task", "translation_head_pruning", "--arch", "transformer"]
convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), input_args=_LINE))
