"""What families of several makers share: the decoder that most of them are, and experts as most of them store them."""

from __future__ import annotations

from typing import Literal

from compress.architecture.family import ATTENTION, MLP, Channels, Experts, Family, Heads, Rows, Scaling

QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
QKV_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
ATTENTION_BIASES = ("attention_bias", (*ATTENTION[0], *ATTENTION[1]))

ATTENTION_SCALINGS = (
    Scaling("input_layernorm", ATTENTION[0]),
    Scaling("self_attn.v_proj", ATTENTION[1], "values"),
)
UP_DOWN = Scaling("mlp.up_proj", MLP[1])
EXPERT_INPUTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate")
EXPERT_UP_DOWN = Scaling("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
# Of decoders whose blocks have experts, and some of them an MLP instead.
MIXED_SCALINGS = (
    *ATTENTION_SCALINGS,
    Scaling("post_attention_layernorm", (*MLP[0], *EXPERT_INPUTS)),
    UP_DOWN,
    EXPERT_UP_DOWN,
)

# Separate queries, keys and values, a gated MLP, and a norm before each of both.
DECODER = Family(
    "",
    scalings=(*ATTENTION_SCALINGS, Scaling("post_attention_layernorm", MLP[0]), UP_DOWN),
    heads=Heads(),
    channels=(Channels(),),
)


def expert_channels(setting: str, layout: Experts, rows: Rows = "one") -> Channels:
    """Return the channels of experts, whose number is a setting of config.json."""
    inputs = tuple(f"{layout.disk}.{name}" for name in layout.inputs)
    return Channels(inputs, f"{layout.disk}.{layout.output}", setting, "expert_channels", rows)


def shared_channels(module: str, setting: str, size: Literal["expert_channels", "shared_channels"]) -> Channels:
    """Return the channels of experts that see all tokens."""
    return Channels((f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj", setting, size)
