"""Language models as the command loads them: their dictionaries, and how long a text they take."""

import json
import shlex

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_plugin.exporting.example_batch import example
from head_pruning import HeadPruningError
from head_pruning.cli import main
from head_pruning.hosts import find_host

LANGUAGE = "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 \
    --decoder-ffn-embed-dim 24 --decoder-attention-heads 4 --decoder-input-dim 16 --decoder-output-dim 16 \
    --tokens-per-sample 150 --max-target-positions 150"
ADAPTIVE = (
    f"{LANGUAGE} --adaptive-input --adaptive-input-cutoff 6,12 --adaptive-input-factor 2 --criterion adaptive_loss \
    --adaptive-softmax-cutoff 6,12"
)
CHARACTERS = f"{LANGUAGE} --character-embeddings --character-filters '[(1,8)]' --character-embedding-dim 4 \
    --char-embedder-highway-layers 1"
MASKED = "--task masked_lm --arch roberta_base --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 \
    --encoder-attention-heads 4 --criterion masked_lm --tokens-per-sample 64 --max-positions 64"


@pytest.fixture
def untrained(tmp_path):
    """Writes an untrained model of a command line as fairseq-train does."""

    def write(line: str):
        (tmp_path / "dict.txt").write_text("".join(f"w{number} 1\n" for number in range(20)), encoding="utf-8")
        arguments = options.parse_args_and_arch(
            options.get_training_parser(), input_args=[str(tmp_path), *shlex.split(line)]
        )
        cfg = convert_namespace_to_omegaconf(arguments)
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
        stored = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        stored["model"] = stored["model"] if isinstance(stored["model"], dict) else vars(stored["model"])
        state = {
            "args": None,
            "cfg": stored,
            "model": model.state_dict(),
        }
        state["optimizer_history"] = [{"num_updates": 0, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}]
        state["extra_state"] = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}
        torch.save(state, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return write


def _json(capsys, *arguments) -> dict:
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_language_model_with_adaptive_input(untrained, capsys):
    path = untrained(ADAPTIVE)
    assert not any(name.endswith("embed_tokens.weight") for name in torch.load(path)["model"])
    loaded = find_host(path).load(path, None)
    assert len(loaded.model.decoder.dictionary) == 24
    assert _json(capsys, "inspect", path)["heads_total"] == 4
    assert _json(capsys, "benchmark", path, "--batch", 2, "--rounds", 1)["length"] == 128


def test_a_model_whose_dictionary_nothing_tells_is_refused_with_one_sentence(untrained):
    path = untrained(CHARACTERS)
    with pytest.raises(HeadPruningError, match="has no decoder.embed_tokens.weight, which tells how many words"):
        find_host(path).load(path, None)


def test_without_a_length_the_text_is_as_long_as_the_model_takes(untrained, capsys):
    path = untrained(MASKED)
    assert _json(capsys, "inspect", path)["length"] == 64
    assert _json(capsys, "inspect", path, "--length", 63)["length"] == 63
    assert _json(capsys, "benchmark", path, "--batch", 2, "--rounds", 1)["length"] == 64
    for command in ("inspect", "benchmark"):
        with pytest.raises(SystemExit, match="^error: The model has 64 positions; --length 65 is more, give less.$"):
            main([command, str(path), "--length", "65"])


def test_source_and_target_have_limits_of_their_own():
    from tests.fairseq.modules.test_surgery import SMALL, translator

    model = translator(**SMALL).eval()
    model.encoder.max_source_positions, model.decoder.max_target_positions = 9, 7
    with torch.no_grad():
        assert model(**example(model, 1, 9, 7))[0].shape[1] == 7
    for lengths, limit in (((10, 7), 9), ((9, 8), 7), ((8,), 7)):
        with pytest.raises(HeadPruningError, match=f"has {limit} positions"):
            example(model, 1, *lengths)
