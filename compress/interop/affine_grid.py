"""What layouts of other tools can hold of ours: an affine grid as it is or with wider codes, never with other values.

A scheme is what is known of a site before its tensors are read. A grid whose width a layout lacks is written on the next wider
one: codes and zero codes as they are, or on a symmetric grid shifted to its middle. Values that lie between the codes of a grid
(one bit, bipolar, tables of floats) are whole multiples of half a scale, or of a scale: codes of a wider symmetric grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.weights import bit_stream as _bits
from compress.weights.table import DATATYPES, Table
from compress.weights.uniform import Uniform, middle
from compress.weights.weight import CompressedWeight

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Datatypes whose values are whole multiples of a fraction of the scale: the fraction.
_FRACTION = {"fp3": 1.0, "fp4": 0.5, "bitmod-fp3": 1.0, "bitmod-fp4": 1.0}


@dataclass(frozen=True)
class Scheme:
    """How a layout holds one site."""

    shape: tuple[int, int]  # (out, in)
    bits: int
    group_size: int  # columns per scale; `in` for one scale per row
    zero: bool  # zero codes are stored
    scattered: bool = False  # columns of a group are not neighbours
    scale: str = "BF16"  # dtype of the scales

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.shape[1] // self.group_size


@dataclass(frozen=True)
class Reach:
    """The whole numbers, times a scale, that a site's values are, known from its description."""

    low: int
    high: int
    group_size: int
    zero: bool  # on a grid with zero codes
    scattered: bool
    scale: str  # the narrowest dtype that surely holds the scales, as far as can be said before reading them
    bits: int | None = None  # of the grid as it is, where it is one that other tools know


def reach(spec: Mapping[str, Any]) -> Reach:
    """Return what values a described site has. Raises FormatError with the reason where they are on no grid."""
    base = spec["base"]
    if "input" in spec:
        raise FormatError("has an input that is transformed or rounded before the product, which no other layout stores")
    if others := sorted(spec.keys() - {"shape", "base"}):
        raise FormatError(f"has {others[0]} beside the grid, which no other layout stores")
    group_size = base.get("group_size")
    if base["format"] == "table":
        if base["datatype"] not in _FRACTION:
            raise FormatError(f"is {base['datatype']}, whose values are on no grid")
        if base["scale"] == "uint8":
            raise FormatError("has scales of 16 significant bits (uint8 times bfloat16), which a float of 16 bits cannot hold")
        values = [v / _FRACTION[base["datatype"]] for table in DATATYPES[base["datatype"]] for v in table]
        return Reach(int(min(values)), int(max(values)), group_size, False, False, "BF16")
    if base["format"] != "bitpack":
        raise FormatError(f"is stored as {base['format']}, which no other layout knows")
    if base.get("offset"):
        raise FormatError("has offsets that are no codes, which these layouts cannot hold")
    bits, scattered, scale = base["bits"], "group" in base, base.get("scale", "BF16")
    top = (1 << bits) - 1
    if base.get("zero"):
        return Reach(-top, top, group_size, True, scattered, scale, bits)
    if bits == 1 or base.get("bipolar"):
        return Reach(-top, top, group_size, False, scattered, scale)
    return Reach(-(1 << bits - 1), (1 << bits - 1) - 1, group_size, False, scattered, scale, bits)


def scheme(spec: Mapping[str, Any], widths: Sequence[int], zeros: bool, scattered: bool, scale: str | None = None) -> Scheme:
    """Return how a layout with these widths (rising), with or without zero codes and scattered groups, holds a described site.

    `scale` is the dtype of the layout's scales if it is not the site's own. Raises FormatError with what the site has.
    """
    found = reach(spec)
    if found.scattered and not scattered:
        raise FormatError("has groups of columns that are not neighbours (act-order)")
    keeps = found.zero and zeros
    need = found.bits if found.bits is not None and (keeps or not found.zero) else _width(found.low, found.high)
    fits = [width for width in widths if width >= need]
    if not fits:
        raise FormatError(f"has {'zero points and ' if found.zero else ''}codes that need {need} bits")
    rows, columns = spec["shape"]
    return Scheme((rows, columns), fits[0], found.group_size, keeps, found.scattered, scale or found.scale)


def _width(low: int, high: int) -> int:
    """Bits of the narrowest symmetric grid that has these codes."""
    return next(bits for bits in range(2, 18) if -(1 << bits - 1) <= low and high < 1 << bits - 1)


def lattice(weight: CompressedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return whole numbers (out, in) int16 and scales (out, groups) float32 whose product the weight is, and column groups."""
    part = weight.base
    if isinstance(part, Table):
        fraction = _FRACTION[part.datatype]
        tables = torch.tensor(DATATYPES[part.datatype], dtype=torch.float32).div(fraction).to(torch.int16)
        place = part.codes.int()
        if part.select is not None:
            place = place + part.select.int().mul(tables.shape[1]).repeat_interleave(part.group_size, 1)
        return tables.flatten()[place.long()], part.scales() * fraction, None
    assert isinstance(part, Uniform)
    codes, scale = part.codes.to(torch.int16), part.scale.float()
    if part.zero is not None:
        index = part.group.long() if part.group is not None else torch.arange(codes.shape[1]) // part.group_size
        return codes - part.zero.to(torch.int16)[:, index], scale, part.group
    centre = middle(part.bits, part.bipolar)
    if centre.is_integer():
        return codes - int(centre), scale, part.group
    return codes * 2 - int(2 * centre), scale / 2, part.group


def grid(weight: CompressedWeight, wanted: Scheme) -> Uniform:
    """Return a weight on the grid of its scheme, equal in value. Raises FormatError where the scheme's scales cannot be exact."""
    part = weight.base
    if isinstance(part, Uniform) and (wanted.zero if part.zero is not None else not part.bipolar and part.bits > 1):
        codes, scale = part.codes, part.scale
        if not wanted.zero:
            codes = codes + ((1 << wanted.bits - 1) - (1 << part.bits - 1))
        zero, group = part.zero, part.group
    else:
        values, scale, group = lattice(weight)
        codes, zero = (values + (1 << wanted.bits - 1)).to(torch.uint8), None
    return Uniform(codes, exact(scale, DTYPES[wanted.scale]), wanted.bits, wanted.group_size, zero, group)


def exact(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in another dtype. Raises FormatError where one of them changes."""
    cast = scale.to(dtype)
    wrong = cast.to(torch.float64) != scale.to(torch.float64)
    if bool(wrong.any()):
        value = float(scale[wrong].float()[0])
        raise FormatError(
            f"has {int(wrong.sum())} of {scale.numel()} scales that {NAMES[dtype]} cannot hold, such as {value:.9g}"
        )
    return cast


def zero_codes(part: Uniform) -> Tensor:
    """Zero codes (out, groups) uint8, those of a symmetric grid written out."""
    return part.zero if part.zero is not None else torch.full(part.scale.shape, 1 << part.bits - 1, dtype=torch.uint8)


def words(fields: Tensor, bits: int) -> Tensor:
    """Pack fields (rows, n) uint8 into int32 words (rows, ceil(n * bits / 32)); every row begins on a word."""
    rows, count = fields.shape
    padded = torch.nn.functional.pad(fields, (0, -count % 32))
    return _bits.pack(padded, bits).view(rows, -1)[:, : _bits.words(count, bits)].contiguous()


def fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the fields (rows, count) uint8 of words (rows, ceil(count * bits / 32)); what `words` packed."""
    rows = packed.shape[0]
    whole = (count + 31) // 32 * bits
    padded = torch.nn.functional.pad(packed, (0, whole - packed.shape[1]))
    return _bits.unpack(padded.flatten(), bits, rows * whole * 32 // bits).view(rows, -1)[:, :count].contiguous()


def description(found: Scheme, group: torch.dtype | None = None) -> dict[str, Any]:
    """Return the native description of a site of another layout."""
    base: dict[str, Any] = {"format": "bitpack", "bits": found.bits, "group_size": found.group_size, "zero": found.zero}
    if group is not None:
        base["group"] = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}[group]
    if found.scale != "BF16":
        base["scale"] = found.scale
    return {"shape": list(found.shape), "base": base}


def group_dtype(groups: int) -> torch.dtype:
    """The smallest dtype that numbers this many groups."""
    return torch.uint8 if groups <= 256 else torch.int16 if groups <= 1 << 15 else torch.int32


def with_scale(wanted: Scheme, scale: str) -> Scheme:
    """A scheme with scales of another dtype."""
    return replace(wanted, scale=scale)
