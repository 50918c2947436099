"""What the plugin for fairseq reads."""

import gzip
import random
from pathlib import Path
from typing import Any, Callable, Iterator

from fairseq import options

import tests.fairseq.before_rooms
from fairseq_plugin.checkpoints.stored import PruningState, load_checkpoint, split_state
from fairseq_plugin.options import build_pruners
from tests.fairseq.runner import PLUGIN

from .damage import damaged_bytes

OLD = Path(tests.fairseq.before_rooms.__file__).parent
Readings = Iterator[Callable[[], Any]]
WORDS = """
--num-of-heads 4 99 --pruning-lr 0.2 --joint-pruning --annealing --initial-temperature 0.1 --cooldown-steps 6 --use-ste
--l0-penalty 5 --pruner dsp voita --weight-pruner platon --final-threshold 0.1 2 --pruner-warmup-steps --mask-policy
nested --weight-selection 2:4 64:1x1 [ --weights-include ( --head-mask-file . --min-heads-per-layer nan inf 1e400 -1
--distiller --teacher-path x [[ --reset-optimizer
""".split()
WORDS += ["", "--", "-x", "--=", "x" * 5000, "--num-of-heads=", "{}"]


def flags(folder: Path, rng: random.Random) -> Readings:
    """Command lines of fairseq-train, up to the pruners that they ask for."""
    train = [str(folder), "--user-dir", str(PLUGIN), "--task", "translation_head_pruning", "--arch", "transformer"]

    def read(words: list[str]) -> None:
        for pruner in build_pruners(options.parse_args_and_arch(options.get_training_parser(), input_args=words)):
            pruner.check_options()

    while True:
        words = [*train, *rng.choices(WORDS, k=rng.randrange(7))]  # without an architecture fairseq fails by itself
        yield lambda words=words: read(words)


def checkpoints(folder: Path, rng: random.Random) -> Readings:
    """Files of checkpoints: of heads, of weights, of both, compact."""
    file = folder / "checkpoint.pt"
    whole = [gzip.decompress(path.read_bytes()) for path in sorted(OLD.glob("*.pt.gz"))]

    def read() -> None:
        checkpoint = load_checkpoint(file)
        state = PruningState.of(checkpoint)
        state.weight_masks(split_state(checkpoint["model"])[0])
        if state.heads:
            state.description(), state.head_mask(), state.of_session()

    while True:
        file.write_bytes(damaged_bytes(rng, rng.choice(whole)) if rng.random() < 0.95 else rng.choice(whole))
        yield read


FAIRSEQ: dict[str, Any] = {"flags of fairseq": flags, "checkpoints of fairseq": checkpoints}
