"""What the unit map makes of a model: errors, descriptions by hand, wrapped and compiled models."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EncoderDecoderModel,
    ResNetConfig,
    ResNetModel,
)

from head_pruning import AttentionSite, HeadPruningError, UnfiredSiteError
from head_pruning.gates.engine.bank import GateBank
from hf_plugin.mapping.unit_map import unit_map
from tests.hf.families import FAMILIES, GROUPED, TEXT, VISION, build, make

WORDS = torch.tensor([[5, 6, 7, 8, 9]])
FAMILY = {family.name: family for family in FAMILIES}


def closed(model: nn.Module, heads: list[int], **options) -> tuple[GateBank, np.ndarray]:
    """Gates on ``model`` with these heads closed."""
    mapped = unit_map(model, **options)
    bank = GateBank(model, mapped)
    values = np.ones(mapped.num_heads)
    values[heads] = 0
    bank.set_evaluation(values)
    bank.attach()
    return bank, values


# -- what is mapped ---------------------------------------------------------------------------------------------------


def test_bert_site_by_site():
    config = AutoConfig.for_model("bert", **TEXT)
    mapped = unit_map(AutoModelForSequenceClassification.from_config(config))
    layer = "bert.encoder.layer.1"
    assert mapped.attention[1] == AttentionSite(
        name=f"{layer}.attention",
        kind="encoder_self",
        layer=layer,
        heads=4,
        head_dim=8,
        out_proj=f"{layer}.attention.output.dense",
        projections=tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
    )
    block = mapped.feed_forward[1]
    assert (block.name, block.layer, block.width) == (f"{layer}.ffn", layer, 40)
    assert (block.in_proj, block.out_proj) == (f"{layer}.intermediate.dense", f"{layer}.output.dense")
    assert mapped.layers == ("bert.encoder.layer.0", layer)


def test_t5_rows_are_in_the_published_order_and_its_layers_are_blocks():
    mapped = unit_map(make(FAMILY["t5"]).model)
    assert [(site.kind, site.layer) for site in mapped.attention] == [
        (kind, f"{stack}.block.{number}")
        for kind, stack in (("encoder_self", "encoder"), ("decoder_cross", "decoder"), ("decoder_self", "decoder"))
        for number in (0, 1)
    ]
    assert [block.layer for block in mapped.feed_forward] == [
        f"{stack}.block.{number}" for stack in ("encoder", "decoder") for number in (0, 1)
    ]


def test_a_head_is_a_key_value_group():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GROUPED))
    site = unit_map(model).attention[0]
    assert (site.kind, site.heads, site.head_dim) == ("decoder_self", 2, 16)
    assert model.get_submodule(site.out_proj).in_features == 32


def test_bert_as_a_decoder_attends_to_itself_and_across():
    def bert(**changes):
        return AutoConfig.for_model("bert", **TEXT, **changes)

    encoder = AutoModel.from_config(bert())
    decoder = AutoModelForCausalLM.from_config(bert(is_decoder=True, add_cross_attention=True))
    mapped = unit_map(EncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert [site.kind for site in mapped.attention] == 2 * ["encoder_self"] + 2 * ["decoder_cross"] + 2 * [
        "decoder_self"
    ]
    assert mapped.attention[2].name == "decoder.bert.encoder.layer.0.crossattention"


def test_gpt2_across():
    model = AutoModel.from_config(AutoConfig.for_model("gpt2", **FAMILY["gpt2"].overrides, add_cross_attention=True))
    mapped = unit_map(model)
    assert [site.kind for site in mapped.attention] == 2 * ["decoder_cross"] + 2 * ["decoder_self"]
    assert mapped.attention[0].projections == ("h.0.crossattention.q_attn", "h.0.crossattention.c_attn")


def test_experts_are_left_out_of_the_feed_forward_blocks():
    assert unit_map(make(FAMILY["mixtral"]).model).feed_forward == ()


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "bert", "modernbert", "phi3", "albert"])
def test_a_feed_forward_unit_is_what_the_map_says(name):
    """Zeroing a unit's column in the out projection and its row in the in projection are the same."""
    host = make(FAMILY[name])
    block = unit_map(host.model).feed_forward[0]
    first, last = (host.model.get_submodule(part) for part in (block.in_proj, block.out_proj))
    caught = []
    handle = last.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        host.model(**host.inputs)
        weight = first.weight.data if hasattr(first, "in_features") else first.weight.data.t()
        kept = weight[3].clone()
        weight[3] += 1
        host.model(**host.inputs)
        weight[3] = kept
    handle.remove()
    assert caught[0].shape[-1] == block.width
    calls = len(caught) // 2  # a shared layer runs several times; its first run is read
    assert (caught[calls] != caught[0]).flatten(0, -2).any(0).nonzero().flatten().tolist() == [3]


# -- wrapped models ---------------------------------------------------------------------------------------------------


def test_lora_through_peft():
    torch.manual_seed(3)
    config = AutoConfig.for_model("bert", **TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    lora = LoraConfig(r=2, target_modules=["query", "value", "attention.output.dense"], init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_config(config), lora).eval()
    mapped = unit_map(model)
    plain = model(WORDS).logits
    bank, _ = closed(model, [1, 6])
    gated = model(WORDS).logits
    model.train()
    bank.set_training(np.full(8, 0.5))
    model(WORDS).logits.sum().backward()
    gradients = bank.gradients.clone()
    bank.detach()
    model.eval()
    assert torch.equal(model(WORDS).logits, plain)
    for site, head in zip(mapped.attention, (1, 2)):
        out_proj = model.get_submodule(site.out_proj)
        for weight in (out_proj.base_layer.weight, out_proj.lora_A["default"].weight):
            weight.data[:, head * 8 : (head + 1) * 8] = 0
    torch.testing.assert_close(model(WORDS).logits, gated)
    assert not torch.allclose(gated, plain, atol=1e-3)
    assert gradients.ne(0).all()
    assert not any("gate" in name for name, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_follows_its_gates(backend):
    torch.manual_seed(5)
    model = AutoModel.from_config(
        AutoConfig.for_model("bert", **TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    bank = GateBank(model, unit_map(model))
    bank.attach()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for seed in range(3):
        gates = np.random.default_rng(seed).uniform(0, 1, 8)
        for runs in (compiled, model):
            model.train()
            bank.set_training(gates)
            loss = runs(WORDS).last_hidden_state.square().sum()
            loss.backward()
            model.eval()
            bank.set_evaluation(gates > 0.5)
            with torch.no_grad():
                results.append((loss.detach(), bank.gradients.clone(), runs(WORDS).last_hidden_state))
        torch.testing.assert_close(results[-2], results[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0][2], results[2][2], atol=1e-3)


# -- what is not mapped -----------------------------------------------------------------------------------------------


class OddAttention(nn.Module):
    """Attention over 4 heads of 8 whose projections have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.everything = nn.Linear(32, 96)
        self.mixing_out = nn.Linear(32, 32)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.everything(words).chunk(3, dim=-1)
        )
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.mixing_out(heads.transpose(1, 2).flatten(-2))


class OddModel(nn.Module):
    """Layers of one attention each."""

    def __init__(self, attention, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": attention()}) for _ in range(layers))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            attention = layer["attn"]
            multihead = isinstance(attention, nn.MultiheadAttention)
            words = words + (attention(words, words, words)[0] if multihead else attention(words))
        return words


def lines_of(error: pytest.ExceptionInfo) -> str:
    """The code that an error shows."""
    return str(error.value).split("\n\n", 1)[1]


def test_the_error_shows_the_lines_that_map_the_module():
    torch.manual_seed(1)
    model = OddModel(OddAttention, layers=6)
    with pytest.raises(HeadPruningError, match=r"layers\.0\.attn \(OddAttention\) \(and 5 more\).*ignore=") as error:
        unit_map(model)
    lines = lines_of(error)
    assert lines.count("AttentionSite(") == 4 and "layers.4.attn, layers.5.attn" in lines
    names = {"model": model, "unit_map": unit_map, "HEADS": 4, "HEAD_DIM": 8}
    small = OddModel(OddAttention).eval()
    with pytest.raises(HeadPruningError) as error:
        unit_map(small)
    names["model"] = small
    exec(lines_of(error), names)
    mapped = unit_map(small, sites=names["sites"])
    assert [(site.name, site.layer, site.heads, site.kind) for site in mapped.attention] == [
        (f"layers.{number}.attn", f"layers.{number}", 4, "encoder_self") for number in (0, 1)
    ]
    words = torch.randn(1, 5, 32)
    plain = small(words)
    bank, _ = closed(small, [2], sites=names["sites"])
    gated = small(words)
    bank.check_fired()
    bank.detach()
    small.layers[0]["attn"].mixing_out.weight.data[:, 16:24] = 0
    torch.testing.assert_close(small(words), gated)
    assert not torch.allclose(gated, plain, atol=1e-3)


def test_torch_multihead_attention_is_refused_and_its_gate_would_never_run():
    model = OddModel(lambda: nn.MultiheadAttention(32, 4, batch_first=True))
    with pytest.raises(HeadPruningError, match=r"layers\.0\.attn \(MultiheadAttention\).*never calls") as error:
        unit_map(model)
    names = {"model": model, "unit_map": unit_map, "HEADS": 4, "HEAD_DIM": 8}
    exec(lines_of(error), names)
    bank, _ = closed(model, [0], sites=names["sites"])
    model(torch.randn(1, 5, 32))
    with pytest.raises(UnfiredSiteError, match=r"layers\.0\.attn, layers\.1\.attn"):
        bank.check_fired()


def test_ignore_leaves_modules_out():
    config = AutoConfig.for_model("siglip_vision_model", **VISION)
    model = AutoModel.from_config(config)
    with pytest.raises(HeadPruningError, match=r"head\.attention \(MultiheadAttention\)"):
        unit_map(model)
    assert len(unit_map(model, ignore=r"head\.attention$").attention) == 2
    mapped = unit_map(model, ignore=r"head\.attention|layers\.0\.")
    assert [site.layer for site in mapped.attention] == [block.layer for block in mapped.feed_forward]
    assert len(mapped.attention) == 1 and "layers.1" in mapped.attention[0].name


@pytest.mark.parametrize(
    "ignore, words", [("(", "not a regular expression"), ("nowhere", "matches no module"), (".", "no attention")]
)
def test_ignore_that_cannot_be_meant(ignore, words):
    with pytest.raises(HeadPruningError, match=words):
        unit_map(make(FAMILY["bert"]).model, ignore=ignore)


def test_a_model_without_attention():
    model = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(HeadPruningError, match="no attention module that can be mapped"):
        unit_map(model)


def test_sites_by_hand_replace_what_is_found():
    model = make(FAMILY["bert"]).model
    found = unit_map(model).attention
    halves = AttentionSite(found[1].name, "encoder_self", found[1].layer, 2, 16, found[1].out_proj)
    mapped = unit_map(model, sites=[halves]).attention
    assert mapped == (found[0], dataclasses.replace(halves, projections=found[1].projections))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"heads": 3}, "3 heads of 8, but encoder.layer.0.attention.output.dense reads 32 features"),
        ({"out_proj": "encoder.out"}, "no module encoder.out, which the site"),
        ({"name": "encoder.layer.7.attention"}, "no module encoder.layer.7.attention"),
        ({"kind": "self"}, "the kind self; the kinds are encoder_self"),
    ],
)
def test_a_site_by_hand_that_does_not_fit(change, words):
    model = make(FAMILY["bert"]).model
    site = unit_map(model).attention[0]
    with pytest.raises(HeadPruningError, match=words):
        unit_map(model, sites=[type(site)(**{**vars(site), **change})])


def test_a_norm_between_the_heads_and_the_output_projection():
    model = AutoModel.from_config(AutoConfig.for_model("bitnet", **GROUPED))
    with pytest.raises(HeadPruningError, match=r"layers\.0\.self_attn \(BitNetAttention\).*norm attn_sub_norm"):
        unit_map(model)


def test_attributes_that_contradict_the_widths():
    model = build(FAMILY["bert"])
    model.encoder.layer[1].attention.self.num_attention_heads = 8
    with pytest.raises(HeadPruningError, match=r"layer\.1\.attention.*reads 32 features, which is not 8 heads of 8"):
        unit_map(model)
    model = build(FAMILY["llama"])
    model.layers[0].self_attn.num_key_value_groups = 1
    with pytest.raises(HeadPruningError, match=r"projection of v makes 16 features, not 32 for 4 heads of 8"):
        unit_map(model)


def test_convolutions_among_the_heads_are_not_taken_for_grouped_queries():
    model = AutoModel.from_config(AutoConfig.for_model("convbert", **TEXT, embedding_size=16, num_groups=1))
    with pytest.raises(HeadPruningError, match=r"ConvBertAttention.*not 2 heads of 8"):
        unit_map(model)
