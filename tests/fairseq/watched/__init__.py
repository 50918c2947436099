"""A user-dir for the tests: the translation task of the plugin, writing down what the gates do at every update."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from fairseq.tasks import register_task

from fairseq_plugin.task import TranslationHeadPruningConfig, TranslationHeadPruningTask


@register_task("translation_watched", dataclass=TranslationHeadPruningConfig)
class WatchedTask(TranslationHeadPruningTask):
    """Writes ``RANK-UPDATE.npz`` into the folder that the environment names."""

    def optimizer_step(self, optimizer, model, update_num):
        session = self.session
        record = {
            "gates": session.gates.training_values.numpy().copy(),
            "gradients": session.gates.gradients.numpy() / self._loss_scale,
            "logits": learnt(session.pruners[0]),
            "tokens": float(self._denominator),
            "micro_batches": self._micro_batches,
            "products": self.products(model),
        }
        super().optimizer_step(optimizer, model, update_num)
        adam = getattr(session.pruners[0], "adam", None)
        record.update(
            after=learnt(session.pruners[0]), first_moment=np.zeros(0) if adam is None else adam.first.copy()
        )
        folder = Path(os.environ["WATCHED_FOLDER"])
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        np.savez(folder / f"{rank}-{update_num}.npz", **record)

    def products(self, model) -> np.ndarray:
        """For each head, its output columns times their gradient: what the gate times its gradient must be."""
        modules = dict(model.named_modules())
        values = []
        for site in self.session.unit_map.attention:
            weight = next(module for name, module in modules.items() if name.endswith(site.out_proj)).weight
            product = torch.zeros_like(weight) if weight.grad is None else weight.detach() * weight.grad
            values.append(product.unflatten(1, (site.heads, site.head_dim)).sum((0, 2)).numpy())
        return np.concatenate(values)


def learnt(pruner) -> np.ndarray:
    """The gate logits, or the sensitivities."""
    return (pruner.logits if hasattr(pruner, "logits") else pruner.scores).copy()
