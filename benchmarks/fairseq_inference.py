"""How fast pruned fairseq models translate: ``python -m benchmarks.fairseq_inference [--data FOLDER] [--results]``.

The transformer of the IWSLT'14 recipe (random weights, dictionaries of 8848 and 6632) against the same with random
heads cut out, in what fairseq-generate runs and times for each batch: encoder, beam search with a beam of 5, the
decoder step by step. Every hypothesis is made as long, so that all models do the same work. Beside each speed-up
stands what the multiply-accumulates (MACs) of the same translation allow; they are counted, not measured. On the CPU:
processor time of one thread. The models take turns, the shortest of their times counts. A profile then says where the
time goes that heads have no part in.
"""

import argparse
import copy
import json
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import numpy as np
import torch
from fairseq.data import Dictionary, data_utils
from fairseq.data.language_pair_dataset import collate
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import transformer_iwslt_de_en
from fairseq.sequence_generator import SequenceGenerator
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from fairseq_plugin import remove_heads
from fairseq_plugin.modules.unit_map import unit_map
from head_pruning import HeadMask
from head_pruning.files import atomic_path, write_json
from head_pruning.inference.timing import fastest, stopwatch
from head_pruning.progress import bar_options
from head_pruning.report.tables import markdown_table, text_table

RESULTS = Path(__file__).resolve().parent / "results"
DENSE = "dense"
WORDS = (8848, 6632)
KEPT = (36, 12, 4)
DTYPES = {"float32": torch.float32, "fp16": torch.float16}
# What an operator is for; the first that fits.
PARTS = {
    "matrix products": ("mm", "bmm", "addmm", "linear", "scaled_dot_product"),
    "choosing among the vocabulary": ("log_softmax", "topk", "sort"),
    "moving beams and keys": ("index", "gather", "cat", "copy_", "clone", "masked_select", "repeat"),
}
OTHER, PYTHON = "other operators", "between the operators"


def dictionary(size: int) -> Dictionary:
    """A dictionary of so many symbols."""
    words = Dictionary()
    for number in range(size - words.nspecial):
        words.add_symbol(f"w{number}")
    return words


def build_model(options: argparse.Namespace) -> TransformerModel:
    """The model with random weights."""
    torch.manual_seed(0)
    arguments = Namespace(share_decoder_input_output_embed=True, encoder_layers=options.layers)
    arguments.decoder_layers = options.layers
    transformer_iwslt_de_en(arguments)
    arguments.max_source_positions = arguments.max_target_positions = 1024
    source, target = (dictionary(size) for size in WORDS)
    model = TransformerModel.build_model(
        arguments, SimpleNamespace(source_dictionary=source, target_dictionary=target)
    )
    return model.eval().to(DTYPES[options.dtype])


def kept_heads(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """What the models keep: name to booleans, drawn at random."""
    total = options.layers * 12
    counts = sorted({round(kept * total / 72) for kept in KEPT}, reverse=True)
    return {f"{k} heads": np.random.default_rng(k).permutation(np.arange(total) < k) for k in counts}


def read_sentences(options: argparse.Namespace) -> list[torch.Tensor]:
    """Source sentences: of the test set of a binarised corpus, or random tokens as long as its are."""
    count = max(options.batches) * options.turns
    draw = np.random.default_rng(0)
    if options.data:
        prefix = next(Path(options.data).glob("test.*-*.*.idx")).name.removesuffix(".idx").split(".")
        source = prefix[1].split("-")[0]
        found = data_utils.load_indexed_dataset(f"{options.data}/test.{prefix[1]}.{source}", dictionary(WORDS[0]))
        return [found[int(i)].long() for i in draw.permutation(len(found))[:count]]
    lengths = np.clip(draw.lognormal(np.log(20), 0.5, count), 4, 80).astype(int)
    return [torch.tensor([*draw.integers(4, WORDS[0], length), 2]) for length in lengths]


class Contest:
    """The models that are compared, and translating with each."""

    def __init__(self, options: argparse.Namespace) -> None:
        dense = build_model(options)
        sites = unit_map(dense)
        self.models = {DENSE: dense}
        for name, keep in kept_heads(options).items():
            self.models[name] = copy.deepcopy(dense)
            remove_heads(self.models[name], HeadMask(sites, keep))
        self.parameters = {n: sum(p.numel() for p in model.parameters()) for n, model in self.models.items()}
        self.options = options
        self.sentences = read_sentences(options)
        self.generators: dict[str, SequenceGenerator] = {}
        for name, model in self.models.items():
            model.to(options.device)
            model.prepare_for_inference_(SimpleNamespace(generation=SimpleNamespace(no_beamable_mm=True)))
            self.generators[name] = SequenceGenerator(
                [model],
                model.decoder.dictionary,
                beam_size=options.beam,
                max_len_a=0,
                max_len_b=options.length,
                min_len=options.length,
            ).to(options.device)

    def batches(self, size: int) -> list[dict]:
        """``options.turns`` batches of ``size`` sentences that are about as long, as fairseq-generate makes them."""
        chosen = sorted(self.sentences[: size * self.options.turns], key=len)
        samples = [
            [{"id": i, "source": sentence, "target": None} for i, sentence in enumerate(chosen[start : start + size])]
            for start in range(0, len(chosen), size)
        ]
        found = [collate(sample, pad_idx=1, eos_idx=2, input_feeding=False)["net_input"] for sample in samples]
        return [{"net_input": {n: v.to(self.options.device) for n, v in inputs.items()}} for inputs in found]

    def translations(self, size: int) -> dict[str, Callable[[], Any]]:
        """Translating the batches, by model."""
        batches = self.batches(size)

        def action(name: str) -> Callable[[], int]:
            def translate() -> int:
                with torch.no_grad():
                    found = [self.generators[name].generate([self.models[name]], batch) for batch in batches]
                return sum(len(row[0]["tokens"]) for batch in found for row in batch)

            return translate

        return {name: action(name) for name in self.models}


def macs_of(action: Callable[[], Any]) -> int:
    """Multiply-accumulates of all matrix products."""

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    more = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        action()
    return counter.get_total_flops() // 2


def shares(action: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds, by the clock, by what they are spent on; under the profiler everything takes longer."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        start = time.perf_counter()
        action()
        total = 1000.0 * (time.perf_counter() - start)
    spent = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in trace.key_averages():
        name = event.key.removeprefix("aten::")
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), OTHER)
        spent[part] += event.self_cpu_time_total / 1000
    return {**spent, PYTHON: max(0.0, total - sum(spent.values()))}


def measure(options: argparse.Namespace) -> tuple[list[dict], Contest, dict[str, dict[str, float]]]:
    """A row per batch size and model, and profiles of the dense and the smallest model."""
    contest = Contest(options)
    watch = stopwatch(options.device)
    rows = []
    profiles: dict[str, dict[str, float]] = {}
    for size in tqdm(options.batches, unit="batch size", **bar_options()):
        actions = contest.translations(size)
        tokens = {name: action() for name, action in actions.items()}
        if len(set(tokens.values())) != 1:
            raise RuntimeError(f"the models did not make equally many tokens: {tokens}")
        macs = {name: macs_of(action) for name, action in actions.items()}
        times = fastest(actions, options.rounds, watch)
        for name, taken in times.items():
            bound, speed_up = macs[DENSE] / macs[name], times[DENSE] / taken
            rows.append(
                {
                    "batch": size,
                    "model": name,
                    "ms": round(taken, 2),
                    "tokens_per_second": round(1000 * tokens[name] / taken, 1),
                    "speed_up": round(speed_up, 4),
                    "mac_bound": round(bound, 4),
                    "fraction_of_bound": round(speed_up / bound, 4),
                }
            )
        if options.device == "cpu":
            profiles |= {f"{name}, batch {size}": shares(actions[name]) for name in (DENSE, list(actions)[-1])}
    return rows, contest, profiles


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the times depend on besides the batch size."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, 1 thread"
    data = Path(options.data).name if options.data else "random sentences"
    names = ("layers", "beam", "length", "turns", "rounds", "dtype")
    return {"device": device, "data": data, **{name: getattr(options, name) for name in names}}


def summary(rows: list[dict], contest: Contest, profiles: dict, options: argparse.Namespace) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "min_fraction_of_bound": min(row["fraction_of_bound"] for row in rows if row["model"] != DENSE),
        "parameters": contest.parameters,
        **settings(options),
        "rows": rows,
        "profile_ms": {name: {part: round(ms, 1) for part, ms in spent.items()} for name, spent in profiles.items()},
    }


def tables(rows: list[dict], contest: Contest, profiles: dict) -> list[tuple[tuple, list[tuple]]]:
    """Speeds, and what the time goes into."""
    header = ("batch", "keeps", "parameters", "tokens/s", "speed-up", "MAC bound", "of the bound")
    speeds = [
        (
            *(row["batch"], row["model"], f"{contest.parameters[row['model']]:,}", f"{row['tokens_per_second']:.0f}"),
            *(f"{row['speed_up']:.3f}", f"{row['mac_bound']:.3f}", f"{row['fraction_of_bound']:.1%}"),
        )
        for row in rows
    ]
    found = [(header, speeds)]
    if profiles:
        names = list(profiles)
        totals = {name: sum(spent.values()) for name, spent in profiles.items()}
        parts = [
            (part, *(f"{profiles[name][part]:.0f} ({profiles[name][part] / totals[name]:.0%})" for name in names))
            for part in profiles[names[0]]
        ]
        found.append((("ms under the profiler", *names), parts))
    return found


def write_results(rows: list[dict], contest: Contest, profiles: dict, options: argparse.Namespace) -> None:
    """``fairseq_inference.md`` and ``.json`` in the folder of results."""
    folder = Path(options.results)
    write_json(folder / "fairseq_inference.json", summary(rows, contest, profiles, options))
    title, about = __doc__.strip().split("\n\n", 1)
    used = settings(options)
    parts = [
        f"# {title.split(':')[0]}",
        about,
        f"Sentences: {used['data']}; {options.turns} batches a turn, {options.length} tokens and the end of sentence "
        f"each; {options.dtype}; {used['device']}, torch {torch.__version__}; rounds: {options.rounds}.",
        *(markdown_table(*table) for table in tables(rows, contest, profiles)),
    ]
    with atomic_path(folder / "fairseq_inference.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Print the tables, or with ``--json`` one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--results", nargs="?", const=RESULTS, metavar="FOLDER", help="write fairseq_inference.{md,json}"
    )
    parser.add_argument("--data", metavar="FOLDER", help="binarised corpus whose test set is translated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="sentences at a time (default: 1 16)")
    for name, (value, words) in {
        "rounds": (8, "turns of each model"),
        "turns": (2, "batches per turn"),
        "beam": (5, "hypotheses per sentence"),
        "length": (20, "tokens of every hypothesis"),
        "layers": (6, "layers of encoder and decoder"),
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{words} (default: %(default)s)")
    options = parser.parse_args()
    if min(options.rounds, options.turns, options.beam, options.length, options.layers, *options.batches) < 1:
        parser.error("--rounds, --turns, --beam, --length, --layers and --batches must be 1 or more")
    torch.set_num_threads(1)
    rows, contest, profiles = measure(options)
    if options.results:
        write_results(rows, contest, profiles, options)
    if options.json:
        print(json.dumps(summary(rows, contest, profiles, options)))
    else:
        print("\n\n".join(text_table(*table) for table in tables(rows, contest, profiles)))


if __name__ == "__main__":
    main()
