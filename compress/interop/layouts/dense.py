"""Plain numbers: what every loader of Hugging Face checkpoints reads, in the room that the numbers take as they are.

    weight  (out, in), the decoded values

Values of a pruned weight that nothing was added to are in the type that they are stored in, all others in float32, the smallest
type that holds products of codes and scales exactly. There is no `quantization_config`. A loader that is told bfloat16, as the
configs of most models say, rounds to it, as our own runtime does there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import read_tensor
from compress.errors import FormatError
from compress.interop.layout import Layout, Tensors
from compress.weights.dense import DENSE_DTYPES
from compress.weights.dense import Dense as Values
from compress.weights.weight import CompressedWeight


@dataclass(frozen=True)
class Plain:
    """How a site is stored."""

    shape: tuple[int, int]  # (out, in)
    scale: str  # dtype of the values: there are no scales


class Dense(Layout[Plain]):
    """The layout of models that were never compressed."""

    name = "dense"
    holds = "every weight, as plain numbers"
    readers = "whatever reads the original"
    plain = True

    def scheme(self, spec: Mapping[str, Any], scale: str | None) -> Plain:
        """Return how a described site is stored; a transform is multiplied out. Raises FormatError where inputs are rounded."""
        if "activation" in spec.get("input", {}):
            raise FormatError("has inputs that are rounded before the product, which plain numbers cannot say")
        rows, columns = spec["shape"]
        plain = spec["base"]["format"] == "dense" and set(spec) <= {"shape", "base", "keep"}
        return Plain((rows, columns), spec["base"].get("dtype", "F32") if plain else "F32")

    def layout(self, scheme: Plain) -> Tensors:
        """Return dtype and shape of the tensors of a site."""
        return {"weight": (DENSE_DTYPES[scheme.scale], scheme.shape)}

    def tensors(self, scheme: Plain, weight: CompressedWeight) -> dict[str, Tensor]:
        """Return the tensors of a site."""
        return {"weight": weight.dequantize().to(DENSE_DTYPES[scheme.scale])}

    def weights(self, folder: Path, sites: Iterable[str]) -> Iterator[tuple[str, CompressedWeight]]:
        """Yield those of some sites that a checkpoint has, as the numbers that they are. Raises CheckpointError."""
        entries = Source.open(folder).entries
        for site in sites:
            if (entry := entries.get(f"{site}.weight")) is not None:
                yield site, CompressedWeight(Values(read_tensor(entry)))


EXPORT = Dense()
