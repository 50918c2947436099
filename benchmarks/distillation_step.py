"""What a step of SPD or GPP costs: ``python -m benchmarks.distillation_step [--json] [--results]``.

Sparse progressive distillation of a BERT of the base's shape with random weights, beside the least that any
distillation must do: the student's forward and backward pass and the teacher's forward pass. Both in one process, in
turns, without an optimizer; without a GPU the time is that of the processor, not of the clock on the wall, so what
else runs on the machine hardly shows. Each step of SPD is divided by the mean of the floor just before and just after
it, and the ratio is the median over the rounds, with its quartiles beside it. Memory that was freed stays with the
process (glibc's ``M_MMAP_MAX`` 0, no trimming): else it is chance which of the two waits for new pages from the
system. Attention is computed openly in both. At a replacing rate of 1 every layer is the student's and has
gradients, which is the dearest; at 0.8 one layer in five is the teacher's and has none.

Memory is the peak of a process of its own after two updates with AdamW, less what it held before there was a model:
ours, and the straightforward way with deep copies (a student and a teacher of two stacks of layers each, gradients for
all parameters), as the published code has it. Encoders are counted by the parameters that are alive.

A step of GPP with DFD, with indicators on all heads and feed-forward units, is taken beside the same floor, of models
without indicators; forward passes of the student are counted. The fusion of DFD alone is measured on random hidden
states, forward and backward, by the tensors that it keeps alive, in maps (one hidden state): beside it the definition
step by step, whose fused states are all alive until the gradients are there. The gradients of all states, one map for
each layer, are in both.
"""

import argparse
import copy
import ctypes
import functools
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.alive import Alive
from head_pruning import PruningSession
from head_pruning.distillation.engine.fusion import fused_loss
from head_pruning.files import atomic_path, write_json
from head_pruning.report import text_table
from hf_plugin import open_session, pruner

RESULTS = Path(__file__).resolve().parent / "results"
# What the cost depends on: option to default and meaning.
SIZES = {
    "layers": (12, "layers of the model"),
    "hidden": (768, "width of the model"),
    "batch": (8, "examples"),
    "length": (128, "tokens of each"),
}
RATES = (1.0, 0.8)
GPP = "GPP + DFD"
# Of the results: key to name.
KEYS = {"spd_step_over_floor": "SPD at 1", "spd_step_over_floor_at_0.8": "SPD at 0.8", "gpp_step_over_floor": GPP}
WINDOW = 3
# Whose memory is measured, each in a process of its own.
MEMORY = ("ours", "copies", "fusion", "step by step")
UPDATES = 1000  # of the schedule; the steps measured are in its first phase, where masks move


def model(options: argparse.Namespace) -> BertForSequenceClassification:
    """A BERT in training, with its dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.hidden // 64 or 1,
        intermediate_size=4 * options.hidden,
        attn_implementation="eager",
        num_labels=2,
    )
    return BertForSequenceClassification(config).to(options.device).train()


def batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Random tokens; a quarter of each second example is padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (options.batch, options.length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, -(options.length // 4) :] = 0
    labels = torch.arange(options.batch) % 2
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(options.device) for name, value in given.items()}


def spd(student: nn.Module, rate: float) -> PruningSession:
    """SPD with its masks on the student, whose rate stays."""
    options = {"replacing_rate": rate, "published_schedule": True}
    masks = pruner("spd_magnitude", sparsity=0.9, mask_frequency=10)
    return open_session(student, [masks, pruner("spd", **options)], total_steps=UPDATES)


class Contest:
    """A student with SPD on it, and the floor on the same models."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.student, self.batch = options, model(options), batch(options)
        self.session = spd(self.student, 1.0)
        self.spd = self.session.pruners[1]
        self.teacher, self.step = self.spd.teacher.model, 20

    def floor(self) -> None:
        """The student's two passes, the teacher's one."""
        self.session.before_update(self.step)
        self.session._recorder.live = False
        self.spd.grafts.set(np.ones(self.options.layers, dtype=bool))
        with torch.no_grad():
            self.teacher(**self.batch)
        self.student(**self.batch).loss.backward()
        self.student.zero_grad()

    def ours(self, rate: float) -> None:
        """One update of SPD but for the optimizer."""
        self.spd.rate = rate
        self._update()

    def _update(self) -> None:
        self.session.before_update(self.step)
        tokens = {"encoder": self.batch["attention_mask"].bool()}
        self.session.loss(self.student(**self.batch).loss, self.batch, masks=tokens).backward()
        self.session.after_backward()
        self.session.before_step()
        self.session.after_step()
        self.student.zero_grad()
        self.step += 1


class GppContest(Contest):
    """A student with GPP and DFD on it, and the floor on a twin without indicators."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.student, self.batch = options, model(options), batch(options)
        self.twin = copy.deepcopy(self.student)
        dfd = pruner("dfd")
        self.session = open_session(self.student, [pruner("gpp"), dfd], total_steps=UPDATES)
        self.teacher, self.step, self.forwards = dfd.teacher.model, 20, 0
        self.student.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple) -> None:
        self.forwards += 1

    def floor(self) -> None:
        with torch.no_grad():
            self.teacher(**self.batch)
        self.twin(**self.batch).loss.backward()
        self.twin.zero_grad()

    def ours(self, rate: float) -> None:
        """One update of GPP and DFD but for the optimizer."""
        self._update()


def measure(options: argparse.Namespace, contest: Contest, rates: dict[float, str]) -> dict[str, list[float]]:
    """Milliseconds of the floor, and of the contest's method by its name for each rate; ratios by ``ratio NAME``."""
    found: dict[str, list[float]] = {"floor": []}
    contest.floor()
    contest.ours(1.0)
    for _ in range(options.rounds):
        for rate, name in rates.items():
            before = _time(options, contest.floor)
            taken = _time(options, functools.partial(contest.ours, rate))
            after = _time(options, contest.floor)
            found["floor"] += [before, after]
            found.setdefault(name, []).append(taken)
            found.setdefault(f"ratio {name}", []).append(2.0 * taken / (before + after))
    return found


# -- memory -----------------------------------------------------------------------------------------------------------


class Copies(nn.Module):
    """A student and a teacher of two stacks each, as deep copies, with gradients for all of the student."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.student = model(options)
        self.predecessor = copy.deepcopy(self.student.bert.encoder.layer)
        self.teacher = copy.deepcopy(self.student).eval()
        self.teacher_spare = copy.deepcopy(self.teacher.bert.encoder.layer)
        self.generator = np.random.default_rng(1)

    def step(self, given: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        """One update."""
        stack = self.student.bert.encoder.layer
        drawn = self.generator.random(len(stack)) < RATES[1]
        own = list(stack)
        for i, mine in enumerate(drawn):
            stack[i] = own[i] if mine else self.predecessor[i]
        mine, ours = _with_states(self.student, given)
        with torch.no_grad():
            theirs, targets = _with_states(self.teacher, given)
        loss = sum(nn.functional.mse_loss(a, b) for a, b in zip(ours, targets))
        loss = loss - (theirs.logits.softmax(-1) * mine.logits.log_softmax(-1)).mean()
        loss.backward()
        optimizer.step()
        self.zero_grad(set_to_none=False)  # as in the published code: gradients are held
        for i, layer in enumerate(own):
            stack[i] = layer


def _with_states(which: nn.Module, given: dict[str, torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    """What a model gives, and what comes out of its layers."""
    states: list[torch.Tensor] = []

    def note(layer: nn.Module, args: tuple, output: Any) -> None:
        states.append(output if torch.is_tensor(output) else output[0])

    hooks = [layer.register_forward_hook(note) for layer in which.bert.encoder.layer]
    output = which(**given)
    for hook in hooks:
        hook.remove()
    return output, states


def memory(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of two updates in MiB, and how many encoders the live parameters make."""
    before, given = _held(options), batch(options)
    if kind == "copies":
        whole = Copies(options)
        student = whole.student
        optimizer = torch.optim.AdamW(student.bert.encoder.layer.parameters(), lr=1e-5)
        for _ in range(2):
            whole.step(given, optimizer)
    else:
        student = model(options)
        session = spd(student, RATES[1])
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
        tokens = {"encoder": given["attention_mask"].bool()}
        for step in range(2):
            session.before_update(step)
            session.loss(student(**given).loss, given, masks=tokens).backward()
            session.after_backward()
            session.before_step(optimizer)
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
    peak = _held(options, peak=True) - before
    encoder = sum(p.numel() for p in student.bert.encoder.parameters())
    inside = {p.shape for p in student.bert.encoder.parameters()}
    live = {p.data_ptr(): p for p in gc.get_objects() if isinstance(p, nn.Parameter) and p.shape in inside}
    outside = [p for n, p in student.named_parameters() if ".encoder." not in n and p.shape in inside]
    number = sum(p.numel() for p in live.values())
    copies_outside = sum(p.numel() for p in outside) * (2 if kind == "copies" else 1)
    return {"peak_mib": round(peak, 1), "encoders": round((number - copies_outside) / encoder, 3)}


def fusion(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of the loss between fused states and its gradients, beyond the states, in hidden states."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length, options.hidden)
    mine, theirs = (
        [(torch.randn(shape, generator=generator) + 0.3).to(options.device) for _ in range(options.layers)]
        for _ in range(2)
    )
    leaves = [state.requires_grad_() for state in mine]
    function = fused_loss if kind == "fusion" else step_by_step
    with Alive() as alive:
        loss = function(leaves, theirs, WINDOW)
        forward = alive.most
        gradients = torch.autograd.grad(loss, leaves)
    assert len(gradients) == options.layers  # they are alive until here
    return {name: round(size / leaves[0].nbytes, 2) for name, size in (("forward", forward), ("in_all", alive.most))}


def step_by_step(mine: list[torch.Tensor], theirs: list[torch.Tensor], window: int) -> torch.Tensor:
    """The loss of DFD as its definition reads."""
    targets = list(theirs)
    for i in range(len(targets) - 1, 0, -1):
        own, above = targets[i - 1].sum(), targets[i].sum()
        targets[i - 1] = (targets[i - 1] * own + targets[i] * above) / (own + above)
    padded = [*mine, *[mine[-1]] * (window - 1)]
    terms = []
    for i, target in enumerate(targets):
        sums = torch.stack([state.sum() for state in padded[i : i + window]])
        fused = sum(state * share for state, share in zip(padded[i : i + window], sums / sums.sum()))
        terms.append(nn.functional.mse_loss(fused, target))
    return torch.stack(terms).sum()


def _held(options: argparse.Namespace, peak: bool = False) -> float:
    """MiB that the process holds, or held at its peak."""
    if options.device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    words = Path("/proc/self/status").read_text().split()
    return float(words[words.index("VmHWM:" if peak else "VmRSS:") + 1]) / 1024


def in_a_process(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """:func:`memory` in a process of its own."""
    sizes = [word for name in (*SIZES, "threads", "device") for word in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, "-m", "benchmarks.distillation_step", "--memory", kind, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parents[1])
    return json.loads(done.stdout.splitlines()[-1])


# -- a vocabulary -----------------------------------------------------------------------------------------------------


def vocabulary(options: argparse.Namespace) -> dict[str, Any]:
    """Distillation of masked words, as in Prune Once for All, in chunks of logits.

    ``pruneofa_step_over_floor``: an update of a student of BERT-base's shape that learns from its teacher, over the
    student's two passes (both its losses, from all logits) and the teacher's one.
    ``kd_vocab_peak_over_floor``: the most that the divergence of all tokens holds beside what it is given and the
    gradients that it gives, over the logits of both models for one chunk.
    """
    from transformers import BertForPreTraining

    from head_pruning.distillation.engine.vocabulary import _CHUNK, cross_entropy, divergence
    from head_pruning.outputs import LastLayer, Late

    torch.manual_seed(0)
    config = model(options).config
    student = BertForPreTraining(config).to(options.device).train()
    given = batch(options)
    del given["labels"]
    tokens = given["attention_mask"].bool()
    rows = tokens & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.15).to(tokens.device)
    rows = rows.flatten().nonzero()[:, 0]
    words, follows = given["input_ids"].flatten()[rows], torch.arange(options.batch, device=options.device) % 2
    labels = torch.full_like(given["input_ids"], -100)
    labels.view(-1)[rows] = words
    kd = pruner("logits", distill_task=0.5, distill_logits=0.5, distill_sum=True)
    session = open_session(student, [kd], total_steps=UPDATES)
    last, teacher = LastLayer.of(student, lambda each: each.get_output_embeddings()), kd.teacher.model
    assert last is not None

    def floor() -> None:
        with torch.no_grad():
            teacher(**given)
        student(**given, labels=labels, next_sentence_label=follows).loss.backward()
        student.zero_grad()

    def ours() -> None:
        session.before_update(0)
        with last.left_out():
            outputs = student(**given)
        late = last.late(outputs.prediction_logits)
        assert isinstance(late, Late)
        task = cross_entropy(late.flat()[rows], words)
        task = task + torch.nn.functional.cross_entropy(outputs.seq_relationship_logits, follows)
        session.loss(task, given, outputs, masks={"encoder": tokens}, last=last).backward()
        session.after_backward()
        session.before_step()
        session.after_step()
        student.zero_grad()

    ratios = []
    floor()
    ours()
    for _ in range(options.rounds):
        before, taken, after = (_time(options, each) for each in (floor, ours, floor))
        ratios.append(2.0 * taken / (before + after))
    numel = config.vocab_size * max(1, _CHUNK[options.device] // config.vocab_size)
    layers = [nn.Linear(options.hidden, config.vocab_size).to(options.device) for _ in range(2)]
    chunk = numel // config.vocab_size
    features = torch.randn(8 * chunk, options.hidden, device=options.device, requires_grad=True)
    mine, theirs = (Late(each, layer) for each, layer in zip((features, features.detach()), layers))
    kept = sum(each.numel() for each in (features, *layers[0].parameters())) * 4
    peak = _peak(options, lambda: divergence(mine, theirs, 2.0))
    return {
        "pruneofa_step_over_floor": round(float(np.median(ratios)), 4),
        "pruneofa_quartiles": np.quantile(ratios, (0.25, 0.75)).round(4).tolist(),
        "kd_vocab_peak_over_floor": round((peak - kept) / (2 * 4 * numel), 4),
        "chunk_rows": chunk,
    }


def _peak(options: argparse.Namespace, action: Callable[[], Any]) -> float:
    """Bytes of tensors that ``action`` held at its peak beside those that were there."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, and take large tensors from it too; nothing with other allocators."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _time(options: argparse.Namespace, action: Callable[[], Any]) -> float:
    """Milliseconds."""
    gpu = options.device == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    start = clock()
    action()
    if gpu:
        torch.cuda.synchronize()
    return 1000.0 * (clock() - start)


# -- results ----------------------------------------------------------------------------------------------------------


def summary(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints."""
    times = measure(options, Contest(options), {rate: f"SPD at {rate:g}" for rate in RATES})
    contest = GppContest(options)
    gpp = measure(options, contest, {1.0: GPP})
    ours, copies, fused, stepwise = (in_a_process(kind, options) for kind in MEMORY)
    times |= {name: values for name, values in gpp.items() if name != "floor"}
    return {
        "spd_step_over_floor": round(float(np.median(times["ratio SPD at 1"])), 4),
        "spd_step_over_floor_at_0.8": round(float(np.median(times["ratio SPD at 0.8"])), 4),
        "encoders_resident": ours["encoders"],
        "encoders_resident_copies": copies["encoders"],
        "peak_mib": ours["peak_mib"],
        "peak_mib_copies": copies["peak_mib"],
        **vocabulary(options),
        "gpp_step_over_floor": round(float(np.median(times[f"ratio {GPP}"])), 4),
        "gpp_forwards": contest.forwards / (options.rounds + 1),
        "fusion_maps": fused,
        "fusion_maps_step_by_step": stepwise,
        "quartiles": {
            name: np.quantile(times[f"ratio {name}"], (0.25, 0.75)).round(4).tolist() for name in KEYS.values()
        },
        "ms": {name: round(min(values), 1) for name, values in times.items() if not name.startswith("ratio")},
        **{name: getattr(options, name) for name in ("threads", "rounds", "device", *SIZES)},
    }


def table(outcome: dict[str, Any]) -> str:
    """The outcome for people."""
    rows = [
        ("floor", f"{outcome['ms']['floor']:.0f}", "1", ""),
        *(
            (name, f"{outcome['ms'][name]:.0f}", f"{outcome[key]:.3f}", "{} {}".format(*outcome["quartiles"][name]))
            for key, name in KEYS.items()
        ),
    ]
    maps = [
        (name, *(f"{outcome[key][part]:g}" for part in ("forward", "in_all")))
        for name, key in (("ours", "fusion_maps"), ("step by step", "fusion_maps_step_by_step"))
    ]
    memory_rows = [
        ("ours", f"{outcome['encoders_resident']:g}", f"{outcome['peak_mib']:.0f}"),
        ("deep copies", f"{outcome['encoders_resident_copies']:g}", f"{outcome['peak_mib_copies']:.0f}"),
    ]
    return "\n\n".join(
        [
            text_table(("step", "ms", "of the floor", "25 % and 75 %"), rows),
            text_table(("", "encoders", "peak MiB"), memory_rows),
            text_table(("fusion", "maps in the forward pass", "in all"), maps),
        ]
    )


def _command(outcome: dict[str, Any]) -> str:
    return " ".join(f"--{name} {outcome[name]}" for name in ("threads", "rounds", "device"))


def write_results(outcome: dict[str, Any]) -> None:
    """``benchmarks/results/distillation_step.md`` and ``.json``."""
    write_json(RESULTS / "distillation_step.json", outcome)
    title, about = __doc__.strip().split("\n\n", 1)
    sizes = ", ".join(f"{name} {outcome[name]}" for name in (*SIZES, "threads", "rounds"))
    lines = (
        f"# {title.split(':')[0]}",
        f"`python -m benchmarks.distillation_step --results {_command(outcome)}`\n\n{about}",
        f"{sizes}; {outcome['device']}, torch {torch.__version__}.",
        f"```\n{table(outcome)}\n```",
    )
    with atomic_path(RESULTS / "distillation_step.md") as temporary:
        Path(temporary).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print the table, or with ``--json`` one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--results", action="store_true", help="write benchmarks/results/distillation_step.{md,json}")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: %(default)s)")
    parser.add_argument("--memory", choices=MEMORY, help="measure the memory of one of them only")
    parser.add_argument("--vocabulary", action="store_true", help="measure the distillation of masked words only")
    for name, (value, words) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    torch.set_num_threads(options.threads)
    if options.vocabulary:
        keep_freed_memory()
        print(json.dumps(vocabulary(options)))
        return
    if options.memory:
        measured = memory if options.memory in MEMORY[:2] else fusion
        print(json.dumps(measured(options.memory, options)))
        return
    keep_freed_memory()
    outcome = summary(options)
    if options.results:
        write_results(outcome)
    print(json.dumps(outcome) if options.json else table(outcome))


if __name__ == "__main__":
    main()
