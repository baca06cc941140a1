"""`table`: a `Table` part as bytes. Codes and table choices are dense bit streams, without padding between rows.

    codes      I32 (words,)         the codes row by row: (out * in * bits) bits, rounded up to one word
    scale      depends on the scale type:
               bfloat16  BF16 (out, groups)
               uint8     U8 (out, groups)       times row_scale
               e8m0      U8 (out, groups)       2^(code - 127), 255 is refused
               e4m3      F8_E4M3 (out, groups)  times row_scale; NaN is refused
    row_scale  BF16 (out,) with uint8, F32 (out,) with e4m3
    select     I32 (words,)         the table of each group, row by row, if the datatype has several

The values of a datatype are part of the format; the description has only its name.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights import bit_stream as _bits
from compress.weights.table import DATATYPES, SCALE_DTYPES, Table, code_bits, select_bits

_KEYS = ("format", "datatype", "bits", "group_size", "scale")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


class TableFormat:
    """The bijection between a Table part and named tensors."""

    name = "table"
    part = Table
    roles = ("base",)

    def describe(self, part: Table) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        return {
            "format": self.name,
            "datatype": part.datatype,
            "bits": code_bits(part.datatype),  # follows from the datatype; for readers that do not know it
            "group_size": part.group_size,
            "scale": part.scale_type,
        }

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        return f"{described['datatype']} g{described['group_size']} with {described['scale']} scales"

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        datatype, bits, group_size, scale_type = (described.get(key) for key in _KEYS[1:])
        rows, columns = shape
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"table: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        if not (isinstance(datatype, str) and datatype in DATATYPES):
            known = ", ".join(DATATYPES)
            raise FormatError(f"table: datatype is {datatype!r:.80}; known are {known}. Written by a newer compress?")
        if not (_whole(bits) and bits == code_bits(datatype)):
            raise FormatError(f"table: bits is {bits!r:.80}; expected {code_bits(datatype)}, those of {datatype}")
        if not (_whole(group_size) and 0 < group_size <= columns and columns % group_size == 0):
            raise FormatError(f"table: group_size is {group_size!r:.80}; expected a divisor of in={columns}")
        if not (isinstance(scale_type, str) and scale_type in SCALE_DTYPES):
            known = ", ".join(SCALE_DTYPES)
            raise FormatError(f"table: scale is {scale_type!r:.80}; known are {known}. Written by a newer compress?")
        groups = columns // group_size
        scale, row_scale = SCALE_DTYPES[scale_type]
        layout: Layout = {
            "codes": (torch.int32, (_bits.words(rows * columns, code_bits(datatype)),)),
            "scale": (scale, (rows, groups)),
        }
        if row_scale is not None:
            layout["row_scale"] = (row_scale, (rows,))
        if choice := select_bits(datatype):
            layout["select"] = (torch.int32, (_bits.words(rows * groups, choice),))
        return layout

    def pack(self, part: Table) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        tensors = {"codes": _bits.pack(part.codes, code_bits(part.datatype)), "scale": part.scale.contiguous()}
        if part.row_scale is not None:
            tensors["row_scale"] = part.row_scale.contiguous()
        if part.select is not None:
            tensors["select"] = _bits.pack(part.select, select_bits(part.datatype))
        return tensors

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        scale = tensors["scale"]
        # 8-bit exponents and floats can be NaN; all codes and choices have an entry.
        wrong = scale == 255 if described["scale"] == "e8m0" else scale.view(torch.uint8) & 127 == 127
        if described["scale"] in ("e8m0", "e4m3") and bool(wrong.any()):
            raise FormatError("table: scale has values that are not numbers; expected finite ones. The file is damaged")

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> Table:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        layout = self.layout(described, shape)
        self.check(described, shape, tensors)
        datatype, group_size, scale = described["datatype"], described["group_size"], tensors["scale"]
        codes = _bits.unpack(tensors["codes"], code_bits(datatype), math.prod(shape)).view(shape)
        select = None
        if bits := select_bits(datatype):
            groups = shape[1] // group_size
            select = _bits.unpack(tensors["select"], bits, shape[0] * groups).view(shape[0], groups)
        return Table(codes, scale, datatype, group_size, tensors["row_scale"] if "row_scale" in layout else None, select)

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop; `start`, a multiple of 32, begins on a word in each stream."""

        def stream(name: str, fields: int, bits: int) -> Tensor:
            return tensors[name][start * fields * bits // 32 : _bits.words(stop * fields, bits)]

        columns, datatype = shape[1], described["datatype"]
        cut = {
            **tensors,
            "codes": stream("codes", columns, code_bits(datatype)),
            "scale": tensors["scale"][start:stop],
        }
        if "row_scale" in tensors:
            cut["row_scale"] = tensors["row_scale"][start:stop]
        if bits := select_bits(datatype):
            cut["select"] = stream("select", columns // described["group_size"], bits)
        return described, cut


FORMAT = TableFormat()
