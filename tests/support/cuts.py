"""Cutting a model as a test does, and what transformers makes of any checkpoint: loaded whole, and its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.recipe.data import Data
from compress.structured_pruning import cut as cutting
from compress.structured_pruning.sizes import Wish


def quiet(*_: Any) -> None:
    pass


def made(model: Path, out: Path, ids: Path, anew: bool = False, **wish: Any) -> dict[str, Any]:
    return cutting.cut(str(model), out, Wish(**wish), Data(name=str(ids)), "cpu", quiet, anew)


def loaded(folder: Path) -> Any:
    """The model of a checkpoint in float32; no key may be missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found
