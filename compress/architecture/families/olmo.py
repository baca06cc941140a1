"""OLMoE."""

from __future__ import annotations

from compress.architecture.families._shared import MIXED_SCALINGS, QK_NORMS, expert_channels
from compress.architecture.family import ATTENTION, NORMS, Experts, Family

_EXPERTS = Experts()

FAMILIES = (
    Family(
        "olmoe",
        taps=ATTENTION,
        keep=(*NORMS, *QK_NORMS, "mlp.gate.weight"),
        experts=_EXPERTS,
        scalings=MIXED_SCALINGS,
        channels=(expert_channels("intermediate_size", _EXPERTS),),  # no heads: norms over all of them
    ),
)
