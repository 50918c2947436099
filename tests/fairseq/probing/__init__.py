"""A user-dir for the tests: the translation task of the plugin with the probe, which writes down what it is asked."""

import json
import os
from pathlib import Path

from fairseq.tasks import register_task

from fairseq_plugin.task import TranslationHeadPruningConfig, TranslationHeadPruningTask
from tests.contract import Probe, watching


@register_task("translation_probing", dataclass=TranslationHeadPruningConfig)
class ProbingTask(TranslationHeadPruningTask):
    """Writes ``seen.json`` into the folder that the environment names."""

    def pruners(self):
        self.probe = Probe()
        self.watch = watching(self.probe)
        self.watch.__enter__()
        return [*super().pruners(), self.probe]

    def optimizer_step(self, optimizer, model, update_num):
        super().optimizer_step(optimizer, model, update_num)
        found = {"seen": self.probe.seen, "rates": self.probe.rates}
        if "PROBING_FOLDER" in os.environ:
            Path(os.environ["PROBING_FOLDER"], "seen.json").write_text(json.dumps(found), encoding="utf-8")
