"""How long training will be where epochs limit it: methods plan by it, and their plans end with training."""

import pytest

from tests.fairseq.conftest import write_corpus
from tests.fairseq.files import mask_beside
from tests.fairseq.runner import logged

DSP = "--num-of-heads 4 --joint-pruning --annealing --initial-temperature 0.1 --cooldown-steps 0.6"
EPOCHS = "--max-update 0 --save-interval-updates 0 --max-epoch"


@pytest.mark.parametrize("more", ["3 --update-freq 8,4,1", "2 --update-freq 3 --skip-remainder-batch"])
def test_updates_of_all_epochs_are_counted(runner, translation, tmp_path, more):
    """The temperature has its final value from that share of training on that was asked for."""
    ran = runner.run("train", translation.train(tmp_path / "run", DSP, EPOCHS, more, updates=0))
    heats = logged(ran.out, "temperature")
    falling = sum(heat > heats[-1] for heat in heats)
    assert len(heats) > 8 and falling == round(0.6 * len(heats))
    assert "training ended before" not in ran.out + ran.err


@pytest.fixture(scope="module")
def parts(data, tmp_path_factory):
    """The corpus, and another one: an epoch has either."""
    folder = tmp_path_factory.mktemp("second")
    return f"{data}:{write_corpus(folder)}"


def test_with_parts_of_the_data_epochs_do_not_tell_the_length(runner, translation, parts, tmp_path):
    line = translation.train(tmp_path / "run", DSP, EPOCHS, "2", updates=0)
    assert "--cooldown-steps 0.6 is a fraction of training" in runner.fail("train", [parts, *line[1:]])
    done = runner.run("train", [parts, *line[1:], "--cooldown-steps", "9"])
    assert "how many updates --max-epoch 2 makes is not known; add --max-update" in done.out + done.err
    assert mask_beside(tmp_path / "run" / "checkpoint_last.pt").kept == 4
