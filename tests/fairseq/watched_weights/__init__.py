"""A user-dir for the tests: the translation task of the plugin, writing down the weights after every update."""

import os
from pathlib import Path

import numpy as np
import torch.distributed
from fairseq.tasks import register_task

from fairseq_plugin.task import TranslationHeadPruningConfig, TranslationHeadPruningTask


@register_task("translation_watched_weights", dataclass=TranslationHeadPruningConfig)
class WatchedWeightsTask(TranslationHeadPruningTask):
    """Writes ``RANK-UPDATE.npz`` into the folder that the environment names."""

    def optimizer_step(self, optimizer, model, update_num):
        super().optimizer_step(optimizer, model, update_num)
        record = {name: value.numpy() for name, value in self.session.tensor_state().items()}
        record.update({name: value.detach().numpy() for name, value in self.session.model.named_parameters()})
        record.update({f"stays.{name}": mask.numpy() for name, mask in self.session.weight_masks().items()})
        heads = self.session.head_mask()
        record["stays.heads"] = np.zeros(0) if heads is None else heads.keep
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        np.savez(Path(os.environ["WATCHED_FOLDER"]) / f"{rank}-{update_num}.npz", **record)
