"""Families of transformers as tiny models with random weights; ``python -m tests.hf.families`` lists them."""

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Mapping

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from tests.few import few

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 32, 4, 2, 60, 64
PARAMETERS = 400_000  # at most: a model with more has ignored its overrides
# Where a family's configuration differs in an older release it is skipped; on this release or a newer one it fails.
RELEASE = (5, 23)

TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=40,
    max_position_embeddings=POSITIONS,
    pad_token_id=0,
)
GROUPED = dict(TEXT, num_key_value_heads=2, head_dim=8)
GPT = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, n_inner=40)
XLM = dict(vocab_size=VOCABULARY, emb_dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=POSITIONS)
BART = dict(
    vocab_size=VOCABULARY,
    d_model=WIDTH,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=40,
    decoder_ffn_dim=40,
    max_position_embeddings=POSITIONS,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    pad_token_id=0,
)
T5 = dict(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=40, num_layers=LAYERS, num_heads=HEADS)
VISION = dict(
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=40,
    image_size=8,
    patch_size=4,
)
PYRAMID = dict(
    depths=[1, 1], num_heads=[2, 4], embed_dim=16, window_size=2, image_size=16, patch_size=2, drop_path_rate=0.0
)
SPEECH = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=40,
    conv_dim=[8, 8],
    conv_stride=[4, 4],
    conv_kernel=[8, 4],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.0,
    mask_time_prob=0.0,
)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6)


@dataclass(frozen=True, eq=False)
class Family:
    """One family: its ``model_type``, what its tiny configuration overrides, and what its model is fed."""

    name: str
    overrides: Mapping[str, Any]
    feed: str

    def __str__(self) -> str:
        return self.name


def _families(feed: str, **overrides: Mapping[str, Any]) -> list[Family]:
    return [Family(name.replace("__", "-"), changes, feed) for name, changes in overrides.items()]


# Two underscores stand for a hyphen.
FAMILIES = [
    *_families(
        "text",
        albert=dict(TEXT, embedding_size=16),
        bert=TEXT,
        big_bird=dict(TEXT, attention_type="original_full"),  # short sentences switch to it, drawing new weights
        camembert=TEXT,
        data2vec__text=TEXT,
        deberta=dict(TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        deberta__v2=dict(TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True),
        distilbert=dict(
            vocab_size=VOCABULARY,
            dim=WIDTH,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=40,
            max_position_embeddings=POSITIONS,
        ),
        electra=dict(TEXT, embedding_size=16),
        ernie=TEXT,
        esm=dict(TEXT, mask_token_id=4),
        eurobert=GROUPED,
        flaubert=XLM,
        funnel=dict(
            architectures=["FunnelBaseModel"],
            vocab_size=VOCABULARY,
            block_sizes=[1, 1],
            d_model=WIDTH,
            n_head=HEADS,
            d_head=8,
            d_inner=40,
        ),
        ibert=TEXT,
        layoutlm=TEXT,
        longformer=dict(TEXT, attention_window=4),
        luke=dict(TEXT, entity_vocab_size=10, entity_emb_size=16),
        megatron__bert=TEXT,
        mobilebert=dict(TEXT, embedding_size=16, intra_bottleneck_size=32, true_hidden_size=32),
        modernbert=dict(TEXT, global_attn_every_n_layers=2, local_attention=4, cls_token_id=1, sep_token_id=2),
        mpnet=TEXT,
        nomic_bert=TEXT,
        nystromformer=dict(TEXT, num_landmarks=6, segment_means_seq_len=6),
        rembert=dict(TEXT, input_embedding_size=16, output_embedding_size=16),
        roberta=TEXT,
        roberta__prelayernorm=TEXT,
        roformer=dict(TEXT, embedding_size=16),
        splinter=TEXT,
        xlm=XLM,
        xlm__roberta=TEXT,
        xlm__roberta__xl=TEXT,
        xmod=dict(TEXT, languages=["en_XX"], default_language="en_XX"),
    ),
    *_families(
        "image",
        beit=VISION,
        data2vec__vision=VISION,
        deit=VISION,
        dinov2=dict(VISION, mlp_ratio=2),
        dinov3_vit=VISION,
        donut__swin=PYRAMID,
        ijepa=VISION,
        swin=PYRAMID,
        swinv2=PYRAMID,
        vit=VISION,
        vit_msn=VISION,
        yolos=dict(VISION, image_size=[8, 8], num_detection_tokens=3),
    ),
    *_families(
        "image and text", clip=dict(text_config=dict(TEXT, eos_token_id=2), vision_config=VISION, projection_dim=16)
    ),
    *_families(
        "sound",
        hubert=SPEECH,
        sew=dict(SPEECH, squeeze_factor=2),
        unispeech=SPEECH,
        wav2vec2=SPEECH,
        wav2vec2__conformer=dict(SPEECH, conv_depthwise_kernel_size=3),
    ),
    *_families(
        "text",
        bloom=dict(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
        codegen=dict(GPT, rotary_dim=4),
        cohere=GROUPED,
        ctrl=dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, dff=40, n_positions=POSITIONS),
        deepseek_v3=dict(
            TEXT, **LATENT, num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=2, n_group=1
        ),
        falcon=dict(TEXT, new_decoder_architecture=True, num_kv_heads=2),
        gemma=GROUPED,
        gemma2=GROUPED,
        gemma3_text=GROUPED,
        glm=GROUPED,
        gpt2=GPT,
        gpt_bigcode=dict(GPT, multi_query=False),
        gpt_neo=dict(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            intermediate_size=40,
            max_position_embeddings=POSITIONS,
            attention_types=[[["global", "local"], 1]],
        ),
        gpt_neox=dict(TEXT, rotary_pct=0.5),
        gptj=dict(GPT, rotary_dim=4),
        granite=GROUPED,
        helium=GROUPED,
        llama=GROUPED,
        ministral=GROUPED,
        mistral=GROUPED,
        mixtral=dict(GROUPED, num_local_experts=2, num_experts_per_tok=1),
        mpt=dict(vocab_size=VOCABULARY, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=POSITIONS),
        olmo=GROUPED,
        olmo2=GROUPED,
        openai__gpt=GPT,
        opt=dict(TEXT, ffn_dim=40, word_embed_proj_dim=WIDTH),
        persimmon=TEXT,
        phi=dict(TEXT, num_key_value_heads=2),
        phi3=dict(TEXT, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
        qwen2=GROUPED,
        qwen2_moe=dict(GROUPED, **EXPERTS, shared_expert_intermediate_size=24),
        qwen3=GROUPED,
        qwen3_moe=dict(GROUPED, **EXPERTS),
        smollm3=dict(GROUPED, bos_token_id=1, eos_token_id=2),
        stablelm=dict(TEXT, num_key_value_heads=2),
        starcoder2=dict(TEXT, num_key_value_heads=2),
        xglm=dict(
            vocab_size=VOCABULARY, d_model=WIDTH, num_layers=LAYERS, attention_heads=HEADS, ffn_dim=40, layerdrop=0.0
        ),
    ),
    *_families(
        "text to text",
        bart=BART,
        bigbird_pegasus=dict(BART, attention_type="original_full"),
        blenderbot=BART,
        blenderbot__small=BART,
        fsmt=dict(BART, src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["en", "de"]),
        led=dict(
            BART,
            attention_window=4,
            max_encoder_position_embeddings=POSITIONS,
            max_decoder_position_embeddings=POSITIONS,
        ),
        longt5=dict(T5, local_radius=2),
        m2m_100=BART,
        marian=dict(BART, decoder_start_token_id=0),
        mbart=BART,
        mt5=T5,
        mvp=BART,
        pegasus=BART,
        pegasus_x=dict(BART, num_global_tokens=2, block_size=4),
        plbart=BART,
        prophetnet=dict(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_encoder_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_encoder_attention_heads=HEADS,
            num_decoder_attention_heads=HEADS,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=POSITIONS,
        ),
        switch_transformers=dict(
            T5, num_decoder_layers=LAYERS, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
        ),
        t5=T5,
        umt5=T5,
    ),
    *_families(
        "sound to text",
        speech_to_text=dict(BART, input_feat_per_channel=8, conv_channels=16, max_source_positions=POSITIONS),
        whisper=dict(
            BART, num_mel_bins=8, max_source_positions=12, max_target_positions=POSITIONS, decoder_start_token_id=1
        ),
    ),
]


def one_of_each() -> list:
    """The families as parameters: by default one of each layout, all of them in the slow tests."""
    kept = """albert bert deberta-v2 distilbert funnel longformer luke mobilebert modernbert xlm beit swinv2 codegen
        deepseek_v3 falcon gpt2 gpt_bigcode llama mixtral mpt qwen3 phi3 bart fsmt t5""".split()
    return few(FAMILIES, *(family for family in FAMILIES if family.name in kept))


def covered() -> list[str]:
    """The ``model_type`` of every family that the family test runs over, sorted."""
    return sorted(family.name for family in FAMILIES)


def missing(family: Family) -> "str | None":
    """Why the family cannot be tested with the installed transformers, or None."""
    if family.name not in CONFIG_MAPPING:
        return f"transformers {transformers.__version__} has no {family.name}"
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < RELEASE:
        try:
            make(family)
        except Exception as error:
            return f"transformers {transformers.__version__} builds {family.name} otherwise: {error!r:.120}"
    return None


def _inputs(family: Family) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    words = torch.randint(5, VOCABULARY, (2, 6), generator=draw)
    pixels = torch.randn(2, 3, 8, 8, generator=draw)
    if family.feed == "image":
        size = family.overrides["image_size"]
        return {"pixel_values": torch.randn(2, 3, *([size] * 2 if isinstance(size, int) else size), generator=draw)}
    if family.feed == "sound":
        return {"input_values": torch.randn(2, 200, generator=draw)}
    decoder = {"decoder_input_ids": words[:, :5].flip(0)} if "to text" in family.feed else {}
    if family.feed == "sound to text":
        shape = (2, 8, 24) if family.name == "whisper" else (2, 24, 8)
        return {"input_features": torch.randn(shape, generator=draw), **decoder}
    # The second example is padded, at its end.
    mask = torch.ones_like(words)
    mask[1, 4:] = 0
    images = {"pixel_values": pixels} if "image" in family.feed else {}
    return {"input_ids": words * mask, "attention_mask": mask, **decoder, **images}


def build(family: Family, **options: Any) -> PreTrainedModel:
    """The family's tiny model with the weights that it starts with."""
    config = AutoConfig.for_model(family.name, **copy.deepcopy(family.overrides))
    if hasattr(config, "use_cache"):
        config.use_cache = False  # gradient checkpointing forbids it
    return AutoModel.from_config(config, **options).float()


@functools.cache
def make(family: Family) -> SimpleNamespace:
    """The family's tiny model, in evaluation mode, and a batch for it. Do not change the model for good."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(family).eval()
        assert sum(parameter.numel() for parameter in model.parameters()) <= PARAMETERS, family
        with torch.no_grad():  # so that no bias, norm or small weight hides a difference
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return SimpleNamespace(model=model, inputs=_inputs(family))


if __name__ == "__main__":
    print("\n".join(covered()))
