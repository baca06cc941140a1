"""What llama.cpp calls things: architectures, names of tensors, hyper-parameters and tokenizers, as values to be written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError

# model_type -> architecture; of these the files of `llama` have the rows of queries and keys in another order.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
_WITHIN = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# The expressions that split text before BPE, and what llama.cpp calls them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its name, the expert that it is of a stack, and the heads whose rows are reordered."""

    name: str
    expert: int | None = None
    heads: int = 0


def place(name: str, config: Mapping[str, Any]) -> Place | None:
    """Return where a tensor of a checkpoint goes, None where llama.cpp has no place for it."""
    owner, _, leaf = name.rpartition(".")
    if owner in _OUTER:
        return Place(f"{_OUTER[owner]}.{leaf}")
    if not owner.startswith("model.layers."):
        return None
    number, _, within = owner.removeprefix("model.layers.").partition(".")
    if not number.isdigit() or int(number) >= config["num_hidden_layers"]:
        return None
    base, _, matrix = within.rpartition(".")
    module, _, expert = base.rpartition(".")
    if module in ("mlp.experts", "block_sparse_moe.experts") and expert.isdigit() and matrix in _EXPERTS:
        return Place(f"blk.{number}.{_EXPERTS[matrix]}.{leaf}", int(expert))
    if within not in _WITHIN:
        return None
    heads = 0
    if ARCHITECTURES[config["model_type"]] == "llama" and within in ("self_attn.q_proj", "self_attn.k_proj"):
        query = within == "self_attn.q_proj"
        heads = config["num_attention_heads"] if query else kv_heads(config)
    return Place(f"blk.{number}.{_WITHIN[within]}.{leaf}", None, heads)


def kv_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_size(config: Mapping[str, Any]) -> int:
    """Columns of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def reorder(rows: Tensor, heads: int) -> Tensor:
    """Put the rows (out, ...) of queries or keys, in each head halves one after the other, into pairs one after the other."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous() if heads else rows


def check(config: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know of a config that fits. Raises FormatError where llama.cpp computes something else."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(f"config.json: model_type is {kind!r}; of what llama.cpp reads, gguf exports are written for {known}")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise FormatError(f"config.json: hidden_act is {act!r}; llama.cpp's {ARCHITECTURES[kind]} has silu")
    rope_type = rope(config)["rope_type"]
    if rope_type not in ("default", "linear", "llama3", "yarn"):
        raise FormatError(f"config.json: rope_type is {rope_type!r}; gguf exports are written for default, linear, llama3, yarn")
    sparse = config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")
    if sparse and "moe" in kind:
        raise FormatError("config.json: some layers have no experts (mlp_only_layers); llama.cpp expects them in all layers")
    normalised = {"qwen3_moe": True, "qwen2_moe": False}.get(kind)
    if normalised is not None and bool(config.get("norm_topk_prob", False)) != normalised:
        raise FormatError(
            f"config.json: norm_topk_prob is {config.get('norm_topk_prob', False)!r}; llama.cpp's {ARCHITECTURES[kind]} "
            f"{'always' if normalised else 'never'} normalises the router's weights"
        )
    notes = []
    if (window := window_of(config)) is not None:
        notes.append(f"context length {window}: attention sees no more, and llama.cpp has no window for this architecture")
    return notes


def window_of(config: Mapping[str, Any]) -> int | None:
    """The sliding window of attention where it is shorter than the context."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True) or window >= config["max_position_embeddings"]:
        return None
    return int(window)


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary embeddings, wherever a config has them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**found, "rope_theta": theta, "rope_type": found.get("rope_type") or found.get("type") or "default"}


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Return what the frequencies of Llama 3.1 and later are divided by, (head size / 2,) float32; None for other kinds."""
    found = rope(config)
    if found["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequency = 1.0 / found["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    turns = found["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the context it was trained on
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / found["factor"] + smooth)
    return factors.float()


def parameters(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return hyper-parameters by key, without the architecture's prefix."""
    context = window_of(config) or config["max_position_embeddings"]
    found = rope(config)
    values: dict[str, int | float | str] = {
        "block_count": config["num_hidden_layers"],
        "context_length": context,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": kv_heads(config),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "rope.dimension_count": head_size(config),
        "rope.freq_base": float(found["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if found["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": found["rope_type"], "rope.scaling.factor": float(found["factor"])}
    if found["rope_type"] == "yarn" and "original_max_position_embeddings" in found:
        values["rope.scaling.original_context_length"] = found["original_max_position_embeddings"]
    experts = config.get("num_local_experts", config.get("num_experts"))
    if experts:
        values |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    for key, name in (
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ):
        if key in config:
            values[name] = config[key]
    return values


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp has it."""

    model: str  # gpt2 or llama
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    add_space: bool | None = None


def vocabulary(tokenizer: Mapping[str, Any], size: int) -> Vocabulary:
    """Return the tokenizer of a tokenizer.json, filled up to `size` tokens. Raises FormatError for kinds that are not known."""
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise FormatError(f"tokenizer.json: model is {model.get('type')!r}; expected BPE, for gguf exports are written for that")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, NORMAL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    pieces = bool(model.get("byte_fallback"))
    if pieces:
        for text, number in model["vocab"].items():
            if len(text) == 6 and text.startswith("<0x"):
                types[number] = BYTE
        if (unknown := model.get("unk_token")) is not None:
            types[model["vocab"][unknown]] = UNKNOWN
    for token in tokenizer.get("added_tokens", []):
        number = token["id"]
        if number >= size:
            raise FormatError(f"tokenizer.json: the added token {token['content']!r} has id {number}; the model has {size} rows")
        tokens[number] = token["content"]
        if types[number] != UNKNOWN:
            types[number] = CONTROL if token.get("special") else USER_DEFINED
    if not pieces:
        return Vocabulary("gpt2", _split_of(tokenizer.get("pre_tokenizer") or {}), tokens, types, merges, None)
    # llama.cpp joins the pair of the highest score first, as BPE does that of the earliest merge.
    rank = {pair.replace(" ", "", 1): -float(number) for number, pair in reversed(list(enumerate(merges)))}
    scores = [rank.get(text, 0.0 if kind != NORMAL else -1e6) for text, kind in zip(tokens, types, strict=True)]
    parts = [tokenizer.get("normalizer") or {}, *((tokenizer.get("normalizer") or {}).get("normalizers") or [])]
    metaspace = tokenizer.get("pre_tokenizer") or {}
    before = any(part.get("type") == "Prepend" for part in parts) or metaspace.get("prepend_scheme") in ("always", "first")
    return Vocabulary("llama", "default", tokens, types, [], scores, before)


def _split_of(pre: Mapping[str, Any]) -> str:
    steps = pre.get("pretokenizers") or [pre]
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True):
        if steps[0].get("add_prefix_space"):
            raise FormatError("tokenizer.json: ByteLevel with add_prefix_space; llama.cpp's gpt-2 puts no space before a text")
        return "gpt-2"
    for step in steps:
        if step.get("type") == "Split" and (step.get("pattern") or {}).get("Regex") in _SPLITS:
            return _SPLITS[step["pattern"]["Regex"]]
    raise FormatError(
        "tokenizer.json: splits text by an expression that is not known; expected those of GPT-2, Llama 3 or Qwen2. "
        "Convert the tokenizer with llama.cpp's own converter, or use another format"
    )
