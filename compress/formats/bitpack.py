"""`bitpack`: a `Uniform` part as bytes. Codes and zero codes are dense bit streams of width 1 to 8, without padding between rows.

    codes   I32 (words,)            the codes row by row: (out * in * bits) bits, rounded up to one word
    scale   BF16 (out, groups)      F16 or F32 where the description says so, to keep other tools' scales exactly
    zero    I32 (words,)            zero codes row by row, only on asymmetric grids
    offset  BF16 (out, groups)      added to the values of a group, only if there are offsets
    group   U8, I16 or I32 (in,)    group of each column, only if a group's columns are not adjacent

Under a mask only the codes of kept weights are stored, in the same order, see `_masked`; and if each row keeps weights in the
same number of groups, only the scales, zero codes and offsets of these groups.

Where `in * bits` is a multiple of 32 every row begins on a word, which is the layout that kernels read.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit, _masked
from compress.weights import bit_stream as _bits
from compress.weights.bit_stream import WORD
from compress.weights.kept_values import Stream, kept_groups, stored_groups
from compress.weights.uniform import Uniform

_GROUP_DTYPES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}
_GROUP_NAMES = {dtype: name for name, dtype in _GROUP_DTYPES.items()}
_SCALE_DTYPES = {"F16": torch.float16, "F32": torch.float32}  # bfloat16 is the default and is not named
_SCALE_NAMES = {dtype: name for name, dtype in _SCALE_DTYPES.items()}
_KEYS = ("format", "bits", "group_size", "zero", "group", "offset", "bipolar", "scale", *_masked.KEYS, "scales")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


class BitPack:
    """The bijection between a Uniform part and named tensors."""

    name = "bitpack"
    part = Uniform
    roles = ("base",)
    masked = True

    def describe(self, part: Uniform, keep: Tensor | None = None) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
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
        if keep is not None:
            described |= _masked.describe(Stream.of(keep, WORD))
            if (scales := stored_groups(keep, part.group_size, part.group)) is not None:
                described["scales"] = scales
        return described

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
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
        layout = _masked.layout(described, shape, WORD)
        if "scales" in described:
            under = any(key in described for key in _masked.KEYS)
            if not (under and _whole(described["scales"]) and 0 <= described["scales"] < groups):
                raise FormatError(f"bitpack: scales is {described['scales']!r:.80}; expected fewer than {groups}, under a mask")
            groups = described["scales"]
        fields = _masked.fields(described, shape)
        scale = _SCALE_DTYPES.get(described.get("scale", ""), torch.bfloat16)
        layout |= {"codes": (torch.int32, (_bits.words(fields, bits),)), "scale": (scale, (rows, groups))}
        if zero:
            layout["zero"] = (torch.int32, (_bits.words(rows * groups, bits),))
        if "offset" in described:
            layout["offset"] = (torch.bfloat16, (rows, groups))
        if "group" in described:
            if not isinstance(described["group"], str) or described["group"] not in _GROUP_DTYPES:
                raise FormatError(f"bitpack: group is {described['group']!r:.80}; expected one of {', '.join(_GROUP_DTYPES)}")
            layout["group"] = (_GROUP_DTYPES[described["group"]], (columns,))
        return layout

    def pack(self, part: Uniform, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors of a part; under a mask `keep` (out, in), only of what it keeps."""
        stream = None if keep is None else Stream.of(keep, WORD)
        live = None
        if keep is not None and stored_groups(keep, part.group_size, part.group) is not None:
            live = kept_groups(keep, part.group_size, part.group)

        def beside(values: Tensor) -> Tensor:
            return values.contiguous() if live is None else values[live].view(len(values), -1)

        tensors = _masked.pointers(stream)
        tensors["codes"] = _bits.pack(part.codes if stream is None else stream.compact(part.codes), part.bits)
        tensors["scale"] = beside(part.scale)
        if part.zero is not None:
            tensors["zero"] = _bits.pack(beside(part.zero), part.bits)
        if part.offset is not None:
            tensors["offset"] = beside(part.offset)
        if part.group is not None:
            tensors["group"] = part.group.contiguous()
        return tensors

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        _masked.check(described, tensors, WORD)
        if "group" in described:
            _fit.check_groups(self.name, tensors["group"], shape[1] // described["group_size"])

    def unpack(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], keep: Tensor | None = None
    ) -> Uniform:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        layout = self.layout(described, shape)
        self.check(described, shape, tensors)
        bits, group_size = described["bits"], described["group_size"]
        groups = shape[1] // group_size
        group = tensors.get("group")
        stream = _masked.stream(self.name, described, tensors, keep, WORD)
        codes = _bits.unpack(tensors["codes"], bits, math.prod(shape) if stream is None else stream.count)
        live = None
        if "scales" in described and keep is not None:
            live = kept_groups(keep, group_size, group)
            if not bool((live.sum(1) == described["scales"]).all()):
                raise FormatError(f"bitpack: the mask keeps weights of other groups than scales={described['scales']} per row")

        def beside(values: Tensor, other: int) -> Tensor:
            if live is None:
                return values
            spread = values.new_full((shape[0], groups), other)
            spread[live] = values.flatten()
            return spread

        zero, offset = None, tensors.get("offset")
        if described.get("zero"):
            stored = math.prod(layout["scale"][1])
            zero = beside(_bits.unpack(tensors["zero"], bits, stored).view(layout["scale"][1]), 0)
        return Uniform(
            codes.view(shape) if stream is None else stream.spread(codes),
            beside(tensors["scale"], 1),
            bits,
            group_size,
            zero,
            group,
            None if offset is None else beside(offset, 0),
            "bipolar" in described,
        )

    def cut_rows(
        self,
        described: dict[str, Any],
        shape: tuple[int, int],
        tensors: dict[str, Tensor],
        start: int,
        stop: int,
        keep: Tensor | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop under their mask; `start`, a multiple of 32, begins on a word."""
        columns, bits = shape[1], described["bits"]
        groups = described.get("scales", columns // described["group_size"])
        fewer, (first, last), pointers = _masked.cut(described, columns, tensors, start, stop, WORD, keep)
        codes = tensors["codes"][first * bits // WORD : _bits.words(last, bits)]
        cut = {**tensors, **pointers, "codes": codes, "scale": tensors["scale"][start:stop]}
        if described.get("zero"):
            cut["zero"] = tensors["zero"][start * groups * bits // 32 : _bits.words(stop * groups, bits)]
        if "offset" in described:
            cut["offset"] = tensors["offset"][start:stop]
        return fewer, cut


FORMAT = BitPack()
