"""DeepSeek, with latent attention."""

from __future__ import annotations

from compress.architecture.families._shared import EXPERT_INPUTS, EXPERT_UP_DOWN, UP_DOWN, expert_channels, shared_channels
from compress.architecture.family import MLP, NORMS, Channels, Experts, Family, Heads, Scaling

_EXPERTS = Experts(routers=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))
_QUERIES = ("self_attn.q_proj", "self_attn.q_a_proj")  # smaller models project queries in one step

FAMILIES = (
    Family(
        "deepseek_v3",
        taps=(
            (*_QUERIES, "self_attn.kv_a_proj_with_mqa"),
            ("self_attn.q_b_proj",),
            ("self_attn.kv_b_proj",),
            ("self_attn.o_proj",),
            *MLP,
            ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            ("mlp.shared_experts.down_proj",),
        ),
        alternatives=(_QUERIES,),
        keep=(
            *NORMS,
            "self_attn.q_a_layernorm.weight",
            "self_attn.kv_a_layernorm.weight",
            "self_attn.*.bias",
            "mlp.gate.weight",
            "mlp.gate.e_score_correction_bias",
        ),
        experts=_EXPERTS,
        scalings=(
            Scaling("input_layernorm", (*_QUERIES, "self_attn.kv_a_proj_with_mqa")),
            Scaling("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
            Scaling("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
            Scaling("self_attn.kv_b_proj", ("self_attn.o_proj",), "interleaved"),
            Scaling(
                "post_attention_layernorm",
                (*MLP[0], *EXPERT_INPUTS, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            ),
            UP_DOWN,
            EXPERT_UP_DOWN,
            Scaling("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
        ),
        heads=Heads(("self_attn.q_proj", "self_attn.q_b_proj"), ("self_attn.kv_b_proj",), setting=None),
        channels=(
            Channels(),
            expert_channels("moe_intermediate_size", _EXPERTS),
            shared_channels("mlp.shared_experts", "moe_intermediate_size", "expert_channels"),
        ),
    ),
)
