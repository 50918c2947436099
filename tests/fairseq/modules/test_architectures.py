"""Gates on every kind of fairseq model that is built on its MultiheadAttention."""

import copy
import shlex
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.hubert.hubert import HubertConfig, HubertModel, HubertPretrainingConfig
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fairseq.modules import MultiheadAttention

from fairseq_plugin.modules.attention import UnfusedAttention
from fairseq_plugin.modules.unit_map import unit_map
from head_pruning.gates import GateBank

TINY = "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 24 --decoder-ffn-embed-dim 24 \
    --encoder-layers 2 --decoder-layers 2 --encoder-attention-heads 4 --decoder-attention-heads 2"
SPEECH = dict(
    encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_layers=2, encoder_attention_heads=4, decoder_embed_dim=16,
    decoder_ffn_embed_dim=24, decoder_layers=2, decoder_attention_heads=2, conv_channels=8, input_feat_per_channel=20,
    input_channels=1, max_source_positions=100, max_target_positions=50, depthwise_conv_kernel_size=3, fp16=False,
)  # fmt: skip
AUDIO = dict(
    encoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=4, conv_pos=4,
    conv_pos_groups=2, conv_feature_layers="[(8, 10, 5), (8, 3, 2)]", final_dim=8,
)  # fmt: skip


def dictionary() -> Dictionary:
    words = Dictionary()
    for number in range(20):
        words.add_symbol(f"w{number}")
    return words


def source_and_target() -> tuple:
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(4, 24, (3, 6), generator=generator) for _ in range(2))
    source[0, :2] = target[1, 4:] = 1  # padding
    return source, torch.tensor([4, 6, 6]), target


def text_model(arch, flags, task="translation", data=None):
    """A model by its command line, and its inputs."""
    line = [str(data), "--task", task, "--arch", arch, *shlex.split(flags)]
    arguments = options.parse_args_and_arch(options.get_training_parser(), input_args=line)
    cfg = convert_namespace_to_omegaconf(arguments)
    task = tasks.setup_task(cfg.task)
    if hasattr(task, "tgt_dict"):
        task.tgt_dict = task.src_dict
    return task.build_model(cfg.model)


def sequence_to_sequence(arch, flags="", task="translation"):
    def build(data):
        return text_model(arch, f"{TINY} {flags}", task, data), source_and_target()

    return pytest.param(build, id=arch)


def non_autoregressive(arch, flags="--noise full_mask"):
    def build(data):
        source, lengths, target = source_and_target()
        model = text_model(arch, f"{TINY} {flags} --criterion nat_loss --label-smoothing 0.1", "translation_lev", data)
        wanted = target.clone()
        target = torch.where(target == 1, target, torch.full_like(target, 3))
        return model, (source, lengths, target, wanted)

    return pytest.param(build, id=arch)


def decoder_only(arch, flags, task):
    def build(data):
        return text_model(arch, flags, task, data), source_and_target()[2:]

    return pytest.param(build, id=arch)


def speech(arch, **change):
    def build(data):
        arguments = Namespace(**{**SPEECH, **change})
        ARCH_CONFIG_REGISTRY[arch](arguments)
        words = dictionary()
        task = SimpleNamespace(target_dictionary=words, source_dictionary=words)
        model = ARCH_MODEL_REGISTRY[arch].build_model(arguments, task)
        generator = torch.Generator().manual_seed(0)
        sound = torch.randn(3, 24, 20, generator=generator)
        return model, (sound, torch.tensor([24, 20, 16]), source_and_target()[2])

    return pytest.param(build, id="-".join([arch, *map(str, change.values())]))


def wav2vec2(data):
    model = Wav2Vec2Model(Wav2Vec2Config(**AUDIO))
    return Features(model, mask=False), (torch.randn(2, 400, generator=torch.Generator().manual_seed(0)),)


def hubert(data):
    model = HubertModel(HubertConfig(**AUDIO, label_rate=100), HubertPretrainingConfig(data=""), [dictionary()])
    return Features(model, mask=False), (torch.randn(2, 400, generator=torch.Generator().manual_seed(0)),)


class Features(torch.nn.Module):
    """An audio encoder without its pretraining task."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, source):
        return self.model(source, features_only=True, **self.options)


MODELS = [
    sequence_to_sequence("transformer"),
    sequence_to_sequence("transformer_iwslt_de_en", "--encoder-normalize-before --decoder-normalize-before"),
    sequence_to_sequence("transformer_align"),
    sequence_to_sequence("lightconv", "--encoder-kernel-size-list [3,3] --decoder-kernel-size-list [3,3]"),
    sequence_to_sequence("bart_base"),
    non_autoregressive("nonautoregressive_transformer"),
    non_autoregressive("iterative_nonautoregressive_transformer"),
    non_autoregressive("cmlm_transformer"),
    non_autoregressive("levenshtein_transformer", "--noise random_delete"),
    non_autoregressive("insertion_transformer", "--noise random_delete"),
    decoder_only(
        "transformer_lm",
        "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 24 --decoder-attention-heads 4",
        "language_modeling",
    ),
    decoder_only(
        "roberta_base",
        "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 4",
        "masked_lm",
    ),
    speech("s2t_transformer_s"),
    speech("s2t_conformer"),
    speech("convtransformer", conv_out_channels=4),
    pytest.param(wav2vec2, id="wav2vec2"),
    pytest.param(hubert, id="hubert"),
]


def models(*kept: str) -> list:
    """All of them; by default only those that are named."""
    assert set(kept) <= {model.id for model in MODELS}
    return [
        model if model.id in kept else pytest.param(*model.values, id=model.id, marks=pytest.mark.slow)
        for model in MODELS
    ]


def flat(value) -> list:
    """All tensors of a nest of outputs, in order."""
    if isinstance(value, torch.Tensor):
        return [value.double()]
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, (list, tuple)) else []


def run(model, inputs) -> torch.Tensor:
    """All floating-point outputs of a model in evaluation, in one vector."""
    torch.manual_seed(0)
    np.random.seed(0)
    with torch.no_grad():
        return torch.cat([tensor.reshape(-1) for tensor in flat(model(*inputs))])


@pytest.fixture(scope="module")
def one_dictionary(data):
    """The corpus with the dictionary where language models look for it."""
    (data / "dict.txt").write_text((data / "dict.de.txt").read_text())
    return data


@pytest.mark.parametrize(
    "build",
    models(
        "transformer",
        "lightconv",
        "bart_base",
        "levenshtein_transformer",
        "transformer_lm",
        "s2t_conformer",
        "wav2vec2",
    ),
)
def test_gates(build, one_dictionary):
    torch.manual_seed(1)
    model, inputs = build(one_dictionary)
    model.eval()
    fused = run(model, inputs)
    assert torch.isfinite(fused).all()

    sites = unit_map(model)
    attention = [module for module in model.modules() if isinstance(module, MultiheadAttention)]
    assert len(sites.attention) == len(attention) >= 2
    unfused, gates = UnfusedAttention(model), GateBank(model, sites)
    unfused.attach()
    plain = run(model, inputs)
    torch.testing.assert_close(plain, fused, atol=5e-6, rtol=0)
    gates.attach()
    assert torch.equal(run(model, inputs), plain)  # gates of one
    gates.check_fired()

    keep = np.random.default_rng(0).random(sites.num_heads) < 0.5
    by_hand = copy.deepcopy(model)
    gates.set_evaluation(keep)
    modules = dict(by_hand.named_modules())
    for site, where in sites.slices():
        weight = modules[site.out_proj].weight.data.unflatten(1, (site.heads, site.head_dim))
        weight[:, torch.from_numpy(~keep[where])] = 0.0
    gated = run(model, inputs)
    torch.testing.assert_close(gated, run(by_hand, inputs), atol=5e-6, rtol=0)  # the copy kept its gates of one
    assert (gated - plain).abs().max() > 1e-3

    again = copy.deepcopy(model)
    gates.set_evaluation(np.ones(sites.num_heads))
    assert torch.equal(run(again, inputs), gated)

    gates.detach()
    unfused.detach()
    assert torch.equal(run(model, inputs), fused)
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_boolean_attention_mask_equals_the_fused_path():
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 4, self_attention=True).eval()
    value = torch.randn(5, 2, 16)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]])
    fused, _ = attention(value, value, value, attn_mask=mask, key_padding_mask=padding, need_weights=False)
    unfused = UnfusedAttention(attention)
    unfused.attach()
    ours, _ = attention(value, value, value, attn_mask=mask, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(ours, fused, atol=1e-6, rtol=0)
    mask[2] = True  # a row that may look nowhere
    ours, _ = attention(value, value, value, attn_mask=mask, need_weights=False)
    assert torch.isfinite(ours).all()
    unfused.detach()
    again, _ = attention(value, value, value, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
                         key_padding_mask=padding, need_weights=False)  # fmt: skip
    assert torch.equal(again, fused)


def test_order_of_sites(one_dictionary):
    model, _ = MODELS[0].values[0](one_dictionary)
    names = [site.name for site in unit_map(model).attention]
    assert names == [
        "encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.layers.0.encoder_attn",
        "decoder.layers.1.encoder_attn", "decoder.layers.0.self_attn", "decoder.layers.1.self_attn",
    ]  # fmt: skip
    assert [site.heads for site in unit_map(model).attention] == [4, 4, 2, 2, 2, 2]
