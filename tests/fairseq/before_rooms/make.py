"""How the files here were made: ``python -m tests.fairseq.before_rooms.make``, in a checkout of commit 8a9ef1a.

Each run stops halfway, which is its checkpoint here, and goes on to its end, of which the model is kept. Run it from
the root: checkpoints hold the paths of their command line.
"""

import gzip
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.fairseq.command_lines import decoded
from tests.fairseq.runner import Runner

HERE = Path(__file__).resolve().parent
HALF, END = 5, 10
SIZE = "".join(
    f"--{side}-layers 1 --{side}-embed-dim 8 --{side}-ffn-embed-dim 8 --{side}-attention-heads 2 "
    for side in ("encoder", "decoder")
).split()
_HEADS = "--num-of-heads 3 --joint-pruning --pruning-lr 0.2"
_WEIGHTS = "--initial-threshold 1 --pruner-warmup-steps 2 --initial-warmup 1 --final-warmup 1"
OPTIONS = {
    "dsp": f"{_HEADS} --annealing --initial-temperature 0.1 --cooldown-steps 8",
    "platon": f"{_WEIGHTS} --weight-pruner platon --final-threshold 0.2 --deltaT 2",
    "both": f"{_HEADS} --use-ste {_WEIGHTS} --weight-pruner movement --final-threshold 0.4",
}


def corpus(runner: Runner, folder: Path) -> Path:
    """24 sentences to train on and 4 to test, of 6 words that are translated one by one, binarised in ``folder``."""
    draw = random.Random(1)
    folder.mkdir(parents=True)
    for split, count in (("train", 24), ("test", 4)):
        lines = [[draw.randrange(6) for _ in range(draw.randint(2, 5))] for _ in range(count)]
        for language, letter in (("de", "w"), ("en", "v")):
            text = "".join(" ".join(f"{letter}{word}" for word in line) + "\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8")
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "test")]
    words = ["--source-lang", "de", "--target-lang", "en", "--workers", "1"]
    runner.run("preprocess", [*words, *prefixes, "--destdir", folder / "data-bin"])
    return folder / "data-bin"


def training(data, save_dir, name: str, updates: int, user_dir="fairseq_plugin") -> list:
    """The command line of a run, up to a number of updates."""
    own = "--task translation_head_pruning --arch transformer_iwslt_de_en --share-decoder-input-output-embed \
        --optimizer adam --lr 0.01 --lr-scheduler inverse_sqrt --warmup-updates 4 --dropout 0 --max-tokens 60 \
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --disable-validation --cpu --num-workers 0 \
        --no-epoch-checkpoints --required-batch-size-multiple 1 --log-format json --seed 1"
    paths = [data, "--user-dir", user_dir, "--save-dir", save_dir, "--max-update", updates]
    return [*paths, *own.split(), *SIZE, *OPTIONS[name].split()]


def decoding(data, path, user_dir="fairseq_plugin") -> list:
    """The command line that decodes the test sentences."""
    own = "--batch-size 4 --beam 2 --max-len-a 1 --max-len-b 3 --cpu --num-workers 0 --required-batch-size-multiple 1"
    return [data, "--user-dir", user_dir, "--path", path, *own.split()]


def pack(checkpoint: Path, name: str) -> None:
    """Keep a checkpoint here."""
    (HERE / f"{name}.pt.gz").write_bytes(gzip.compress(checkpoint.read_bytes(), mtime=0))


def unpack(name: str, folder: Path) -> Path:
    """Write a checkpoint that is kept here to ``folder``."""
    target = folder / f"{name}.pt"
    target.write_bytes(gzip.decompress((HERE / f"{name}.pt.gz").read_bytes()))
    return target


def main() -> None:
    """Write the files beside this one."""
    from head_pruning.cli import main as command

    root, work = HERE.parents[2], Path("build/before_rooms")
    shutil.rmtree(root / work, ignore_errors=True)
    runner = Runner(root / work)
    data = corpus(runner, root / work / "corpus").relative_to(root)
    outputs = {}
    for name in OPTIONS:
        last = work / name / "checkpoint_last.pt"
        runner.run("train", training(data, work / name, name, HALF), cwd=root)
        pack(root / last, name)
        outputs[name] = decoded(runner.run("generate", decoding(data, last), cwd=root).out)
        if name == "dsp":
            command(["export", str(root / last), str(root / work / "compact.pt"), "--to", "compact"])
            pack(root / work / "compact.pt", "compact")
            compact = runner.run("generate", decoding(data, work / "compact.pt"), cwd=root)
            outputs["compact"] = decoded(compact.out)
        runner.run("train", training(data, work / name, name, END), cwd=root)
        end = torch.load(root / last, weights_only=True)["model"]
        save_file({key: value.clone() for key, value in end.items()}, HERE / f"{name}_end.safetensors")
    (HERE / "decoded.json").write_text(json.dumps(outputs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
