"""Tiny randomly initialised checkpoints, one per model family, built from configs with a fixed seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# What each family needs beyond the common settings; None removes a common one.
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "gemma3": {},  # made of gemma3_text and a vision tower
    "phi3": {},
    "opt": {
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "intermediate_size": None,
        "num_key_value_heads": None,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_positions": 128, "intermediate_size": None, "num_key_value_heads": None, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
}


def tiny_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    if family == "gemma3":
        vision = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        text = tiny_config("gemma3_text", **changes).to_dict()
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    settings = {k: v for k, v in {**_COMMON, **TINY[family], **changes}.items() if v is not None}
    return AutoConfig.for_model(family, **settings)


def tiny_checkpoint(folder: Path, family: str, seed: int = 0, max_shard_size: str = "50GB", **changes: Any) -> Path:
    """Write a tiny model of `family` into `folder` and return it; weights are large enough to make every path matter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Default initialisation leaves biases zero and norms one; random ones show a dropped or swapped tensor.
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif "embed" not in name and "wte" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
