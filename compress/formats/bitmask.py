"""`bitmask`: a `Bitmask` part as bytes.

bits  I32 (words,)   one bit per run of `size` columns, row by row, 1 for kept; a dense stream
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights import bit_stream as _bits
from compress.weights.mask import Bitmask

_KEYS = ("format", "size")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class BitmaskFormat:
    """The bijection between a Bitmask part and named tensors."""

    name = "bitmask"
    part = Bitmask
    roles = ("keep",)

    def describe(self, part: Bitmask) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        return {"format": self.name, "size": part.size}

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        return "mask" if described["size"] == 1 else f"mask of {described['size']}s"

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"bitmask: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        size, (rows, columns) = described.get("size"), shape
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= columns or columns % size:
            raise FormatError(f"bitmask: size is {size!r:.80}; expected a divisor of in={columns}")
        return {"bits": (torch.int32, (_bits.words(rows * (columns // size), 1),))}

    def pack(self, part: Bitmask) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        return {"bits": _bits.pack(part.kept.to(torch.uint8), 1)}

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> Bitmask:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        self.check(described, shape, tensors)
        runs = shape[1] // described["size"]
        return Bitmask(_bits.unpack(tensors["bits"], 1, shape[0] * runs).view(shape[0], runs).bool(), described["size"])

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop; `start`, a multiple of 32, begins on a word."""
        runs = shape[1] // described["size"]
        return described, {"bits": tensors["bits"][start * runs // 32 : _bits.words(stop * runs, 1)]}


FORMAT = BitmaskFormat()
