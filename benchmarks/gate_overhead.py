"""What gates cost a training step: ``python -m benchmarks.gate_overhead [--json] [--results]``.

Steps of a BERT-base (random weights; forward, backward, fused AdamW) with the gates of each method and the session's
calls, over the same steps without; and a pass of head importance over a forward and backward pass that computes no
gradients of weights. On the CPU: one thread, processor time. Each turn is divided by the mean of a turn without gates
just before it and one just after; the ratio is the median over the rounds, with its quartiles beside it.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from head_pruning import PruningSession
from head_pruning.files import atomic_path, write_json
from head_pruning.report import text_table
from hf_plugin.command_line.defaults import pruner
from hf_plugin.heads.importance import head_importance
from hf_plugin.mapping.unit_map import unit_map
from hf_plugin.training.session import open_session

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY = 1000
PLAIN, PLAIN_PASS = "no gates", "no gates, pass"
# What the step costs depends on: option to default and meaning.
SIZES = {
    "batch": (1, "examples per step"),
    "length": (128, "tokens per example"),
    "layers": (12, "layers of the model"),
    "hidden": (768, "width of the model"),
    "heads": (12, "heads per layer"),
}
PASSES = {"importance": False, "importance per example": True}


def methods(heads: int) -> dict[str, dict[str, Any]]:
    """Each method with its options; half of the heads stay, where it keeps a number."""
    half = {"num_of_heads": heads // 2}
    return {
        "dsp": {**half, "annealing": True, "joint_pruning": True},
        "ste": {**half, "joint_pruning": True},
        "voita": {"l0_penalty": 0.0015, "joint_pruning": True},
        "random": half,
    }


class Contest:
    """One model and optimizer, and the steps that are compared on them; each is a function to time."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=4 * options.hidden,
        )
        self.device = torch.device(options.device)
        self.model = BertForSequenceClassification(config).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        ids = torch.randint(5, VOCABULARY, (options.batch, options.length))
        labels = torch.randint(0, 2, (options.batch,))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.sessions: dict[str, PruningSession] = {}
        for name, choices in methods(options.layers * options.heads).items():
            self.sessions[name] = open_session(self.model, [pruner(name, **choices)])
            self.sessions[name].gates.detach()  # on the model only while its turn lasts
        self.unit_map = unit_map(self.model)  # of a pass, not of each of its batches
        self.updates = 0

    def step(self) -> None:
        """One update of the model."""
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gated_step(self, session: PruningSession) -> None:
        """One update of the model and the gates."""
        session.before_update(self.updates)
        session.loss(self.model(**self.batch).loss).backward()
        session.after_backward()
        self.optimizer.step()
        session.after_step()
        self.optimizer.zero_grad()

    def plain_pass(self) -> None:
        """Forward and backward to the word embeddings, no gradients of weights."""
        words = self.model.get_input_embeddings()(self.batch["input_ids"]).requires_grad_(True)
        rest = {name: self.batch[name] for name in ("attention_mask", "labels")}
        self.model(inputs_embeds=words, **rest).loss.backward()

    def turn(self, name: str) -> float:
        """Milliseconds of one turn of ``name``; what prepares and clears it is not counted."""
        self.updates += 1
        if name in self.sessions:
            session = self.sessions[name]
            session.gates.attach()
            taken = self.time(lambda: self.gated_step(session))
            session.gates.detach()
        elif name == PLAIN:
            taken = self.time(self.step)
        elif name == PLAIN_PASS:
            self.model.eval().requires_grad_(False)
            taken = self.time(self.plain_pass)
            self.model.train().requires_grad_(True)
        else:
            options = {"per_example": PASSES[name], "unit_map": self.unit_map, "progress": False}
            taken = self.time(lambda: head_importance(self.model, [self.batch], **options))
        return taken

    def time(self, action: Callable[[], Any]) -> float:
        """Milliseconds: of the processor, or on a GPU by the clock between two states of rest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            action()
            torch.cuda.synchronize(self.device)
            return 1000.0 * (time.perf_counter() - start)
        start = time.process_time()
        action()
        return 1000.0 * (time.process_time() - start)


def measure(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Milliseconds of each contestant's turns and their ratios, one per round, after a round to warm up."""
    contest = Contest(options)
    contest.model.train()
    times: dict[str, list[float]] = {name: [] for name in (PLAIN, *contest.sessions, PLAIN_PASS, *PASSES)}
    ratios: dict[str, list[float]] = {name: [] for name in (*contest.sessions, *PASSES)}
    order = random.Random(0)
    for turn in range(options.rounds + 1):
        for plain, names in ((PLAIN, list(contest.sessions)), (PLAIN_PASS, list(PASSES))):
            before = contest.turn(plain)
            for name in order.sample(names, len(names)):
                taken, after = contest.turn(name), contest.turn(plain)
                if turn:
                    times[name].append(taken)
                    times[plain].append(after)
                    ratios[name].append(2.0 * taken / (before + after))
                before = after
    return {n: np.array(values) for n, values in times.items()}, {n: np.array(values) for n, values in ratios.items()}


def summary(
    times: dict[str, np.ndarray], ratios: dict[str, np.ndarray], options: argparse.Namespace
) -> dict[str, Any]:
    """What ``--json`` prints: medians of the ratios, and their quartiles."""
    medians = {name.replace(" ", "_"): round(float(np.median(values)), 4) for name, values in ratios.items()}
    passes = [name.replace(" ", "_") for name in PASSES]
    return {
        "max_ratio": max(ratio for name, ratio in medians.items() if name not in passes),
        "importance_ratio": max(medians[name] for name in passes),
        **medians,
        "quartiles": {name: np.quantile(values, (0.25, 0.75)).round(4).tolist() for name, values in ratios.items()},
        "step_ms": round(float(np.median(times[PLAIN])), 2),
        "pass_ms": round(float(np.median(times[PLAIN_PASS])), 2),
        **{name: getattr(options, name) for name in ("device", "rounds", *SIZES)},
    }


def table(times: dict[str, np.ndarray], ratios: dict[str, np.ndarray]) -> str:
    """The median turn of each, and the ratios."""
    rows = []
    for name, values in times.items():
        cells = [f"{r:.3f}" for r in np.quantile(ratios[name], (0.5, 0.25, 0.75))] if name in ratios else [""] * 3
        rows.append((name, f"{np.median(values):.1f}", *cells))
    return text_table(("", "ms", "ratio", "25 %", "75 %"), rows)


def write_results(times: dict[str, np.ndarray], ratios: dict[str, np.ndarray], options: argparse.Namespace) -> None:
    """``benchmarks/results/gate_overhead.md`` and ``.json``."""
    write_json(RESULTS / "gate_overhead.json", summary(times, ratios, options))
    title, about = __doc__.strip().split("\n\n", 1)
    shape = ", ".join(f"{words}: {getattr(options, name)}" for name, (_, words) in SIZES.items())
    lines = (
        f"# {title.split(':')[0]}",
        f"`python -m benchmarks.gate_overhead --results`: {about}",
        f"{shape}; rounds: {options.rounds}; {options.device}, torch {torch.__version__}.",
        f"```\n{table(times, ratios)}\n```",
    )
    with atomic_path(RESULTS / "gate_overhead.md") as temporary:
        Path(temporary).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table, or with ``--json`` one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--results", action="store_true", help="write benchmarks/results/gate_overhead.{md,json}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each (default: %(default)s)")
    for name, (value, words) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    torch.set_num_threads(1)
    times, ratios = measure(options)
    if options.results:
        write_results(times, ratios, options)
    print(json.dumps(summary(times, ratios, options)) if options.json else table(times, ratios))


if __name__ == "__main__":
    main()
