"""fairseq's commands in this process, for tests that look inside, and for those that are many."""

from argparse import Namespace

import fairseq_cli.generate
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from tests.fairseq.runner import PLUGIN


def in_process(line: list):
    """The trainer and the first epoch's iterator of a fairseq-train command line."""
    utils.import_user_module(Namespace(user_dir=PLUGIN))
    arguments = options.parse_args_and_arch(options.get_training_parser(), input_args=[str(word) for word in line])
    cfg = convert_namespace_to_omegaconf(arguments)
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    return trainer, trainer.get_train_iterator(1, load_dataset=True)


def generated(line: list, capsys) -> str:
    """What fairseq-generate prints; an error is raised."""
    utils.import_user_module(Namespace(user_dir=PLUGIN))
    capsys.readouterr()
    parser = options.get_generation_parser()
    fairseq_cli.generate.main(options.parse_args_and_arch(parser, input_args=[str(word) for word in line]))
    return capsys.readouterr().out
