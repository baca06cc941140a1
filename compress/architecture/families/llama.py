"""The families that are written down."""

from __future__ import annotations

from typing import Any, Literal

from compress.architecture.family import _ATTENTION, _MLP, _NORMS, Channels, Experts, Family, Heads, Rows, Scaling

_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_GEMMA_NORMS = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
_QKV_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")


_ATTENTION_SCALINGS = (
    Scaling("input_layernorm", _ATTENTION[0]),
    Scaling("self_attn.v_proj", _ATTENTION[1], "values"),
)
_MLP_NORM = Scaling("post_attention_layernorm", _MLP[0])
_UP_DOWN = Scaling("mlp.up_proj", _MLP[1])
_SCALINGS = (*_ATTENTION_SCALINGS, _MLP_NORM, _UP_DOWN)
_GEMMA_SCALINGS = (*_ATTENTION_SCALINGS, Scaling("pre_feedforward_layernorm", _MLP[0]), _UP_DOWN)
_EXPERT_INPUTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate")
_EXPERT_UP_DOWN = Scaling("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
_MIXED_SCALINGS = (
    *_ATTENTION_SCALINGS,
    Scaling("post_attention_layernorm", (*_MLP[0], *_EXPERT_INPUTS)),
    _UP_DOWN,
    _EXPERT_UP_DOWN,
)


_USUAL_EXPERTS = Experts()
_MIXTRAL_EXPERTS = Experts(
    "block_sparse_moe.experts",
    "mlp.experts",
    ("w1", "w3"),
    "w2",
    routers=("block_sparse_moe.gate.weight",),
)
_DEEPSEEK_EXPERTS = Experts(routers=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))
_FUSED_EXPERTS = Experts(inputs=("gate_up_proj",), fused=True, routers=("mlp.router.weight", "mlp.router.bias"))
_ATTENTION_BIASES = ("attention_bias", (*_ATTENTION[0], *_ATTENTION[1]))
_CUTS: Any = {"heads": Heads(), "channels": (Channels(),)}


def _expert_channels(setting: str = "moe_intermediate_size", layout: Experts = _USUAL_EXPERTS, rows: Rows = "one") -> Channels:
    """The channels of experts."""
    inputs = tuple(f"{layout.disk}.{name}" for name in layout.inputs)
    return Channels(inputs, f"{layout.disk}.{layout.output}", setting, "expert_channels", rows)


def _shared_channels(module: str, setting: str, size: Literal["expert_channels", "shared_channels"]) -> Channels:
    """The channels of experts that see all tokens."""
    return Channels((f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj", setting, size)


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            keep=(*_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias", "mlp.*_proj.bias"),
            scalings=_SCALINGS,
            biases=(_ATTENTION_BIASES, ("mlp_bias", (*_MLP[0], *_MLP[1]))),
            **_CUTS,
        ),
        Family("mistral", scalings=_SCALINGS, **_CUTS),
        Family("qwen2", keep=(*_NORMS, *_QKV_BIASES), scalings=_SCALINGS, **_CUTS),
        Family(
            "qwen3",
            keep=(*_NORMS, *_QK_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias"),
            scalings=_SCALINGS,
            biases=(_ATTENTION_BIASES,),
            **_CUTS,
        ),
        Family("gemma2", keep=(*_NORMS, *_GEMMA_NORMS), scalings=_GEMMA_SCALINGS, norm_offset=1.0, tied=True, **_CUTS),
        Family(
            "gemma3_text",
            keep=(*_NORMS, *_QK_NORMS, *_GEMMA_NORMS),
            scalings=_GEMMA_SCALINGS,
            norm_offset=1.0,
            tied=True,
            **_CUTS,
        ),
        Family(
            "gemma3",  # the text of a model that also sees
            keep=(*_NORMS, *_QK_NORMS, *_GEMMA_NORMS),
            scalings=_GEMMA_SCALINGS,
            norm_offset=1.0,
            blocks="language_model.model.layers",
            outer=("language_model.model.embed_tokens.weight", "language_model.model.norm.weight"),
            head="language_model.lm_head",
            aside=("vision_tower.*", "multi_modal_projector.*"),
            tied=True,
            renames=(("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")),
            prefix="",
            **_CUTS,
        ),
        Family(
            "phi3",
            taps=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
            scalings=(
                Scaling("input_layernorm", ("self_attn.qkv_proj",)),
                Scaling("self_attn.qkv_proj", ("self_attn.o_proj",), "stacked"),
                Scaling("post_attention_layernorm", ("mlp.gate_up_proj",)),
                Scaling("mlp.gate_up_proj", ("mlp.down_proj",), "second half"),
            ),
            heads=Heads((), (), joint="self_attn.qkv_proj"),
            channels=(Channels(("mlp.gate_up_proj",), rows="halves"),),
        ),
        Family(
            "opt",
            taps=(_ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)),
            keep=("self_attn.*.bias", "fc?.bias", "self_attn_layer_norm.*", "final_layer_norm.*"),
            scalings=(
                # Norms that follow what they belong to give the residual stream, which the whole rest of the model reads.
                Scaling("self_attn_layer_norm", _ATTENTION[0], where=(("do_layer_norm_before", True),)),
                Scaling("self_attn.v_proj", ("self_attn.out_proj",), "values"),
                Scaling("final_layer_norm", ("fc1",), where=(("do_layer_norm_before", True),)),
                Scaling("fc1", ("fc2",), where=(("activation_function", "relu"),)),
            ),
            channels=(Channels(("fc1",), "fc2", "ffn_dim"),),  # no heads: their size follows from their number
            blocks="model.decoder.layers",
            tied=True,
            outer=("model.decoder.embed_*.weight", "model.decoder.final_layer_norm.*", "model.decoder.project_*.weight"),
        ),
        Family(
            "gpt2",
            taps=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
            keep=("attn.c_*.bias", "mlp.c_*.bias", "ln_?.*"),
            scalings=(
                Scaling("ln_1", ("attn.c_attn",)),
                Scaling("attn.c_attn", ("attn.c_proj",), "stacked"),
                Scaling("ln_2", ("mlp.c_fc",)),
                Scaling("mlp.c_fc", ("mlp.c_proj",), where=(("activation_function", "relu"),)),
            ),
            channels=(Channels(("mlp.c_fc",), "mlp.c_proj", "n_inner", width="n_embd"),),  # heads as with opt
            blocks="transformer.h",
            outer=("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.*"),
            drop=("*.attn.bias", "*.attn.masked_bias"),
            transposed=True,
            tied=True,
            prefix="transformer.",
        ),
        Family(
            "mixtral",
            taps=_ATTENTION,
            keep=(*_NORMS, "block_sparse_moe.gate.weight"),
            experts=_MIXTRAL_EXPERTS,
            scalings=(
                *_ATTENTION_SCALINGS,
                Scaling(
                    "post_attention_layernorm",
                    ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3", "block_sparse_moe.gate"),
                ),
                Scaling("block_sparse_moe.experts.*.w3", ("block_sparse_moe.experts.*.w2",)),
            ),
            heads=Heads(),
            channels=(_expert_channels("intermediate_size", _MIXTRAL_EXPERTS),),
            renames=(("block_sparse_moe.", "mlp."),),
        ),
        Family(
            "qwen2_moe",
            taps=(
                *_ATTENTION,
                *_MLP,
                ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                ("mlp.shared_expert.down_proj",),
            ),
            keep=(*_NORMS, *_QKV_BIASES, "mlp.gate.weight", "mlp.shared_expert_gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=(
                *_ATTENTION_SCALINGS,
                Scaling(
                    "post_attention_layernorm",
                    (
                        *_MLP[0],
                        *_EXPERT_INPUTS,
                        "mlp.shared_expert.gate_proj",
                        "mlp.shared_expert.up_proj",
                        "mlp.shared_expert_gate",
                    ),
                ),
                _UP_DOWN,
                _EXPERT_UP_DOWN,
                Scaling("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
            ),
            heads=Heads(),
            channels=(
                Channels(),
                _expert_channels(),
                _shared_channels("mlp.shared_expert", "shared_expert_intermediate_size", "shared_channels"),
            ),
        ),
        Family(
            "qwen3_moe",
            keep=(*_NORMS, *_QK_NORMS, *_QKV_BIASES, "self_attn.o_proj.bias", "mlp.gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=_MIXED_SCALINGS,
            heads=Heads(),
            channels=(Channels(), _expert_channels()),
        ),
        Family(
            "olmoe",
            taps=_ATTENTION,
            keep=(*_NORMS, *_QK_NORMS, "mlp.gate.weight"),
            experts=_USUAL_EXPERTS,
            scalings=_MIXED_SCALINGS,
            channels=(_expert_channels("intermediate_size"),),  # no heads: norms over all of them
        ),
        Family(
            "deepseek_v3",
            taps=(
                ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
                ("self_attn.q_b_proj",),
                ("self_attn.kv_b_proj",),
                ("self_attn.o_proj",),
                *_MLP,
                ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                ("mlp.shared_experts.down_proj",),
            ),
            keep=(
                *_NORMS,
                "self_attn.q_a_layernorm.weight",
                "self_attn.kv_a_layernorm.weight",
                "self_attn.*.bias",
                "mlp.gate.weight",
                "mlp.gate.e_score_correction_bias",
            ),
            experts=_DEEPSEEK_EXPERTS,
            scalings=(
                Scaling("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
                Scaling("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
                Scaling("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
                Scaling("self_attn.kv_b_proj", ("self_attn.o_proj",), "interleaved"),
                Scaling(
                    "post_attention_layernorm",
                    (*_MLP[0], *_EXPERT_INPUTS, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
                ),
                _UP_DOWN,
                _EXPERT_UP_DOWN,
                Scaling("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
            ),
            heads=Heads(("self_attn.q_proj", "self_attn.q_b_proj"), ("self_attn.kv_b_proj",), setting=None),
            channels=(
                Channels(),
                _expert_channels(),
                _shared_channels("mlp.shared_experts", "moe_intermediate_size", "expert_channels"),
            ),
        ),
        Family(
            "gpt_oss",
            taps=_ATTENTION,
            keep=(*_NORMS, "self_attn.*.bias", "self_attn.sinks", "mlp.router.*", "mlp.experts.*_bias"),
            experts=_FUSED_EXPERTS,
            scalings=(  # none from gate_up_proj to down_proj: what lies between clamps and adds one
                *_ATTENTION_SCALINGS,
                Scaling("post_attention_layernorm", ("mlp.experts.*.gate_up_proj", "mlp.router")),
            ),
            heads=Heads(single=("self_attn.sinks",)),
            channels=(_expert_channels("intermediate_size", _FUSED_EXPERTS, "pairs"),),
        ),
    )
}

# What holds for every family that is inferred: names on disk are those of the model, and experts have the usual layout.
INFERRED = Family("", taps=(), keep=(), experts=_USUAL_EXPERTS, blocks="", prefix="")
