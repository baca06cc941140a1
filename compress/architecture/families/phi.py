"""Phi."""

from __future__ import annotations

from compress.architecture.family import Channels, Family, Heads, Scaling

FAMILIES = (
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
)
