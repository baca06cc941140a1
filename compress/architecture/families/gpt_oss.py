"""gpt-oss, whose experts are fused on disk."""

from __future__ import annotations

from compress.architecture.families._shared import ATTENTION_SCALINGS, expert_channels
from compress.architecture.family import ATTENTION, NORMS, Experts, Family, Heads, Scaling

_EXPERTS = Experts(inputs=("gate_up_proj",), fused=True, routers=("mlp.router.weight", "mlp.router.bias"))

FAMILIES = (
    Family(
        "gpt_oss",
        taps=ATTENTION,
        keep=(*NORMS, "self_attn.*.bias", "self_attn.sinks", "mlp.router.*", "mlp.experts.*_bias"),
        experts=_EXPERTS,
        scalings=(  # none from gate_up_proj to down_proj: what lies between clamps and adds one
            *ATTENTION_SCALINGS,
            Scaling("post_attention_layernorm", ("mlp.experts.*.gate_up_proj", "mlp.router")),
        ),
        heads=Heads(single=("self_attn.sinks",)),
        channels=(expert_channels("intermediate_size", _EXPERTS, "pairs"),),
    ),
)
