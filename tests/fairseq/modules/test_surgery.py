"""Heads that are really gone: equal outputs, smaller tensors, and every command of fairseq goes on working."""

import copy
import re
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import transformer_iwslt_de_en
from fairseq.modules import MultiheadAttention
from fairseq.sequence_generator import SequenceGenerator

from fairseq_plugin import remove_heads
from fairseq_plugin.checkpoints.keeper import StateKeeper
from fairseq_plugin.exporting.checkpoints import export_compact, export_masked
from fairseq_plugin.host import load
from fairseq_plugin.modules.surgery import CompactAttention, NoHeads, decode
from fairseq_plugin.modules.unit_map import unit_map
from head_pruning import HeadMask, HeadPruningError, surgery
from head_pruning.masks import full_mask, mask_without
from head_pruning.surgery.remaining import recipe_of
from tests.fairseq.command_lines import DSP, decoded, same_decoding
from tests.fairseq.exporting.test_export import plain_user_dir
from tests.fairseq.files import mask_beside, read, same_training_state, weights_of
from tests.fairseq.modules.test_architectures import models, one_dictionary, source_and_target  # noqa: F401  (a fixture)
from tests.fairseq.runner import ROOT, Runner
from tests.fairseq.training.test_two_ranks import run_two


def words(count: int) -> Dictionary:
    dictionary = Dictionary()
    for number in range(count - dictionary.nspecial):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def translator(source=30, target=26, **change) -> TransformerModel:
    """The architecture of the IWSLT recipe, small or as it is; its biases are not zero."""
    arguments = Namespace(share_decoder_input_output_embed=True, dropout=0.0, **change)
    transformer_iwslt_de_en(arguments)
    arguments.max_source_positions = arguments.max_target_positions = 64
    torch.manual_seed(0)
    task = SimpleNamespace(source_dictionary=words(source), target_dictionary=words(target))
    return with_biases(TransformerModel.build_model(arguments, task))


SMALL = dict(
    encoder_embed_dim=16, decoder_embed_dim=16, encoder_ffn_embed_dim=24, decoder_ffn_embed_dim=24, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip


def with_biases(model):
    """Attention that matters: fairseq starts with biases of 0 and small projections."""
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            torch.nn.init.normal_(module.out_proj.weight, std=0.3)
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                torch.nn.init.normal_(projection.bias, std=0.3)
    return model


def uneven_mask(model, seed=0) -> HeadMask:
    """Half of the heads; the first site keeps all, the last and one more keep none."""
    sites = unit_map(model)
    keep = np.random.default_rng(seed).random(sites.num_heads) < 0.5
    rows = sites.rows()
    keep[rows[0]] = True
    keep[rows[-1]] = keep[rows[len(rows) // 2]] = False
    keep[rows[1][0]] = True
    keep[rows[1][1:]] = False
    return HeadMask(sites, keep)


def masked_and_compact(model, mask):
    """A copy with gates, a copy with fewer heads."""
    masked, compact = copy.deepcopy(model), copy.deepcopy(model)
    StateKeeper(masked).hold(mask)
    remove_heads(compact, mask)
    return masked, compact


def outputs(value) -> list:
    """All tensors of a nest of outputs, attention weights too: they are averages over the heads that stay."""
    if isinstance(value, torch.Tensor):
        return [value.double()] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [tensor for item in value for tensor in outputs(item)] if isinstance(value, (list, tuple)) else []


def run(model, inputs) -> torch.Tensor:
    torch.manual_seed(0)
    np.random.seed(0)
    with torch.no_grad():
        return torch.cat([tensor.reshape(-1) for tensor in outputs(model(*inputs))])


@pytest.mark.parametrize(
    "build",
    models("transformer_align", "bart_base", "cmlm_transformer", "roberta_base", "s2t_transformer_s", "hubert"),
)
def test_compact_equals_masked(build, one_dictionary):  # noqa: F811
    torch.manual_seed(1)
    model, inputs = build(one_dictionary)
    dense = run(with_biases(model).eval(), inputs)
    mask = uneven_mask(model)
    compact = copy.deepcopy(model)
    surgery.remove_heads(compact, unit_map(compact), mask)
    StateKeeper(model).hold(mask)
    expected = run(model, inputs)
    torch.testing.assert_close(run(compact, inputs), expected, atol=1e-5, rtol=0)
    assert (dense - expected).abs().max() > 1e-3


@pytest.fixture(scope="module")
def pair():
    """A small translator with the gates of a mask, and cut to it."""
    model = translator(**SMALL).eval()
    return masked_and_compact(model, uneven_mask(model))


def test_a_compact_model_runs_no_hooks_and_computes_with_what_is_left(pair):
    _, compact = pair
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in compact.modules())
    left = {name: module for name, module in compact.named_modules() if isinstance(module, MultiheadAttention)}
    kept = {name: len(site["kept"]) for name, site in recipe_of(compact)["sites"].items()}
    assert {left[name].num_heads for name in kept} >= {0, 1}
    for name, heads in kept.items():
        module = left[name]
        assert type(module) is (CompactAttention if heads else NoHeads) and module.num_heads == heads
        assert sum(parameter.numel() for parameter in module.parameters()) == heads * (4 * 16 + 3) * 4 + 16


def test_a_training_step_is_equal(pair):
    masked, compact = (copy.deepcopy(model).train() for model in pair)
    source, lengths, target = source_and_target()
    for model in (masked, compact):
        logits = model(source, lengths, target)[0]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    stepped = translator(**SMALL)
    stepped.load_state_dict(masked.state_dict())
    remove_heads(stepped, uneven_mask(stepped))
    expected = dict(stepped.named_parameters())
    for name, parameter in compact.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=0)


def beam_search(model, **options):
    generator = SequenceGenerator([model], model.decoder.dictionary, beam_size=4, max_len_b=12, **options)
    source, lengths, _ = source_and_target()
    with torch.no_grad():
        return generator.generate([model], {"net_input": {"src_tokens": source, "src_lengths": lengths}})


@pytest.mark.parametrize("options", [{}, {"len_penalty": 0.5, "min_len": 4}], ids=["plain", "length penalty"])
def test_beam_search_is_equal(pair, options):
    found = [beam_search(model, **options) for model in pair]
    for masked, compact in zip(*found):
        assert len(masked) == len(compact) == 4
        for one, other in zip(masked, compact):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"], atol=1e-5, rtol=0)
            torch.testing.assert_close(other["attention"].sum(0), torch.ones(len(other["tokens"])))


def test_without_heads_attention_weights_are_uniform_over_the_words():
    model = translator(**SMALL).eval()
    sites = unit_map(model)
    remove_heads(model, HeadMask(sites, np.zeros(sites.num_heads, dtype=bool)))
    source, lengths, target = source_and_target()
    with torch.no_grad():
        logits, extra = model(source, lengths, target)
        again = model(torch.full_like(source, 9), lengths, target)[0]
    assert torch.equal(logits, again)  # no attention: the source does not matter
    expected = source.ne(1) / source.ne(1).sum(1, keepdim=True)
    torch.testing.assert_close(extra["attn"][0], expected[:, None, :].expand(-1, target.shape[1], -1))
    assert all(hypothesis["attention"].isfinite().all() for row in beam_search(model) for hypothesis in row)


def test_heads_are_removed_again(pair):
    masked, _ = pair
    model = translator(**SMALL).eval()
    for encoder, decoder in (([1], [0, 3]), ([0, 2], [0, 1])):
        gone = {"encoder.layers.0.self_attn": encoder, "decoder.layers.1.self_attn": decoder}
        remove_heads(model, mask_without(unit_map(model), gone))
    assert recipe_of(model)["sites"]["encoder.layers.0.self_attn"]["kept"] == [2]
    assert "decoder.layers.1.self_attn" not in unit_map(model).by_site(np.zeros(unit_map(model).num_heads))
    at_once = translator(**SMALL).eval()
    gone = {"encoder.layers.0.self_attn": [0, 1, 3], "decoder.layers.1.self_attn": [0, 1, 2, 3]}
    remove_heads(at_once, mask_without(unit_map(at_once), gone))
    inputs = source_and_target()
    assert torch.equal(run(model, inputs), run(at_once, inputs))


def test_a_state_dict_goes_into_new_models_and_not_back(pair):
    _, compact = pair
    state = compact.state_dict()
    inputs = source_and_target()
    fresh = translator(**SMALL).eval()
    fresh.load_state_dict(state)
    assert torch.equal(run(fresh, inputs), run(compact, inputs))
    fresh.load_state_dict(state)  # a second time, now that it has the shape
    with pytest.raises(HeadPruningError, match="fewer heads"):
        fresh.load_state_dict(translator(**SMALL).state_dict())
    with pytest.raises(HeadPruningError, match="another architecture"):
        translator(**{**SMALL, "decoder_layers": 1}).load_state_dict(state)
    state["head_pruning.removed.version1"] = torch.zeros(9, dtype=torch.int32)
    with pytest.raises(HeadPruningError, match="damaged"):
        translator(**SMALL).load_state_dict(state)


def heads_and_units(model, seed=0) -> HeadMask:
    """Half of the units, one block without any, and the heads of :func:`uneven_mask`."""
    sites = unit_map(model).numbering("both")
    keep = np.random.default_rng(seed).random(sites.num_heads) < 0.5
    keep[sites.rows()[-1]] = False
    keep[: unit_map(model).num_heads] = uneven_mask(model).keep
    return HeadMask(sites, keep)


def test_feed_forward_units_go_with_heads_and_come_with_the_state_dict(caplog):
    model = translator(**SMALL).eval()
    mask = heads_and_units(model)
    masked, compact = masked_and_compact(model, mask)
    inputs = source_and_target()
    expected = run(masked, inputs)
    torch.testing.assert_close(run(compact, inputs), expected, atol=1e-5, rtol=0)
    assert (run(model, inputs) - expected).abs().max() > 1e-3
    fresh = translator(**SMALL).eval()
    fresh.load_state_dict(compact.state_dict())
    assert torch.equal(run(fresh, inputs), run(compact, inputs))
    assert [site.width for site in unit_map(fresh).feed_forward] == [
        sum(mask.by_site()[site.name]) for site in unit_map(model).feed_forward[:-1]
    ]
    assert fresh.decoder.layers[0].fc1.out_features == fresh.decoder.layers[0].fc2.in_features < 24
    for one, other in zip(*(beam_search(each) for each in (masked, fresh))):
        assert [each["tokens"].tolist() for each in one] == [each["tokens"].tolist() for each in other]
    again = unit_map(fresh).numbering("ffn").told()
    assert not caplog.records  # nothing is missing of a block that has no units any more
    remove_heads(fresh, HeadMask(again, np.arange(again.num_heads) % 2 == 0))
    assert recipe_of(fresh)["sites"].keys() == recipe_of(compact)["sites"].keys()


def test_a_norm_over_units_is_refused():
    model = translator(**SMALL, scale_fc=True)
    with pytest.raises(HeadPruningError, match="ffn_layernorm normalizes"):
        remove_heads(model, heads_and_units(model))


def test_models_that_cannot_be_cut():
    model = translator(**SMALL)
    with pytest.raises(HeadPruningError, match="no head mask"):
        remove_heads(model)
    with pytest.raises(HeadPruningError, match="another architecture"):
        remove_heads(model, uneven_mask(translator(**{**SMALL, "encoder_layers": 1})))
    model.encoder.layers[1].self_attn.use_xformers = True
    with pytest.raises(HeadPruningError, match="xFormers"):
        remove_heads(model, uneven_mask(model))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in translator(**SMALL).parameters())


@pytest.mark.parametrize("kept, parameters", [(72, 39469056), (36, 30018048), (12, 23717376), (4, 21617152)])
def test_size_of_the_iwslt_model(kept, parameters):
    with torch.device("meta"):
        model = translator(8848, 6632)
    keep = np.zeros(72, dtype=bool)
    keep[np.random.default_rng(kept).permutation(72)[:kept]] = True
    remove_heads(model, HeadMask(unit_map(model), keep))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# -- through fairseq's commands --------------------------------------------------------------------------------------


def export(*arguments) -> str:
    """What ``head-pruning export`` prints."""
    code = "import sys; from head_pruning.cli import main; sys.argv[0] = 'head-pruning'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(translation, tmp_path_factory):
    """Folders of two pruning runs, a checkpoint each, and its compact export."""
    folder = tmp_path_factory.mktemp("runs")
    runner = Runner(folder)
    found = []
    for name, seed in (("first", 1), ("second", 5)):
        line = translation.train(folder / name, DSP, f"--seed {seed} --store-ema --ema-decay 0.5 --ema-fp32")
        runner.run("train", line)
        checkpoint, compact = folder / name / "checkpoint_last.pt", folder / f"{name}.pt"
        export_compact(checkpoint, compact)
        found.append((checkpoint, compact))
    return found


def sentences(runner, line) -> dict:
    return decoded(runner.run("generate", line).out)


def same_attention_shapes(checkpoint, mask):
    weights = read(checkpoint)["model"]
    for site, where in mask.unit_map.slices():
        width = int(mask.keep[where].sum()) * site.head_dim
        names = [f"{name}.weight" for name in site.projections]
        assert [weights[name].shape[0] for name in names if name in weights] == ([width] * 3 if width else [])


@pytest.mark.slow
def test_the_command_exports_a_compact_checkpoint(runner, runs, tmp_path):
    checkpoint, _ = runs[0]
    output = export(checkpoint, tmp_path / "compact.pt", "--to", "compact")
    assert "4 of 24 heads" in output
    state, dense = read(tmp_path / "compact.pt"), read(checkpoint)
    names = {name for name in state["model"] if name.startswith("head_pruning.")}
    assert names == {"head_pruning.removed.version1"} and "last_optimizer_state" not in state
    assert state["cfg"]["task"]["_name"] == "translation"
    same_attention_shapes(tmp_path / "compact.pt", mask_beside(checkpoint))
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(state["model"][name], dense["model"][name])
    averages = state["extra_state"]
    for name in set(state["model"]) - names:
        shape = state["model"][name].shape
        assert (
            averages["ema"][name].shape == averages["ema_fp32_params"].get(name, state["model"][name]).shape == shape
        )
    counts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of ([\d,]+) parameters", output)[0]]
    models = [load(path).model for path in (tmp_path / "compact.pt", checkpoint)]
    assert counts == [sum(parameter.numel() for parameter in model.parameters()) for model in models]


@pytest.mark.slow
def test_generate_and_its_options(runner, translation, runs):
    (masked, compact), _ = runs
    for options in ("--beam 5 --lenpen 0.6 --nbest 2", "--print-alignment", "--sampling --nbest 2 --seed 3"):
        ours, theirs = (sentences(runner, translation.generate(path, options)) for path in (compact, masked))
        same_decoding(ours, theirs)


@pytest.mark.slow
def test_ensembles(runner, translation, runs, tmp_path):
    (masked, compact), (other_masked, other_compact) = runs
    dense = tmp_path / "dense.pt"
    state = read(masked)
    state["model"] = weights_of(masked)
    torch.save(state, dense)
    for ours, theirs in (
        ((compact, other_compact), (masked, other_masked)),
        ((dense, compact, other_masked), (dense, masked, other_masked)),
    ):
        pair = [sentences(runner, translation.generate(":".join(map(str, paths)))) for paths in (ours, theirs)]
        same_decoding(*pair)


@pytest.mark.slow
def test_a_checkpoint_is_exported_without_units(runner, translation, runs, tmp_path):
    checkpoint, _ = runs[0]
    model = load(checkpoint).model
    sites = unit_map(model).numbering("both")
    mask = mask_beside(checkpoint)
    keep = np.r_[mask.keep, np.random.default_rng(0).random(sites.num_heads - mask.keep.size) < 0.5]
    both = HeadMask(sites, keep)
    export_masked(checkpoint, tmp_path / "masked.pt", both)
    export_compact(checkpoint, tmp_path / "compact.pt", both)
    small = load(tmp_path / "compact.pt").model
    assert recipe_of(small)["sites"]["encoder.layers.0.ffn"]["kept"] == both.kept_heads()["encoder.layers.0.ffn"]
    ours, theirs = (
        sentences(runner, translation.generate(tmp_path / f"{name}.pt", "--beam 3")) for name in ("compact", "masked")
    )
    same_decoding(ours, theirs)


@pytest.mark.slow
def test_half_precision(runner, translation, runs):
    masked, compact = runs[0]
    ours, theirs = (sentences(runner, translation.generate(path, "--fp16")) for path in (compact, masked))
    assert ours.keys() == theirs.keys()
    for number, (_, scores) in ours.items():
        np.testing.assert_allclose(scores[0], theirs[number][1][0], atol=0.02)


def test_plain_fairseq_refuses_it(runner, translation, runs, tmp_path):
    line = translation.generate(runs[0][1])
    line[line.index("--user-dir") + 1] = str(plain_user_dir(tmp_path / "reader"))
    done = runner.start("generate", line)
    assert done.wait() == 1 and "size mismatch" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("start", ["--restore-file {} --reset-dataloader", "--finetune-from-model {}"])
def test_plain_training_goes_on_compact(runner, translation, runs, tmp_path, start):
    masked, compact = runs[0]
    options = [start.format(compact), "--store-ema --ema-decay 0.5"]
    runner.run("train", translation.train(tmp_path / "run", *options, task="translation", updates=3))
    runner.run("train", translation.train(tmp_path / "run", *options, task="translation", updates=6))  # resumes
    after = tmp_path / "run" / "checkpoint_last.pt"
    same_attention_shapes(after, mask_beside(masked))
    assert read(after)["optimizer_history"][-1]["num_updates"] == 6
    name = "decoder.embed_tokens.weight"
    assert not torch.equal(weights_of(after)[name], weights_of(compact)[name])
    once = translation.train(tmp_path / "once", *options, task="translation", updates=6)
    runner.run("train", once)
    same_training_state(tmp_path / "once" / "checkpoint_last.pt", after)
    assert sentences(runner, translation.generate(after))


@pytest.mark.slow
def test_pruning_again(runner, translation, runs, tmp_path):
    masked, compact = runs[0]
    options = f"--num-of-heads 2 --joint-pruning --pruning-lr 0.2 --finetune-from-model {compact}"
    runner.run("train", translation.train(tmp_path / "run", options, updates=3))
    runner.run("train", translation.train(tmp_path / "run", options, updates=6))
    runner.run("train", translation.train(tmp_path / "once", options, updates=6))
    after = tmp_path / "run" / "checkpoint_last.pt"
    same_training_state(tmp_path / "once" / "checkpoint_last.pt", after)
    assert mask_beside(after).keep.size == 4 and mask_beside(after).kept == 2
    smaller = tmp_path / "smaller.pt"
    export_compact(after, smaller)
    same_decoding(*(sentences(runner, translation.generate(path)) for path in (smaller, after)))
    sites = read(smaller)["model"]["head_pruning.removed.version1"]
    recipe = decode(sites)["sites"]
    first = mask_beside(masked).kept_heads()
    assert sum(len(site["kept"]) for site in recipe.values()) == 2
    assert all(set(site["kept"]) <= set(first[name]) for name, site in recipe.items())


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", DSP.replace("--num-of-heads 4", "--num-of-heads 2")], ids=["plain", "dsp"])
def test_two_ranks_go_on_from_a_compact_checkpoint(runner, translation, runs, tmp_path, options):
    task = "translation_head_pruning" if options else "translation"
    start = f"{options} --finetune-from-model {runs[0][1]} --dropout 0"
    two = translation.train(tmp_path / "two", start, task=task, updates=4)
    run_two(runner, two, tmp_path / "watch")
    runner.run("train", translation.train(tmp_path / "one", start, "--update-freq 2", task=task, updates=4))
    one, two = (weights_of(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    for name, value in two.items():
        np.testing.assert_allclose(value, one[name], atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_averaged_checkpoints_load(runner, translation, runs, tmp_path):
    """As fairseq's average_checkpoints.py does it: tensors are added up, then divided."""
    masked, compact = runs[0]
    for path in (masked, compact):
        state = read(path)
        for name, value in state["model"].items():
            total = value.clone() + value + value
            state["model"][name] = total / 3 if total.is_floating_point() else total // 3
        torch.save(state, tmp_path / "average.pt")
        same_decoding(*(sentences(runner, translation.generate(each)) for each in (tmp_path / "average.pt", path)))


def test_the_host_loads_checkpoints_whose_data_are_gone(runs, tmp_path):
    checkpoint, compact = runs[0]
    for path in (checkpoint, compact):
        state = read(path)
        state["cfg"]["task"]["data"] = str(tmp_path / "gone")
        moved = tmp_path / path.name
        torch.save(state, moved)
        loaded = load(moved)
        assert not loaded.model.training and (loaded.mask is None) == (path is compact)
        assert loaded.unit_map.num_heads == (4 if path is compact else 24)
        with torch.no_grad():
            logits = loaded.model(**loaded.example(2, 5))[0]
        assert logits.shape[:2] == (2, 5) and logits.isfinite().all()
    assert load(checkpoint).mask == mask_beside(checkpoint)


def test_export_refuses(runs, tmp_path):
    (checkpoint, compact), _ = runs
    target = tmp_path / "out.pt"
    with pytest.raises(HeadPruningError, match="compact already"):
        export_compact(compact, target)
    with pytest.raises(HeadPruningError, match="is compact, the heads are gone"):
        export_masked(compact, target)
    with pytest.raises(HeadPruningError, match="heads left"):
        export_compact(compact, target, mask_beside(checkpoint))
    with pytest.raises(HeadPruningError, match="another architecture"):
        export_compact(checkpoint, target, full_mask(unit_map(translator(**{**SMALL, "encoder_layers": 1}))))
    dense = tmp_path / "dense.pt"
    torch.save({**read(checkpoint), "model": weights_of(checkpoint)}, dense)
    with pytest.raises(HeadPruningError, match="does not fit"):
        export_compact(dense, target, uneven_mask(translator(**{**SMALL, "encoder_layers": 3}), 3))
    assert not target.exists()
