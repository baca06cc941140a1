"""`bitpack`: a `Uniform` part as bytes. Codes and zero codes are dense bit streams of width 1 to 8, without padding between rows.

    codes   I32 (words,)            the codes row by row: (out * in * bits) bits, rounded up to one word
    scale   BF16 (out, groups)      F16 or F32 where the description says so: what other tools have made stays as it is
    zero    I32 (words,)            zero codes row by row, only on asymmetric grids
    offset  BF16 (out, groups)      added to the values of a group, only where there are such
    group   U8, I16 or I32 (in,)    group of each column, only where columns of a group are not neighbours

Where `in * bits` is a multiple of 32 every row begins on a word, which is the layout that kernels read.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _bits
from compress.parts.uniform import Uniform

_GROUP_DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}
_GROUP_NAMES = {dtype: name for name, dtype in _GROUP_DTYPES.items()}
_SCALE_DTYPES = {"F16": torch.float16, "F32": torch.float32}  # beside bfloat16, which needs no word
_SCALE_NAMES = {dtype: name for name, dtype in _SCALE_DTYPES.items()}
_KEYS = ("format", "bits", "group_size", "zero", "group", "offset", "bipolar", "scale")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


class BitPack:
    """The bijection between a Uniform part and named tensors."""

    name = "bitpack"
    part = Uniform
    roles = ("base",)

    def describe(self, part: Uniform) -> dict[str, Any]:
        """Return what, beside the tensors, is needed to read them: JSON values that go into the model's config."""
        described: dict[str, Any] = {
            "format": self.name,
            "bits": part.bits,
            "group_size": part.group_size,
            "zero": part.zero is not None,
        }
        if part.group is not None:
            described["group"] = _GROUP_NAMES[part.group.dtype]
        if part.offset is not None:
            described["offset"] = True
        if part.bipolar:
            described["bipolar"] = True
        if part.scale.dtype != torch.bfloat16:
            described["scale"] = _SCALE_NAMES[part.scale.dtype]
        return described

    def short(self, described: dict[str, Any]) -> str:
        """Return how a part is stored, in a few words for a table."""
        more = (" with zeros", "zero"), (" with offsets", "offset"), (" bipolar", "bipolar"), (" scattered", "group")
        return f"{described['bits']}-bit g{described['group_size']}" + "".join(text for text, key in more if described.get(key))

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        bits, group_size, zero = described.get("bits"), described.get("group_size"), described.get("zero", False)
        rows, columns = shape
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"bitpack: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        if not (_whole(bits) and 1 <= bits <= 8):
            raise FormatError(f"bitpack: bits is {bits!r:.80}; expected 1 to 8. The config does not belong to these weights")
        if not (_whole(group_size) and 0 < group_size <= columns and columns % group_size == 0):
            raise FormatError(f"bitpack: group_size is {group_size!r:.80}; expected a divisor of in={columns}")
        if not isinstance(zero, bool):
            raise FormatError(f"bitpack: zero is {zero!r:.80}; expected true or false")
        for key in ("offset", "bipolar"):
            if key in described and described[key] is not True:
                raise FormatError(f"bitpack: {key} is {described[key]!r:.80}; expected true, or no {key}")
        if "bipolar" in described and zero:
            raise FormatError("bitpack: bipolar and zero are both there; expected one of them. The config is damaged")
        if "scale" in described and not (isinstance(described["scale"], str) and described["scale"] in _SCALE_DTYPES):
            raise FormatError(f"bitpack: scale is {described['scale']!r:.80}; expected F16 or F32, or no scale for BF16")
        groups = columns // group_size
        layout: Layout = {
            "codes": (torch.int32, (_bits.words(rows * columns, bits),)),
            "scale": (_SCALE_DTYPES.get(described.get("scale", ""), torch.bfloat16), (rows, groups)),
        }
        if zero:
            layout["zero"] = (torch.int32, (_bits.words(rows * groups, bits),))
        if "offset" in described:
            layout["offset"] = (torch.bfloat16, (rows, groups))
        if "group" in described:
            if not isinstance(described["group"], str) or described["group"] not in _GROUP_DTYPES:
                raise FormatError(f"bitpack: group is {described['group']!r:.80}; expected one of {', '.join(_GROUP_DTYPES)}")
            layout["group"] = (_GROUP_DTYPES[described["group"]], (columns,))
        return layout

    def pack(self, part: Uniform) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        tensors = {"codes": _bits.pack(part.codes, part.bits), "scale": part.scale.contiguous()}
        if part.zero is not None:
            tensors["zero"] = _bits.pack(part.zero, part.bits)
        if part.offset is not None:
            tensors["offset"] = part.offset.contiguous()
        if part.group is not None:
            tensors["group"] = part.group.contiguous()
        return tensors

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> Uniform:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        layout = self.layout(described, shape)
        for name, (dtype, expected) in layout.items():
            got = tensors.get(name)
            if got is None or got.dtype != dtype or tuple(got.shape) != expected:
                found = "nothing" if got is None else f"{got.dtype} {tuple(got.shape)}"
                raise FormatError(f"bitpack: {name} is {found}; expected {dtype} {expected}")
        bits, group_size = described["bits"], described["group_size"]
        groups = shape[1] // group_size
        codes = _bits.unpack(tensors["codes"], bits, math.prod(shape)).view(shape)
        zero = _bits.unpack(tensors["zero"], bits, shape[0] * groups).view(shape[0], groups) if described.get("zero") else None
        group = tensors.get("group")
        if group is not None and not bool(((group >= 0) & (group < groups)).all()):
            raise FormatError(f"bitpack: group names a group outside 0..{groups - 1}; the file is damaged")
        offset, bipolar = tensors.get("offset"), "bipolar" in described
        return Uniform(codes, tensors["scale"], bits, group_size, zero, group, offset, bipolar)

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop; `start` is a multiple of 32, where each stream begins a word."""
        columns, bits = shape[1], described["bits"]
        groups = columns // described["group_size"]
        first, last = start * columns * bits // 32, _bits.words(stop * columns, bits)
        cut = {**tensors, "codes": tensors["codes"][first:last], "scale": tensors["scale"][start:stop]}
        if described.get("zero"):
            cut["zero"] = tensors["zero"][start * groups * bits // 32 : _bits.words(stop * groups, bits)]
        if "offset" in described:
            cut["offset"] = tensors["offset"][start:stop]
        return described, cut


FORMAT = BitPack()
