"""What 8 bits cost and give: ``python -m benchmarks.int8 MODEL DATA --task_name TASK --work DIR [--results]``.

MODEL is a folder with a classifier that was fine-tuned on a GLUE task, DATA the task's folder. Its encoder's matrices
lose their smallest weights, 60 % of each; then two runs of as many updates train it with these zeros locked,
in floats and with linear layers of 8 bits. Of both are told: the accuracy on the whole validation set, the bytes of
the files that were written, and of the 8-bit one how many of its decisions onnxruntime shares with the fake-quantized
model in torch, and how much faster it is than the float model there, both in turns in processor time of one thread. A
run that is there is not run again, and ``--results`` keeps what it holds of other tasks.

``python -m benchmarks.int8 --arithmetic`` prints what becomes of BERT-large's encoder at 10 % density.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from head_pruning.files import atomic_path, read_json, write_json
from head_pruning.inference.runtimes import onnx_pass, onnx_session
from head_pruning.inference.timing import fastest, stopwatch
from head_pruning.quantization.engine.files import read_ranges
from head_pruning.quantization.engine.qdq import to_qdq
from head_pruning.report.tables import markdown_table
from hf_plugin.glue.reading import read_split
from hf_plugin.glue.tasks import find_task
from hf_plugin.host import exports, load_model

RESULTS = Path(__file__).resolve().parent / "results"
SPARSITY = 0.6
TRAINING = (
    "--do_train --do_eval --max_train_samples 1000 --num_train_epochs 1 "
    "--per_device_train_batch_size 16 --per_device_eval_batch_size 64 --learning_rate 5e-5 --save_strategy no "
    "--report_to none --seed 1 --pruner_name lock"
)
RUNS = {"lock": "", "int8": "--do_quantization --input_ranges average --not_to_quantize classifier"}


def prune(model: Path, target: Path, share: float) -> None:
    """A copy of a model's folder in which the smallest weights of each of the encoder's matrices are zero."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        if ".encoder." in name and name.endswith("weight") and tensor.dim() == 2:
            limit = tensor.abs().flatten().kthvalue(int(share * tensor.numel())).values
            tensor[tensor.abs() <= limit] = 0.0
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def train(name: str, options: argparse.Namespace) -> float:
    """The accuracy of a run, which is run unless it was."""
    work, out = options.work, options.work / name
    if not (out / "eval_results.json").is_file():
        words = [*TRAINING.split(), *RUNS[name].split(), "--task_name", options.task_name, "--data_dir", options.data]
        words += ["--max_seq_length", options.max_seq_length, "--model_name_or_path", work / "sparse"]
        command = [sys.executable, "-m", "hf_plugin.run_glue", *words, "--output_dir", out]
        subprocess.run([str(word) for word in command], check=True)
    return read_json(out / "eval_results.json")["eval_accuracy"]


def write_files(model: Path, work: Path) -> dict[str, int]:
    """Bytes of all forms of the model, each written."""
    files = {"float, dense": model / "model.safetensors", "float, with zeros": work / "lock" / "model.safetensors"}
    files["int8"] = work / "int8" / "model.safetensors"
    for source, kind, name, suffix in (
        ("lock", "compressed", "float, without its zeros (bitmask)", "compressed.safetensors"),
        ("int8", "compressed", "int8, without its zeros (bitmask)", "compressed.safetensors"),
        ("lock", "onnx", "ONNX, float", "onnx"),
        ("int8", "onnx-int8", "ONNX, int8", "onnx"),
    ):
        files[name] = work / f"{source}.{suffix}"
        if not files[name].is_file():
            print(exports[kind](work / source, files[name], None), flush=True)
    return {name: file.stat().st_size for name, file in files.items()}


def batches(options: argparse.Namespace, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
    """The validation set, the shortest rows first."""
    tokenizer = AutoTokenizer.from_pretrained(options.work / "int8")
    rows = read_split(options.task, options.task.validation[0], options.data).to_list()
    rows.sort(key=lambda row: len(row["sentence1"] + row.get("sentence2", "")))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [[row[name] for row in part] for name in ("sentence1", "sentence2") if name in part[0]]
        encoded = tokenizer(
            *texts, padding=True, truncation=True, max_length=options.max_seq_length, return_tensors="pt"
        )
        yield {**encoded, "labels": torch.tensor([row["label"] for row in part])}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Decisions of onnxruntime against those of the fake-quantized model, whose inputs have the averaged ranges."""
    work = options.work
    model, ranges = load_model(work / "int8"), read_ranges(work / "int8")
    assert ranges is not None
    to_qdq(model, ranges["inputs"])
    session, plain = (onnx_session(work / "int8.onnx", exact=exact) for exact in (True, False))
    same = same_by_default = right = right_in_torch = number = 0
    for batch in batches(options):
        labels = batch.pop("labels")
        with torch.no_grad():
            expected = model(**batch).logits.argmax(-1)
        found = torch.from_numpy(onnx_pass(session, batch)()[0]).argmax(-1)
        by_default = torch.from_numpy(onnx_pass(plain, batch)()[0]).argmax(-1)
        same, number = same + int((found == expected).sum()), number + len(labels)
        same_by_default += int((by_default == expected).sum())
        right, right_in_torch = right + int((found == labels).sum()), right_in_torch + int((expected == labels).sum())
    counts = {"same_decisions": same, "same_by_default": same_by_default}
    return {"rows": number, **counts, "right": right, "right_in_torch": right_in_torch}


def latency(work: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of one sequence of 128 tokens, and of eight of 32."""
    found: dict[str, float] = {}
    for rows, length in ((1, 128), (8, 32)):
        ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        passes = {name: onnx_pass(onnx_session(work / f"{name}.onnx"), inputs) for name in RUNS}
        times = fastest(passes, rounds, stopwatch("cpu"))
        found |= {f"{rows}x{length} {name}": round(value, 2) for name, value in times.items()}
        found[f"{rows}x{length} ratio"] = round(times["lock"] / times["int8"], 3)
    return found


def arithmetic(config: Optional[BertConfig] = None, density: float = 0.1) -> dict[str, float]:
    """Float32 bytes of an encoder (default: BERT-large's) over those of other forms.

    ``values``: its matrices as the int8 values that are not zero, and no word of where they are; ``with bitmask``: and
    one bit for each weight; ``whole encoder``: and a float32 scale per output, biases and norms, as floats;
    ``whole model``: and embeddings and pooler, as floats.
    """
    config = config or BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = BertModel(config)
    linears = [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]
    weights, outputs = sum(m.weight.numel() for m in linears), sum(m.out_features for m in linears)
    encoder, whole = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model))
    values = density * weights
    masked = values + weights / 8
    rest = masked + 4 * outputs
    return {
        "values": 4 * weights / values,
        "with bitmask": 4 * weights / masked,
        "whole encoder": 4 * encoder / (rest + 4 * (encoder - weights)),
        "whole model": 4 * whole / (rest + 4 * (whole - weights)),
    }


def document(found: dict[str, dict[str, Any]]) -> str:
    """The results of all tasks as Markdown."""
    return "\n".join(["# 8 bits", "", *(line for task, one in found.items() for line in _section(task, one))])


def _section(task: str, found: dict[str, Any]) -> list[str]:
    sizes, decisions, times = found["bytes"], found["decisions"], found["latency"]
    first = next(iter(sizes.values()))
    size_rows = [(name, f"{size:,}", f"{first / size:.2f}") for name, size in sizes.items()]
    right = {"onnxruntime": decisions["right"], "torch": decisions["right_in_torch"]}
    accuracy = [(name, f"{value:.4f}") for name, value in found["accuracy"].items()]
    accuracy += [(f"int8 in {name}", f"{count / decisions['rows']:.4f}") for name, count in right.items()]
    return [
        f"## {task}",
        "",
        f"`{found['command']}`",
        "",
        "A fine-tuned MiniLM of 6 layers, pruned, then trained on 1000 rows, one seed. Locked zeros: "
        f"{SPARSITY:.0%} of the encoder's matrices.",
        "",
        markdown_table((f"{task}, validation", "accuracy"), accuracy),
        "",
        f"onnxruntime decides as the fake-quantized model in torch for {decisions['same_decisions']} of "
        f"{decisions['rows']} rows ({decisions['same_decisions'] / decisions['rows']:.2%}) with its "
        f"option session.x64quantprecision, and for {decisions['same_by_default']} without it: on processors without "
        "VNNI instructions its products of uint8 and int8 saturate then. The times are with it.",
        "",
        markdown_table(("ms of one thread", "float", "int8", "times as fast"), [
            (shape, times[f"{shape} lock"], times[f"{shape} int8"], times[f"{shape} ratio"])
            for shape in ("1x128", "8x32")
        ]),
        "",
        markdown_table(("file", "bytes", "times as small"), size_rows),
        "",
    ]  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder of a fine-tuned classifier")
    parser.add_argument("data", nargs="?", type=Path, help="folder of its task")
    parser.add_argument("--task_name", default="SST-2", help="GLUE task whose score is an accuracy (default: SST-2)")
    parser.add_argument("--max_seq_length", type=int, default=64, help="longest row in tokens (default: 64)")
    parser.add_argument("--work", type=Path, default=Path("int8"), help="folder for runs and files")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each pass, at least")
    parser.add_argument("--results", action="store_true", help=f"write {RESULTS.name}/int8.md and .json")
    parser.add_argument("--arithmetic", action="store_true", help="print BERT-large's ratios, and no more")
    options = parser.parse_args()
    if options.arithmetic:
        print(markdown_table(("BERT-large, 90 % zeros, int8", "times as small"), list(arithmetic().items())))
        return
    if options.data is None:
        parser.error("give MODEL and DATA")
    options.task = find_task(options.task_name)
    if "accuracy" not in options.task.metrics:
        parser.error(f"{options.task.folder} has no accuracy; give --task_name of another task")
    torch.set_num_threads(1)
    if not (options.work / "sparse").is_dir():
        prune(options.model, options.work / "sparse", SPARSITY)
    accuracy = {name: train(name, options) for name in RUNS}
    task = options.task.folder
    words = f"--task_name {task} --max_seq_length {options.max_seq_length}"
    found: dict[str, Any] = {
        "command": f"python -m benchmarks.int8 MODEL {task} {words} --results",
        "accuracy": accuracy,
        "bytes": write_files(options.model, options.work),
        "decisions": compare(options),
        "latency": latency(options.work, options.rounds),
    }
    print(document({task: found}))
    if options.results:
        file = RESULTS / "int8.json"
        found = {**(read_json(file) if file.is_file() else {}), task: found}
        write_json(file, found)
        with atomic_path(RESULTS / "int8.md") as temporary:
            temporary.write_text(document(found), encoding="utf-8")


if __name__ == "__main__":
    main()
