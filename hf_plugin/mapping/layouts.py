"""How attention and feed-forward modules name their projections: adding a layout is adding a line."""

import re
from typing import Mapping, Optional, Sequence

from torch import nn

# One line per layout: role=name, names relative to one module, alternatives separated by "|"; the first line that
# fits a module is taken. Roles: q, k, v (kv and qkv: fused), latent (makes keys and values of all heads from a latent
# vector), out. What a line says of the widths is checked, see head_counts.py.
ATTENTION_LAYOUTS = (
    "q=q_proj k=k_proj v=v_proj out=o_proj|out_proj|dense|proj|projection_layer|Wo|post",
    "q=self.query k=self.key v=self.value out=output.dense|output",  # BERT and its kin
    "q=attention.query k=attention.key v=attention.value out=output.dense",  # BEiT, Q-Former
    "q=att.query k=att.key v=att.value out=output.dense",  # LXMERT across modalities
    "q=attention.projection_query k=attention.projection_key v=attention.projection_value out=output.dense",  # CvT
    "q=longformer_self_attn.query k=longformer_self_attn.key v=longformer_self_attn.value out=output",  # LED
    "q=self.query_proj k=self.key_proj v=self.value_proj out=output.dense",  # DeBERTa v2 and v3
    "qkv=self.in_proj out=output.dense",  # DeBERTa
    "q=query k=key v=value out=dense|out_proj|proj|output",
    "q=query_proj k=key_proj v=value_proj out=out_proj",  # ProphetNet
    "q=q k=k v=v out=o|proj",  # T5 and its kin, MPNet
    "q=q_lin k=k_lin v=v_lin out=out_lin",  # DistilBERT, XLM
    "q=q_head k=k_head v=v_head out=post_proj",  # Funnel
    "q=linear_q k=linear_k v=linear_v out=linear_out",  # speech conformers
    "q=project_q k=project_k v=project_v out=attention_out",  # CPM-Ant
    "q=Wq k=Wk v=Wv out=dense",  # CTRL
    "q=to_q kv=to_kv out=to_out",
    "q=q_attn kv=c_attn out=c_proj",  # GPT-2 across
    "qkv=c_attn out=c_proj",  # GPT-2
    "qkv=qkv out=proj|projection",
    "qkv=attention.qkv out=output.dense",  # TimeSformer
    "qkv=query_key_value out=dense",
    "qkv=Wqkv out=Wo|out_proj",
    "qkv=qkv_proj out=o_proj|out_proj",
    "qkv=att_proj out=out_proj",  # Bark
    "q=q_proj|q_b_proj|q_gate_proj latent=kv_b_proj out=o_proj",  # DeepSeek
    "q=q_proj k=k_proj out=o_proj",  # keys that are the values too
    "k=k_proj v=v_proj out=output_proj",  # pooling with a learned query
    "q=q_proj out=o_proj",  # keys and values of an earlier layer
    "v=value_proj out=output_proj",  # deformable attention
)

# How the heads lie in the rows of a fused projection, by its name and, where that is not enough, the output's:
# "blocks": all queries, all keys, all values; "heads": each head's query, key and value side by side (where keys are
# shared: each group's); "parts": in four parts of the heads, each with all queries, all values, all keys.
FUSED_ROWS = {
    "qkv_proj out_proj": "parts",  # CodeGen
    "c_attn": "blocks",  # in Linear projections, which GPTBigCode alone has: "heads"
    "Wqkv": "blocks",
    "att_proj": "blocks",
    "in_proj": "heads",
    "qkv": "blocks",
    "qkv_proj": "blocks",
    "query_key_value": "heads",
    "to_kv": "blocks",
}
PARTS = 4

# Parameters of attention modules other than the projections above, by their names relative to the module: where the
# heads lie in them. "rows": a projection's outputs; a number: that dimension, head after head.
HEAD_PARAMETERS = {
    r"(q|k|v)_bias": 0,
    r"pos_(q_|key_|query_)?proj": "rows",  # DeBERTa
    r"(query|key|value)_global": "rows",  # Longformer
    r"(w2e|e2w|e2e)_query": "rows",  # LUKE
    r"linear_pos": "rows",  # conformers
    r"pos_bias_[uv]": 0,
    r"r_[wrs]_bias": 0,  # Funnel
    r"r_kernel|seg_embed": 1,
    r"conv": 0,  # Nystromformer
    r"(relative_position_bias\.)?relative_position_bias_table": 1,
    r"relative_attention_bias": 1,  # T5
    r"logit_scale": 0,  # Swin 2
    r"continuous_position_bias_mlp\.2": "rows",
    r"sinks": 0,
}

# Parameters that all heads share: latent vectors, norms of the module's input or output (those of queries and keys are
# looked at), networks in front of a bias, ProphetNet's table of positions, of which a head reads the others' part.
SHARED_PARAMETERS = re.compile(
    r"(q_a_proj|q_a_layernorm|kv_a_proj_with_mqa|kv_a_layernorm|continuous_position_bias_mlp\.0|relative_pos_embeddings"
    r"|LayerNorm|layer_norm|layernorm[12]|ln|pre_norm|self_attn_layer_norm)(\.|$)"
)

# The first projection may also make the gates of its units, fused: then it is twice as wide.
FEED_FORWARD_LAYOUTS = (
    "in=intermediate.dense out=output.dense",
    "in=up_proj|gate_up_proj out=down_proj",
    "in=fc1 out=fc2",
    "in=wi|wi_1 out=wo",
    "in=Wi out=Wo",
    "in=c_fc out=c_proj",
    "in=fc_in out=fc_out",
    "in=lin1 out=lin2",
    "in=linear1 out=linear2",
    "in=linear_1 out=linear_2",
    "in=dense_h_to_4h out=dense_4h_to_h",
    "in=intermediate_dense out=output_dense",
    "in=ffn out=ffn_output",
    "in=ffn.0 out=ffn.2",
    "in=intermediate out=output",
    "in=w1 out=w2",
)


# Experts whose matrices are parameters of one module, [experts, ., .]: what makes their units, and what reads them.
EXPERT_LAYOUTS = ("in=gate_up_proj|up_proj out=down_proj",)


def features(module: Optional[nn.Module]) -> Optional[tuple[int, int]]:
    """Input and output width of a projection, or None when ``module`` is none.

    Knows Linear and whatever has its attributes (quantized layers, PEFT's wrappers), and GPT-2's Conv1D.
    """
    read, made = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(read, int) and isinstance(made, int):
        return read, made
    made, weight = getattr(module, "nf", None), getattr(module, "weight", None)
    if isinstance(made, int) and weight is not None:
        return weight.shape[0], made
    return None


def widths(module: nn.Module) -> tuple[int, int]:
    """:func:`features` of a module that is known to be a projection."""
    found = features(module)
    assert found is not None
    return found


def parse_layout(line: str) -> dict[str, tuple[str, ...]]:
    """Role to alternative names."""
    return {role: tuple(names.split("|")) for role, _, names in (part.partition("=") for part in line.split())}


def _projection(module: nn.Module, dotted: str) -> Optional[str]:
    found = module
    for part in dotted.split("."):
        inner = found._modules.get(part)
        if inner is None:
            return None
        found = inner
    if features(found) is not None:
        return dotted
    # Some models wrap each projection, e.g. to clip what goes in.
    return f"{dotted}.linear" if features(found._modules.get("linear")) is not None else None


def find_parts(module: nn.Module, layout: Mapping[str, tuple[str, ...]]) -> Optional[dict[str, str]]:
    """Role to name relative to ``module``, or None when the layout does not fit."""
    parts: dict[str, str] = {}
    for role, names in layout.items():
        name = next((found for found in (_projection(module, name) for name in names) if found), None)
        if name is None:
            return None
        parts[role] = name
    return parts


def first_fit(module: nn.Module, layouts: Sequence[Mapping[str, tuple[str, ...]]]) -> Optional[dict[str, str]]:
    """:func:`find_parts` of the first layout that fits; most modules of a model have no parts and fit none."""
    return (
        next((parts for layout in layouts if (parts := find_parts(module, layout))), None) if module._modules else None
    )
