"""Devices and dtypes by the names that people give them."""

from __future__ import annotations

import torch

from compress.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device of a name such as auto, cpu, cuda or cuda:1. Raises RecipeError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: not a device; expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    return device
