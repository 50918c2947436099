"""What the plugin for transformers reads."""

import json
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from safetensors.torch import save_file

import hf_plugin
from head_pruning.hosts import find_host
from head_pruning.surgery.remaining import heads_kept_by, recipe_of, sites_left
from hf_plugin import host, load_pruned_v4, prune_heads
from hf_plugin.command_line.arguments import parse
from hf_plugin.command_line.michel import parse_michel
from hf_plugin.command_line.scripts import SCRIPTS
from hf_plugin.compact.quantizer import remove_heads
from hf_plugin.scripts.settings import check_same_settings
from hf_plugin.training.callback import HeadPruningCallback
from hf_plugin.training.checkpoints import check_resumable, last_checkpoint, read_checkpoint, read_tensor_state
from hf_plugin.training.optimizers import check_resumed
from hf_plugin.training.session import open_session
from tests.hf.before_rooms import make
from tests.hf.tiny import tiny_bert

from .damage import as_json, damaged_bytes, damaged_json, damaged_safetensors, damaged_value

OLD = Path(make.__file__).parent
Readings = Iterator[Callable[[], Any]]


def recipes(folder: Path, rng: random.Random) -> Readings:
    """Recipes of removed heads, applied to a model and looked at without one."""
    model = tiny_bert()
    prune_heads(model, {0: [0, 1, 2, 3], 1: [1]})
    good = json.loads(json.dumps(recipe_of(model)))
    file = folder / "config.json"
    with torch.device("meta"):
        tiny_bert()

    def read(recipe: Any) -> None:
        with torch.device("meta"):
            twin = tiny_bert()
        remove_heads(twin, recipe)
        told = host.recipe(folder)
        sites_left(told), heads_kept_by(told)

    while True:
        recipe = damaged_value(rng, good) if rng.random() < 0.95 else good
        told = {"quant_method": "head_pruning", "recipe": recipe}
        file.write_text(as_json({"model_type": "bert", "quantization_config": told}))
        yield lambda recipe=recipe: read(recipe)


def model_folders(folder: Path, rng: random.Random) -> Readings:
    """Folders of pruned models: configuration, weights, masks and report."""
    place = folder / "model"
    sources = [OLD / "compact", OLD / "masked"]
    names = ("config.json", "model.safetensors", "masks.safetensors", "pruning.json")

    def read() -> None:
        find_host(place).load(place, None)

    while True:
        source, name = rng.choice(sources), rng.choice(names)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for each in names:
            shutil.copy(source / each, place)
        data = (place / name).read_bytes()
        if name == "config.json":
            (place / name).write_text(_config(rng, data.decode()), encoding="latin-1")
        elif name.endswith("json"):
            (place / name).write_text(damaged_json(rng, data.decode()), encoding="latin-1")
        else:
            (place / name).write_bytes(damaged_safetensors(rng, data))
        yield read


def _config(rng: random.Random, text: str) -> str:
    """Damaged in what is ours, or in its class; the sizes of a model are transformers' own."""
    config = json.loads(text)
    name = rng.choice(["architectures", "quantization_config", "model_type", "auto_map", "pruned_heads"])
    if rng.random() < 0.3:
        return damaged_bytes(rng, text.encode()).decode("latin-1")
    config[name] = damaged_value(rng, config.get(name, {"0": [1]}))
    return as_json(config)


def pickles_of_models(folder: Path, rng: random.Random) -> Readings:
    """pytorch_model.bin, damaged or with code."""
    place = folder / "model"
    place.mkdir()
    model = tiny_bert()
    model.config.save_pretrained(place)
    file = place / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    kinds = [file.read_bytes(), file.read_bytes()]
    torch.save({"a": Code()}, file)
    kinds.append(file.read_bytes())
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    kinds.append(file.read_bytes())
    for _ in iter(int, 1):
        data = rng.choice(kinds)
        file.write_bytes(data if data is kinds[2] else damaged_bytes(rng, data))
        yield lambda: host.load_model(place)


class Code:
    """Pickled, it calls ``os.system``."""

    def __reduce__(self) -> tuple:
        import os

        return os.system, ("true",)


def trainer_states(folder: Path, rng: random.Random) -> Readings:
    """trainer_state.json, from which a session and a run's settings are taken."""
    model = tiny_bert()
    session = open_session(model, _pruners())
    session.total_steps = 12
    callback = HeadPruningCallback(session)
    place = folder / "checkpoint-6"
    shutil.copytree(OLD / "checkpoint-6", place)
    state = json.loads((place / "trainer_state.json").read_text())
    state["stateful_callbacks"]["RunSettings"] = {"args": {}, "attributes": {"settings": {"seed": 1}}}
    text = json.dumps(state)

    def read() -> None:
        found = read_checkpoint(place)
        check_same_settings(found, {"seed": 1})
        callback.restore(found)
        callback.state(), session.metrics()

    while True:
        (place / "trainer_state.json").write_text(damaged_json(rng, text), encoding="latin-1")
        yield read


def _pruners() -> list:
    run = {"joint_pruning": True, "annealing": True, "cooldown_steps": 0.8}
    weights = {"final_threshold": 0.4, "warmup_steps": 2, "deltaT": 2, "initial_warmup": 1, "final_warmup": 1}
    return [hf_plugin.pruner("dsp", num_of_heads=4, **run), hf_plugin.pruner("platon", **weights)]


def checkpoints(folder: Path, rng: random.Random) -> Readings:
    """The files of a Trainer's checkpoint."""
    place = folder / "checkpoint-6"
    shutil.copytree(OLD / "checkpoint-6", place)
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    torch.save({"last_epoch": Code()}, place / "scheduler.pt")
    code = (place / "scheduler.pt").read_bytes()

    def read() -> None:
        found = check_resumable(place)
        check_resumed("adamw", found.folder)
        read_tensor_state(place, found.step)
        last_checkpoint(folder)

    while True:
        for name, data in whole.items():
            (place / name).write_bytes(data)
        name = rng.choice(sorted(whole))
        if name.endswith(".safetensors"):
            bad = damaged_safetensors(rng, whole[name])
        elif name.endswith(".json"):
            bad = damaged_json(rng, whole[name].decode()).encode("latin-1")
        else:
            bad = code if rng.random() < 0.1 else damaged_bytes(rng, whole[name])
        (place / name).write_bytes(bad)
        yield read


def old_configurations(folder: Path, rng: random.Random) -> Readings:
    """The pruned_heads of transformers 4."""
    model = tiny_bert()
    model.config.save_pretrained(folder)
    prune_heads(model, {0: [1, 2], 1: [0]})
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())

    while True:
        pruned: Any = {"0": [1, 2], "1": [0]}
        pruned = damaged_value(rng, pruned) if rng.random() < 0.9 else pruned
        (folder / "config.json").write_text(
            as_json({**config, "architectures": [type(model).__name__], "pruned_heads": pruned})
        )
        yield lambda: load_pruned_v4(folder)


WORDS = """
--model_name_or_path bert --task_name mrpc --output_dir out --do_train --num_of_heads 12 --pruner dsp platon
--final_threshold 0.1 --pruning_lr 0.5 --joint_pruning --annealing --cooldown_steps 100 --seed 1 -1 0 1e400 nan inf
True false --no_cuda --fp16 --max_steps 5 --learning_rate --l0_penalty 0.1 --use_ste --warmup_steps 0.5
--target_sparsity
--weights_include ( --weight_selection 2:4 64:1x1 --lr_scheduler_kwargs {"a":1} [[
""".split()
WORDS += ["", "--", "-x", "--=", "x" * 5000, "\x00", "--num_of_heads=", "--per_gpu_train_batch_size", "--mask_policy"]
LINE = "--model_name_or_path bert --task_name mrpc --data_dir . --output_dir".split()


def flags(folder: Path, rng: random.Random) -> Readings:
    """Command lines of the scripts, and files of arguments."""
    files = [folder / "arguments.json", folder / "arguments.yaml"]
    files[1].write_text("x: 1")
    base = {"model_name_or_path": "bert", "task_name": "mrpc", "data_dir": ".", "output_dir": str(folder / "out")}
    base |= {"num_of_heads": 3, "joint_pruning": True, "label_names": ["a"], "lr_scheduler_kwargs": {"a": 1}}
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
    )
    scripts = (*SCRIPTS, "michel")

    def read(words: list[str], script: str) -> None:
        (parse_michel(words) if script == "michel" else parse(words, script))

    while True:
        words = [*LINE, str(folder / "out"), *rng.choices(WORDS, k=rng.randrange(6))] if rng.random() < 0.7 else []
        words = words or rng.choices(WORDS, k=rng.randrange(12))
        if rng.random() < 0.4:
            text = damaged_json(rng, json.dumps(base))
            if rng.random() < 0.1:
                text = bomb + "label_names: *i\nmodel_name_or_path: *i\n"
            for file in files:
                file.write_text(text, encoding="latin-1", errors="replace")
            words = [str(rng.choice(files)), *(words if rng.random() < 0.3 else [])]
        script = rng.choice(scripts)
        yield lambda words=words, script=script: read(words, script)


HF: dict[str, Any] = {
    "flags of transformers' scripts": flags,
    "recipes of removed heads": recipes,
    "trainer_state.json": trainer_states,
    "checkpoints of a Trainer": checkpoints,
    "folders of models": model_folders,
    "pickled models": pickles_of_models,
    "pruned_heads of transformers 4": old_configurations,
}
