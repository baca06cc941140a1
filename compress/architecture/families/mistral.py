"""Mistral and Mixtral."""

from __future__ import annotations

from dataclasses import replace

from compress.architecture.families._shared import ATTENTION_SCALINGS, DECODER, expert_channels
from compress.architecture.family import ATTENTION, NORMS, Experts, Family, Heads, Scaling

_EXPERTS = Experts(
    "block_sparse_moe.experts",
    "mlp.experts",
    ("w1", "w3"),
    "w2",
    routers=("block_sparse_moe.gate.weight",),
)

FAMILIES = (
    replace(DECODER, model_type="mistral"),
    Family(
        "mixtral",
        taps=ATTENTION,
        keep=(*NORMS, "block_sparse_moe.gate.weight"),
        experts=_EXPERTS,
        scalings=(
            *ATTENTION_SCALINGS,
            Scaling(
                "post_attention_layernorm",
                ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3", "block_sparse_moe.gate"),
            ),
            Scaling("block_sparse_moe.experts.*.w3", ("block_sparse_moe.experts.*.w2",)),
        ),
        heads=Heads(),
        channels=(expert_channels("intermediate_size", _EXPERTS),),
        renames=(("block_sparse_moe.", "mlp."),),
    ),
)
