"""`pattern`: a `Pattern` part as bytes, a mask that keeps N of every M.

choice  I32 (words,)   the combination that each group keeps, row by row, in fields of ceil(log2 (M choose N)) bits: 3 for 2:4

Combinations are numbered in lexicographic order of the positions kept: for 2:4 they are 01, 02, 03, 12, 13, 23.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights import bit_stream as _bits
from compress.weights.mask import Pattern, choice_bits

_KEYS = ("format", "kept", "of")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class PatternFormat:
    """The bijection between a Pattern part and named tensors."""

    name = "pattern"
    part = Pattern
    roles = ("keep",)

    def describe(self, part: Pattern) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        return {"format": self.name, "kept": part.kept, "of": part.of}

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        return f"{described['kept']}:{described['of']}"

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"pattern: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        kept, of, (rows, columns) = described.get("kept"), described.get("of"), shape
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in (kept, of)):
            raise FormatError(f"pattern: kept and of are {kept!r:.80} and {of!r:.80}; expected whole numbers, as 2 and 4")
        n, m = cast(int, kept), cast(int, of)
        if not 0 < n < m <= 8 or columns % m:
            raise FormatError(f"pattern: {n!s:.40} of {m!s:.40} are kept; expected fewer of at most 8, which divide in={columns}")
        return {"choice": (torch.int32, (_bits.words(rows * (columns // m), choice_bits(n, m)),))}

    def pack(self, part: Pattern) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        return {"choice": _bits.pack(part.choice, choice_bits(part.kept, part.of))}

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        self._choice(described, shape, tensors["choice"])

    def _choice(self, described: dict[str, Any], shape: tuple[int, int], stored: Tensor) -> Tensor:
        """Return the combination of each group (out, groups). Raises FormatError where there is no such combination."""
        kept, of = described["kept"], described["of"]
        groups = shape[1] // of
        choice = _bits.unpack(stored, choice_bits(kept, of), shape[0] * groups).view(shape[0], groups)
        if not bool((choice < math.comb(of, kept)).all()):
            raise FormatError(f"pattern: choice names more than the {math.comb(of, kept)} combinations; the file is damaged")
        return choice

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> Pattern:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        return Pattern(self._choice(described, shape, tensors["choice"]), described["kept"], described["of"])

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop; `start`, a multiple of 32, begins on a word."""
        groups, bits = shape[1] // described["of"], choice_bits(described["kept"], described["of"])
        return described, {"choice": tensors["choice"][start * groups * bits // 32 : _bits.words(stop * groups, bits)]}


FORMAT = PatternFormat()
