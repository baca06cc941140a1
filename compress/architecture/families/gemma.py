"""Gemma, also where it is the text part of a model that sees."""

from __future__ import annotations

from dataclasses import replace

from compress.architecture.families._shared import ATTENTION_SCALINGS, DECODER, QK_NORMS, UP_DOWN
from compress.architecture.family import MLP, NORMS, Scaling

_GEMMA = replace(
    DECODER,
    keep=(*NORMS, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
    scalings=(*ATTENTION_SCALINGS, Scaling("pre_feedforward_layernorm", MLP[0]), UP_DOWN),
    norm_offset=1.0,
    tied=True,
)
_GEMMA_3 = replace(_GEMMA, model_type="gemma3_text", keep=(*_GEMMA.keep, *QK_NORMS))

FAMILIES = (
    replace(_GEMMA, model_type="gemma2"),
    _GEMMA_3,
    _GEMMA_3.nested("gemma3", "language_model.", aside=("vision_tower.*", "multi_modal_projector.*")),
)
