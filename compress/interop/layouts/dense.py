"""Plain numbers: what every loader of Hugging Face checkpoints reads, in the room that the numbers take as they are.

    weight  (out, in), the decoded values

Values of a pruned weight that nothing was added to are in the type that they are stored in, all others in float32, the smallest
type that holds products of codes and scales exactly. There is no `quantization_config`. A loader that is told bfloat16, as the
configs of most models say, rounds to it, as our own runtime does there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.weights.dense import DENSE_DTYPES
from compress.weights.dense import Dense as Values
from compress.weights.weight import CompressedWeight

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Plain:
    """How a site is stored."""

    shape: tuple[int, int]  # (out, in)
    scale: str  # dtype of the values: there are no scales


class Dense:
    """The layout of models that nobody has compressed."""

    name = "dense"
    holds = "every weight, as plain numbers"
    scales: tuple[str, ...] = ()

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Plain:
        """Return how a described site is stored; a transform is multiplied out. Raises FormatError where inputs are rounded."""
        if "activation" in spec.get("input", {}):
            raise FormatError("has inputs that are rounded before the product, which plain numbers cannot say")
        rows, columns = spec["shape"]
        plain = spec["base"]["format"] == "dense" and set(spec) <= {"shape", "base", "keep"}
        return Plain((rows, columns), spec["base"].get("dtype", "F32") if plain else "F32")

    def layout(self, scheme: Plain) -> Layout:
        """Return dtype and shape of the tensors of a site."""
        return {"weight": (DENSE_DTYPES[scheme.scale], scheme.shape)}

    def tensors(self, scheme: Plain, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site."""
        return {"weight": weight.dequantize().to(DENSE_DTYPES[scheme.scale])}

    def config(self, schemes: Mapping[str, Plain], dense: Sequence[str], head: str) -> dict[str, Any]:
        """There is no `quantization_config`."""
        return {}

    def files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return JSON files beside config.json: none."""
        return {}

    def weight(self, tensor: Tensor) -> CompressedWeight:
        """Return a stored tensor (out, in) as the weight that it is."""
        return CompressedWeight(Values(tensor))


EXPORT = Dense()
