"""Llama."""

from __future__ import annotations

from dataclasses import replace

from compress.architecture.families._shared import ATTENTION_BIASES, DECODER, QKV_BIASES
from compress.architecture.family import MLP, NORMS

FAMILIES = (
    replace(
        DECODER,
        model_type="llama",
        keep=(*NORMS, *QKV_BIASES, "self_attn.o_proj.bias", "mlp.*_proj.bias"),
        biases=(ATTENTION_BIASES, ("mlp_bias", (*MLP[0], *MLP[1]))),
    ),
)
