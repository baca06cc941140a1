"""A tiny random checkpoint of nearly any model_type of transformers, made from its default config.

Every setting whose name says a size gets a small one; lists with an entry per block keep one block of each of the first kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLOCKS = 2
VOCABULARY = 96
_HIDDEN, _WIDE, _HEADS, _GROUPS, _HEAD = 64, 128, 4, 2, 16

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim_model_base", "block_dim", "conv_dim"), _HIDDEN
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "intermediate_size_mlp", "block_ff_dim", "ffn_hidden_size"), _WIDE),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads"), _GROUPS),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), BLOCKS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    # Low-rank attention, and its index.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "o_groups": 2,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # Short convolutions and state spaces.
    "linear_num_value_heads": 4,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 32),
    "rotary_dim": 8,
    # The rest, by maker.
    "sliding_window": 8,
    "attention_chunk_size": 16,
    "local_attention": 8,
    "original_max_position_embeddings": 64,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 32,
    "altup_num_inputs": 2,
    "laurel_rank": 32,
    "num_kv_shared_layers": 0,
    "kv_channels": 16,
    "num_nextn_predict_layers": 0,
}
_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "num_global_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 2),
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": _HIDDEN,
    "num_position_embeddings": 16,
    "vision_output_dim": 32,
}
_TOKENS = ("token_id", "token_index")


def _shrunk(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config with small sizes."""
    values: dict[str, Any] = config.to_dict()
    if values.get("per_layer_config"):  # by numbers of blocks
        values["per_layer_config"] = {str(BLOCKS - 1): {"head_dim": _HEAD}}
    before = values.get("num_hidden_layers", values.get("n_layer"))
    for key, value in list(values.items()):
        if isinstance(value, dict):
            if key == "rope_parameters" and any(word in config.model_type for word in ("vl", "4v", "46v", "ocr", "omni")):
                values[key] = {**value, "mrope_section": [2, 3, 3]}  # parts of half a head
            continue
        if isinstance(value, list) and isinstance(before, int) and before > BLOCKS and len(value) == before:
            kinds = list(dict.fromkeys(map(str, value)))[:BLOCKS]
            firsts = [next(v for v in value if str(v) == kind) for kind in kinds]
            values[key] = [sizes[key]] * BLOCKS if key in sizes else (firsts * BLOCKS)[:BLOCKS]
        elif key in sizes and (value is not None or key == "head_dim"):
            values[key] = sizes[key]
    return values


def any_config(model_type: str, **changes: Any) -> Any:
    """Return the config of a small model of this type; `changes` are those of its language model."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    if getattr(config, "text_config", None) is None or not hasattr(config.text_config, "to_dict"):
        values = {**_shrunk(config, _SIZES), **changes}
        for key in ("model_type", "transformers_version"):
            values.pop(key, None)
        return type(config)(**values)
    parts: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        part = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(part, "to_dict"):
            parts[key] = _shrunk(part, _SIZES if key == "text_config" else _VISION)
        elif key.endswith(_TOKENS):
            parts[key] = 0
    parts["text_config"] |= changes
    return AutoConfig.for_model(model_type, **parts)


def any_checkpoint(folder: Path, model_type: str, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """Write a tiny model of this type into `folder` and return it; weights are large enough to make every path matter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = any_config(model_type, **changes)
    torch.manual_seed(seed)
    # Of a model that sees, all of it, also where its language model has a class of its own.
    build: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = build.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.05)
            elif "embed" not in name and "conv" not in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.eval().save_pretrained(folder)
    return folder
