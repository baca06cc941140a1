"""Qwen."""

from __future__ import annotations

from dataclasses import replace

from compress.architecture.families._shared import (
    ATTENTION_BIASES,
    ATTENTION_SCALINGS,
    DECODER,
    EXPERT_INPUTS,
    EXPERT_UP_DOWN,
    MIXED_SCALINGS,
    QK_NORMS,
    QKV_BIASES,
    UP_DOWN,
    expert_channels,
    shared_channels,
)
from compress.architecture.family import ATTENTION, MLP, NORMS, Channels, Experts, Family, Heads, Scaling

_EXPERTS = Experts()

FAMILIES = (
    replace(DECODER, model_type="qwen2", keep=(*NORMS, *QKV_BIASES)),
    replace(
        DECODER,
        model_type="qwen3",
        keep=(*NORMS, *QK_NORMS, *QKV_BIASES, "self_attn.o_proj.bias"),
        biases=(ATTENTION_BIASES,),
    ),
    Family(
        "qwen2_moe",
        taps=(
            *ATTENTION,
            *MLP,
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            ("mlp.shared_expert.down_proj",),
        ),
        keep=(*NORMS, *QKV_BIASES, "mlp.gate.weight", "mlp.shared_expert_gate.weight"),
        experts=_EXPERTS,
        scalings=(
            *ATTENTION_SCALINGS,
            Scaling(
                "post_attention_layernorm",
                (
                    *MLP[0],
                    *EXPERT_INPUTS,
                    "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj",
                    "mlp.shared_expert_gate",
                ),
            ),
            UP_DOWN,
            EXPERT_UP_DOWN,
            Scaling("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
        ),
        heads=Heads(),
        channels=(
            Channels(),
            expert_channels("moe_intermediate_size", _EXPERTS),
            shared_channels("mlp.shared_expert", "shared_expert_intermediate_size", "shared_channels"),
        ),
    ),
    Family(
        "qwen3_moe",
        keep=(*NORMS, *QK_NORMS, *QKV_BIASES, "self_attn.o_proj.bias", "mlp.gate.weight"),
        experts=_EXPERTS,
        scalings=MIXED_SCALINGS,
        heads=Heads(),
        channels=(Channels(), expert_channels("moe_intermediate_size", _EXPERTS)),
    ),
)
