"""`low_rank`: a `LowRank` part as bytes, the two factors unchanged.

left   BF16, F16 or F32 (out, rank)
right  the same type, (rank, in)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights.dense import DENSE_DTYPES
from compress.weights.low_rank import LowRank

_NAMES = {dtype: name for name, dtype in DENSE_DTYPES.items()}
_KEYS = ("format", "dtype", "rank")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Factors:
    """The bijection between a LowRank part and named tensors."""

    name = "low_rank"
    part = LowRank
    roles = ("low_rank",)

    def describe(self, part: LowRank) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        return {"format": self.name, "dtype": _NAMES[part.left.dtype], "rank": part.rank}

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        return f"rank {described['rank']} {described['dtype']}"

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"low_rank: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        dtype, rank, (rows, columns) = described.get("dtype"), described.get("rank"), shape
        if not (isinstance(dtype, str) and dtype in DENSE_DTYPES):
            raise FormatError(f"low_rank: dtype is {dtype!r:.80}; expected one of {', '.join(DENSE_DTYPES)}")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= columns:
            raise FormatError(f"low_rank: rank is {rank!r:.80}; expected 1 to in={columns}")
        return {"left": (DENSE_DTYPES[dtype], (rows, rank)), "right": (DENSE_DTYPES[dtype], (rank, columns))}

    def pack(self, part: LowRank) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        return {"left": part.left.contiguous(), "right": part.right.contiguous()}

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> LowRank:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        self.check(described, shape, tensors)
        return LowRank(tensors["left"], tensors["right"])

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop."""
        return described, {"left": tensors["left"][start:stop], "right": tensors["right"]}


FORMAT = Factors()
