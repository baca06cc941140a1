"""`two_level`: a `TwoLevel` part as bytes. Codes of weights, scales and zeros are dense bit streams without padding between rows.

codes        I32 (words,)            the codes row by row: (out * in * bits) bits, rounded up to one word
scale_code   I32 (words,)            scale codes row by row, (out * groups * scale_bits) bits
zero_code    I32 (words,)            zero codes row by row, (out * groups * zero_bits) bits
scale_top    BF16 (tiles, groups)    largest scale of 16 rows; the last tile may have fewer rows
scale_step   U8 (tiles, groups)
zero_offset  U8 (tiles, groups)
zero_step    U8 (tiles, groups)
group        U8, I16 or I32 (in,)    group of each column, only if a group's columns are not adjacent
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights import bit_stream as _bits
from compress.weights.two_level import TILE, TwoLevel, tiles

_GROUP_DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}
_GROUP_NAMES = {dtype: name for name, dtype in _GROUP_DTYPES.items()}
_WIDTHS = {"bits": (1, 8), "scale_bits": (2, 8), "zero_bits": (2, 8)}
_KEYS = ("format", *_WIDTHS, "group_size", "group")
_TILED = {"scale_top": torch.bfloat16, "scale_step": torch.uint8, "zero_offset": torch.uint8, "zero_step": torch.uint8}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _streams(described: dict[str, Any], columns: int) -> dict[str, tuple[int, int]]:
    """Return the fields per row of each bit stream, and their width."""
    groups = columns // described["group_size"]
    return {
        "codes": (columns, described["bits"]),
        "scale_code": (groups, described["scale_bits"]),
        "zero_code": (groups, described["zero_bits"]),
    }


class TwoLevelPack:
    """The bijection between a TwoLevel part and named tensors."""

    name = "two_level"
    part = TwoLevel
    roles = ("base",)

    def describe(self, part: TwoLevel) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        described: dict[str, Any] = {"format": self.name, **{key: getattr(part, key) for key in (*_WIDTHS, "group_size")}}
        if part.group is not None:
            described["group"] = _GROUP_NAMES[part.group.dtype]
        return described

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        scattered = " scattered" if "group" in described else ""
        grids = f"{described['scale_bits']}-bit scales, {described['zero_bits']}-bit zeros"
        return f"{described['bits']}-bit g{described['group_size']}, {grids}{scattered}"

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        rows, columns = shape
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"two_level: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        for key, (low, high) in _WIDTHS.items():
            value = described.get(key)
            if not (_whole(value) and low <= value <= high):
                raise FormatError(
                    f"two_level: {key} is {value!r:.80}; expected {low} to {high}. The config does not belong to these weights"
                )
        size = described.get("group_size")
        if not (_whole(size) and 0 < size <= columns and columns % size == 0):
            raise FormatError(f"two_level: group_size is {size!r:.80}; expected a divisor of in={columns}")
        layout: Layout = {
            name: (torch.int32, (_bits.words(rows * fields, width),))
            for name, (fields, width) in _streams(described, columns).items()
        }
        layout |= {name: (dtype, (tiles(rows), columns // size)) for name, dtype in _TILED.items()}
        if "group" in described:
            if not isinstance(described["group"], str) or described["group"] not in _GROUP_DTYPES:
                raise FormatError(f"two_level: group is {described['group']!r:.80}; expected one of {', '.join(_GROUP_DTYPES)}")
            layout["group"] = (_GROUP_DTYPES[described["group"]], (columns,))
        return layout

    def pack(self, part: TwoLevel) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        streams = _streams(self.describe(part), part.shape[1])
        tensors = {name: _bits.pack(getattr(part, name), width) for name, (_, width) in streams.items()}
        tensors |= {name: getattr(part, name).contiguous() for name in _TILED}
        if part.group is not None:
            tensors["group"] = part.group.contiguous()
        return tensors

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        if "group" in described:
            _fit.check_groups(self.name, tensors["group"], shape[1] // described["group_size"])

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> TwoLevel:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        layout = self.layout(described, shape)
        self.check(described, shape, tensors)
        rows, columns = shape
        group = tensors["group"] if "group" in layout else None
        fields: dict[str, Any] = {
            name: _bits.unpack(tensors[name], width, rows * count).view(rows, count)
            for name, (count, width) in _streams(described, columns).items()
        }
        widths: dict[str, Any] = {key: described[key] for key in (*_WIDTHS, "group_size")}
        fields |= {name: tensors[name] for name in _TILED} | widths
        return TwoLevel(**fields, group=group)

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop; `start`, a multiple of 32, begins on a word in each stream."""
        cut = dict(tensors)
        for name, (fields, width) in _streams(described, shape[1]).items():
            cut[name] = tensors[name][start * fields * width // 32 : _bits.words(stop * fields, width)]
        for name in _TILED:
            cut[name] = tensors[name][start // TILE : tiles(stop)]
        return described, cut


FORMAT = TwoLevelPack()
