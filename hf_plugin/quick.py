"""``make quick``: a pretrained encoder loses half of its heads by their importance; what that costs and gains.

Nothing but a linear probe is trained. It tells praise from blame by the encoder's sentence vectors (the mean over
their tokens), and is fitted in closed form, anew for the smaller encoder. Both models stay in the output folder.
"""

import argparse
import csv
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from head_pruning import HeadMask, HeadPruningError
from head_pruning.errors import one_line
from head_pruning.files import write_json, writing
from head_pruning.inference.timing import fastest, stopwatch
from head_pruning.report.runs import RESULTS_FILE, file_sizes
from head_pruning.report.tables import head_table, text_table
from head_pruning.surgery import remove_heads

from .heads.importance import head_importance
from .mapping.unit_map import unit_map
from .saving.folders import save_compact

LENGTH = 48  # tokens that sentences are cut to
TIMED = 128  # tokens of the sequence whose pass is timed
BATCH = 32
_RIDGE = 1.0


def _read(path: Path, count: int) -> tuple[list[str], torch.Tensor]:
    """The first sentences of a file in SST-2's layout, and +1 for praise or -1 for blame of each."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(islice(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), count))
    if not rows:
        raise ValueError(f"{path} has no sentence")
    return [row["sentence"] for row in rows], torch.tensor([2.0 * int(row["label"]) - 1.0 for row in rows])


def _batches(tokenizer: Any, sentences: list[str], signs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Batches of sentences of about the same length."""
    order = sorted(range(len(sentences)), key=lambda place: len(sentences[place]))
    found = []
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        texts = [sentences[place] for place in places]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        found.append({**tokens, "labels": signs[places]})
    return found


def _vectors(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[B, d + 1]``: the mean over each sentence's tokens, of length 1, and a constant."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    mean = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat([mean, torch.ones_like(mean[:, :1])], 1)


def _embed(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return torch.cat([_vectors(model, batch) for batch in batches]), torch.cat([b["labels"] for b in batches])


def _probe(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """``[d + 1]``: the weights of ridge regression."""
    vectors, signs = _embed(model, batches)
    squares = vectors.T @ vectors + _RIDGE * torch.eye(vectors.shape[1])
    return torch.linalg.solve(squares, vectors.T @ signs).clone()


def _accuracy(model: nn.Module, probe: torch.Tensor, batches: list[dict[str, torch.Tensor]]) -> float:
    vectors, signs = _embed(model, batches)
    return float(((vectors @ probe) * signs > 0).float().mean())


def half_by_importance(model: nn.Module, probe: torch.Tensor, batches: list[dict[str, torch.Tensor]]) -> HeadMask:
    """The half of the heads that the probe's squared error feels most (Michel et al. 2019, of each example)."""

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (_vectors(model, batch) @ probe - batch["labels"]).square()

    sites = unit_map(model)
    scores = torch.as_tensor(head_importance(model, batches, per_example=True, loss=loss, progress=False))
    keep = torch.zeros(sites.num_heads, dtype=torch.bool)
    keep[scores.argsort(stable=True, descending=True)[: sites.num_heads // 2]] = True
    return HeadMask(sites, keep.numpy())


def run(data: Path, out: Path, train: int, test: int) -> str:
    """Prune the model in ``data``, save it, and tell of both; the text to print.

    Args:
        data: with ``model`` and ``SST-2``, as ``python -m prepare.demo_sentiment`` writes them.
        out: for the folders ``dense`` and ``pruned``.
        train: sentences that the probe and the importance come from.
        test: sentences of the score.

    Raises:
        HeadPruningError: the model or the sentences cannot be read, or the disk takes nothing.
    """
    with writing(out):  # told before the work
        out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    files = {"train.tsv": train, "dev.tsv": test}
    try:
        if not (data / "model").is_dir():  # or its name would be looked up in the hub
            raise FileNotFoundError(f"there is no {data / 'model'}")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(data / "model")
        dense: Any = transformers.AutoModel.from_pretrained(data / "model").eval()
        learned, scored = (_batches(tokenizer, *_read(data / "SST-2" / name, files[name])) for name in files)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise HeadPruningError(
            f"{data} holds no model/ and SST-2/ as python -m prepare.demo_sentiment makes them "
            f"({one_line(error):.200}); give another --data."
        ) from error
    probe = _probe(dense, learned)
    mask = half_by_importance(dense, probe, learned)
    small: Any = transformers.AutoModel.from_pretrained(data / "model").eval()
    remove_heads(small, unit_map(small), mask)
    accuracy = [_accuracy(dense, probe, scored), _accuracy(small, _probe(small, learned), scored)]
    length = min(TIMED, dense.config.max_position_embeddings)
    inputs = torch.arange(length)[None] % dense.config.vocab_size
    with torch.inference_mode():
        passes = {"dense": lambda: dense(input_ids=inputs), "small": lambda: small(input_ids=inputs)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times = fastest(passes, 20, stopwatch())
        torch.set_num_threads(threads)
    dense.save_pretrained(out / "dense")
    tokenizer.save_pretrained(out / "dense")
    examples = sum(len(batch["labels"]) for batch in scored)
    scores = [{"eval_accuracy": value, "eval_samples": examples} for value in accuracy]
    options = {"num_of_heads": mask.kept, "per_example": True}
    save_compact(small, out / "pruned", processing_class=tokenizer, method="michel", options=options, scores=scores[1])
    counts, sizes = (mask.keep.size, mask.kept), [file_sizes(out / name) for name in ("dense", "pruned")]
    for name, heads, score, latency in zip(("dense", "pruned"), counts, scores, times.values()):
        told = {"heads_kept": heads, "heads_total": mask.keep.size, "latency_ms": latency}
        write_json(out / name / RESULTS_FILE, {**score, **told})
    rows = [
        ("heads", *counts),
        ("parameters", *(f"{size['parameters']:,}" for size in sizes)),
        ("file, MB", *(f"{size['file_bytes'] / 1e6:.1f}" for size in sizes)),
        (f"latency of {length} tokens, ms (one thread)", *(f"{value:.1f}" for value in times.values())),
        (f"accuracy on {examples} reviews, %", *(f"{100 * value:.1f}" for value in accuracy)),
    ]
    return f"{head_table(mask)}\n\n{text_table(('', 'before', 'after'), rows)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quick-output"), help="folder (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with model/ and SST-2/ to use instead of the demo's own")
    parser.add_argument("--train", type=int, default=500, help="sentences to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="sentences to score (default: %(default)s)")
    options = parser.parse_args()
    if min(options.train, options.test) < 1:
        sys.exit("error: --train and --test must be 1 or more.")
    begin = time.monotonic()
    data = options.data or options.output / "data"
    prepare = [sys.executable, "-m", "prepare.demo_sentiment", "--dest", str(data)]
    if options.data is None and subprocess.run(prepare, stdout=subprocess.DEVNULL).returncode:
        sys.exit("error: the model and the sentences could not be prepared; see the message above.")
    try:
        print(run(data, options.output, options.train, options.test))
    except (HeadPruningError, OSError) as error:
        sys.exit(f"error: {error}")
    took = time.monotonic() - begin
    print(f"It took {took:.0f} s. head-pruning report {options.output} makes a page of both models.")


if __name__ == "__main__":
    main()
