"""A second reader of checkpoints, written from docs/format.md with numpy alone: it shares no code with what packs and unpacks.

What `formats/` writes and reads wrongly in the same way, this reader does not. Weights come in slabs of rows, so that the
memory is that of a slab. Arithmetic is that of the format's equations in float32, each operation rounded once, so values are
equal bit for bit to those that any other right reader gets.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from compress.errors import CheckpointError
from compress.verify.raw_files import SIZES, Bytes, Place, Stored, read_bytes

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_Kind = TypeVar("_Kind", bound=np.generic)

_SLAB = 1 << 22  # weights decoded at a time
_ROWS = 32  # slabs begin at multiples of it, where every stream begins on a byte and every tile of rows begins

_POSITIVE = {"fp3": (0, 1, 2, 4), "fp4": (0, 0.5, 1, 1.5, 2, 3, 4, 6)}
_POSITIVE |= {"bitmod-fp3": (0, 1, 2, 4), "bitmod-fp4": (0, 1, 2, 3, 4, 6, 8, 12)}
_SPECIAL = {"fp3": (-0.0,), "fp4": (-0.0,), "bitmod-fp3": (3, -3, 6, -6), "bitmod-fp4": (10, -10, 16, -16)}
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class UnknownFormatError(CheckpointError):
    """A part has a format that this reader does not know."""


def fields(stream: Bytes, bits: int, count: int) -> Bytes:
    """Return `count` fields of `bits` bits, least significant first, from bytes: eight fields fill `bits` bytes."""
    rounds = -(-count // 8)
    octets = np.zeros(rounds * bits + 1, dtype=np.uint16)
    used = min(len(stream), rounds * bits)
    octets[:used] = stream[:used]
    result = np.empty((rounds, 8), dtype=np.uint8)
    mask = (1 << bits) - 1
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        window: npt.NDArray[Any] = octets[byte : byte + rounds * bits : bits][:rounds]
        if shift + bits > 8:
            window = window | (octets[byte + 1 : byte + 1 + rounds * bits : bits][:rounds] << 8)
        result[:, place] = (window >> shift) & mask
    return result.reshape(-1)[:count]


def bfloat16(raw: Bytes) -> Floats:
    """Bytes of bfloat16 -> float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def e4m3(raw: Bytes) -> Floats:
    """Bytes of floats with 4 exponent and 3 mantissa bits -> float32."""
    exponent, mantissa = (raw >> 3 & 15).astype(np.int32), (raw & 7).astype(np.float32)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    return (np.where(raw >> 7 == 1, -magnitude, magnitude)).astype(np.float32)


class _Site:
    """The tensors of one part of one site, cut by rows."""

    def __init__(self, stored: Stored, site: str, prefix: str, described: dict[str, Any], shape: tuple[int, int]) -> None:
        self.described, self.rows, self.columns = described, *shape
        self._where = {name.removeprefix(f"{site}.{prefix}"): name for name in stored.tensors if name.startswith(f"{site}.")}
        self._stored, self.name, self.prefix = stored, site, prefix

    def place(self, leaf: str) -> Place:
        name = f"{self.name}.{self.prefix}{leaf}"
        if name not in self._stored.tensors:
            raise CheckpointError(f"{self._stored.folder}: no tensor {name}; fetch the checkpoint again")
        return self._stored.tensors[name]

    def stream(self, leaf: str, bits: int, per_row: int, start: int, stop: int) -> Bytes:
        """The fields of rows start..stop of a bit stream, (rows, per_row)."""
        first, last = start * per_row * bits // 8, -(-stop * per_row * bits // 8)
        raw = read_bytes(self.place(leaf), first, last)
        return fields(raw, bits, (stop - start) * per_row).reshape(stop - start, per_row)

    def matrix(self, leaf: str, start: int, stop: int) -> Bytes:
        """The bytes of rows start..stop of a tensor."""
        place = self.place(leaf)
        size = (place.stop - place.start) // place.shape[0] if place.shape[0] else 0
        return read_bytes(place, start * size, stop * size)

    def spread(self, values: npt.NDArray[_Kind]) -> npt.NDArray[_Kind]:
        """(rows, groups) -> (rows, in)"""
        if self.scattered:
            return values[:, self.group()]
        return np.repeat(values, int(self.described["group_size"]), axis=1)

    @property
    def scattered(self) -> bool:
        """Whether columns of a group are not neighbours."""
        return bool(self.described.get("group") or self.described.get("scattered"))

    def group(self, packed: int | None = None) -> npt.NDArray[np.int64]:
        """The group of each column, (in,)."""
        if not self.scattered:
            return np.arange(self.columns) // int(self.described["group_size"])
        place = self.place("group")
        if packed is not None and packed <= 8:
            return fields(read_bytes(place), packed, self.columns).astype(np.int64)
        return read_bytes(place).view({"U8": "u1", "I16": "<i2", "I32": "<i4"}[place.dtype]).astype(np.int64)


def floats(raw: Bytes, dtype: str) -> Floats:
    """Bytes of bfloat16, float16 or float32 -> float32."""
    return bfloat16(raw) if dtype == "BF16" else raw.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def _kept(site: _Site, mask: Mask, leaf: str, bits: int, align: int, start: int, stop: int) -> Any:
    """The fields of a stream of what is kept, spread over rows start..stop; `bits` 0: floats of the tensor's type."""
    place = site.place(leaf)
    if "kept" in site.described:
        first, last = start * site.described["kept"], stop * site.described["kept"]
        inside = np.arange(last - first)
    else:
        pointers = read_bytes(site.place("pointers")).view("<i4").astype(np.int64)[start // _ROWS : -(-stop // _ROWS) + 1] * align
        first, last = int(pointers[0]), int(pointers[-1])
        counts = np.add.reduceat(mask.sum(1), np.arange(0, len(mask), _ROWS))
        inside = np.concatenate([begin - first + np.arange(n) for begin, n in zip(pointers[:-1], counts, strict=True)])
    if bits:
        stream: Any = fields(read_bytes(place, first * bits // 8, -(-last * bits // 8)), bits, last - first)
    else:
        stream = floats(read_bytes(place, first * SIZES[place.dtype], last * SIZES[place.dtype]), place.dtype)
    values = np.zeros(mask.shape, dtype=stream.dtype)
    values[mask] = stream[inside]
    return values


def _bitpack(site: _Site, start: int, stop: int, mask: Mask | None = None) -> Floats:
    bits, size = site.described["bits"], site.described["group_size"]
    groups, stored, live = site.columns // size, site.columns // size, None
    if mask is not None and "scales" in site.described:
        stored, index = site.described["scales"], site.group()
        live = np.stack([mask[:, index == group].any(1) for group in range(groups)], axis=1)

    def spread(values: npt.NDArray[_Kind]) -> npt.NDArray[_Kind]:
        if live is not None:
            whole = np.zeros((stop - start, groups), dtype=values.dtype)
            whole[live] = values.reshape(-1)
            values = whole
        return site.spread(values)

    codes = (
        site.stream("codes", bits, site.columns, start, stop)
        if mask is None
        else _kept(site, mask, "codes", bits, 32, start, stop)
    ).astype(np.float32)
    scale = floats(site.matrix("scale", start, stop), site.place("scale").dtype).reshape(stop - start, stored)
    if site.described.get("zero"):
        zero = spread(site.stream("zero", bits, stored, start, stop).astype(np.float32))
    else:
        half = site.described.get("bipolar") or bits == 1
        zero = np.full((1, 1), (2**bits - 1) / 2 if half else 2 ** (bits - 1), dtype=np.float32)
    values = (codes - zero) * spread(scale)
    if site.described.get("offset"):
        values = values + spread(bfloat16(site.matrix("offset", start, stop)).reshape(stop - start, stored))
    return values


def _dense(site: _Site, start: int, stop: int, mask: Mask | None = None) -> Floats:
    if mask is not None:
        values: Floats = _kept(site, mask, "values", 0, 1, start, stop)
        return values
    return floats(site.matrix("values", start, stop), site.place("values").dtype).reshape(-1, site.columns)


def _bitmask(site: _Site, start: int, stop: int) -> Mask:
    size = site.described.get("size", 1)
    return np.repeat(site.stream("bits", 1, site.columns // size, start, stop).astype(bool), size, axis=1)


def _pattern(site: _Site, start: int, stop: int) -> Mask:
    kept, of = site.described["kept"], site.described["of"]
    choices = list(itertools.combinations(range(of), kept))
    table = np.zeros((len(choices), of), dtype=bool)
    for number, places in enumerate(choices):
        table[number, list(places)] = True
    choice = site.stream("choice", (len(choices) - 1).bit_length(), site.columns // of, start, stop)
    return table[choice].reshape(stop - start, site.columns)


def _mixed(site: _Site, start: int, stop: int) -> Floats:
    size = site.described["group_size"]
    groups = site.columns // size
    widths = fields(read_bytes(site.place("widths")), 3, groups) + 1
    needed = max(1, (groups - 1).bit_length())
    index = site.group(needed if groups <= 256 else 16)
    scale = bfloat16(site.matrix("scale", start, stop)).reshape(-1, groups)[:, index]
    values = np.empty((stop - start, site.columns), dtype=np.float32)
    for bits in sorted(set(widths.tolist())):
        columns = np.flatnonzero(widths[index] == bits)
        codes = site.stream(f"codes{bits}", bits, len(columns), start, stop).astype(np.float32)
        zero = np.full((1, 1), 0.5 if bits == 1 else 2 ** (bits - 1), dtype=np.float32)
        if site.described.get("zero") and bits > 1:
            mine = np.flatnonzero(widths == bits)
            place = np.zeros(groups, dtype=np.int64)
            place[mine] = np.arange(len(mine))
            zero = site.stream(f"zero{bits}", bits, len(mine), start, stop).astype(np.float32)[:, place[index[columns]]]
        values[:, columns] = (codes - zero) * scale[:, columns]
    return values


def _table(site: _Site, start: int, stop: int) -> Floats:
    datatype, size, kind = (site.described[key] for key in ("datatype", "group_size", "scale"))
    groups = site.columns // size
    if datatype == "nf4":
        tables: list[tuple[float, ...]] = [_NF4]
    else:
        plus = _POSITIVE[datatype]
        tables = [(*plus, special, *(-value for value in plus[1:])) for special in _SPECIAL[datatype]]
    bits = len(tables[0]).bit_length() - 1
    raw = site.matrix("scale", start, stop)
    if kind == "bfloat16":
        scale = bfloat16(raw)
    elif kind == "e8m0":
        scale = np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
    else:
        scale = raw.astype(np.float32) if kind == "uint8" else e4m3(raw)
    scale = scale.reshape(-1, groups)
    if kind in ("uint8", "e4m3"):
        row = site.matrix("row_scale", start, stop)
        scale = scale * (bfloat16(row) if kind == "uint8" else row.view("<f4")).reshape(-1, 1)
    codes = site.stream("codes", bits, site.columns, start, stop)
    if len(tables) > 1:
        values = np.array(tables, dtype=np.float32)[site.spread(site.stream("select", 2, groups, start, stop)), codes]
    else:
        values = np.array(tables[0], dtype=np.float32)[codes]
    return values * site.spread(scale)


def _two_level(site: _Site, start: int, stop: int) -> Floats:
    d = site.described
    groups = site.columns // d["group_size"]
    tile = np.arange(start, stop) // 16 - start // 16
    first, last = start // 16, -(-stop // 16)

    def tiled(leaf: str) -> Bytes:
        return site.matrix(leaf, first, last)

    top = bfloat16(tiled("scale_top")).reshape(-1, groups)[tile]
    step, offset, zero_step = (
        tiled(leaf).reshape(-1, groups)[tile].astype(np.float32) for leaf in ("scale_step", "zero_offset", "zero_step")
    )
    scale_code = site.stream("scale_code", d["scale_bits"], groups, start, stop).astype(np.float32)
    zero_code = site.stream("zero_code", d["zero_bits"], groups, start, stop).astype(np.float32)
    # All powers of two and small integers: exact in float32.
    scale = top * (1 - scale_code * step / np.float32(2 ** (7 + d["scale_bits"])))
    zero = (offset + zero_code * zero_step / np.float32(2 ** d["zero_bits"])) * np.float32(2.0 ** (d["bits"] - 8))
    codes = site.stream("codes", d["bits"], site.columns, start, stop).astype(np.float32)
    values: Floats = (codes - site.spread(zero)) * site.spread(scale)
    return values


def _sparse(site: _Site, start: int, stop: int) -> Floats:
    pointers = read_bytes(site.place("pointers")).view("<i4")[start : stop + 1].astype(np.int64)
    first, last = int(pointers[0]), int(pointers[-1])
    place = site.place("columns")
    kind = {"U8": "u1", "I16": "<i2", "I32": "<i4"}[place.dtype]
    width = np.dtype(kind).itemsize
    columns = read_bytes(place, first * width, last * width).view(kind).astype(np.int64)
    values = np.zeros((stop - start, site.columns), dtype=np.float32)
    rows = np.repeat(np.arange(stop - start), np.diff(pointers))
    values[rows, columns] = bfloat16(read_bytes(site.place("values"), first * 2, last * 2))
    return values


def _low_rank(site: _Site, start: int, stop: int) -> Floats:
    left, right = _factors(site)
    return left[start:stop] @ right


def _factors(site: _Site) -> tuple[Floats, Floats]:
    rank, dtype = site.described["rank"], site.described["dtype"]
    left, right = (floats(read_bytes(site.place(leaf)), dtype) for leaf in ("left", "right"))
    return left.reshape(site.rows, rank), right.reshape(rank, site.columns)


def _input_values(site: _Site) -> dict[str, Floats]:
    """The numbers that an `input` is made of, by the name of their tensor, in the order of a digest."""
    found: dict[str, Floats] = {}
    transform, activation = site.described.get("transform"), site.described.get("activation")
    if transform is not None and transform["kind"] == "hadamard":
        bits = fields(read_bytes(site.place("signs")), 1, site.columns)
        found["signs"] = np.where(bits == 1, -1, 1).astype(np.float32)
    elif transform is not None:
        leaves = {"diagonal": ("factors",), "kronecker": ("left", "right")}[transform["kind"]]
        found |= {leaf: floats(read_bytes(site.place(leaf)), transform["dtype"]) for leaf in leaves}
    if activation is not None and activation["static"]:
        found["scale"] = read_bytes(site.place("scale")).view("<f4")
        if not activation["symmetric"]:
            found["zero"] = read_bytes(site.place("zero")).astype(np.float32)
    return found


def _multiplied_out(site: _Site, values: Floats) -> Floats:
    """The weight of the original input (rows, in), given that of the transformed one."""
    transform = site.described.get("transform")
    if transform is None:
        return values
    numbers = _input_values(site)
    if transform["kind"] == "diagonal":
        return values * numbers["factors"]
    if transform["kind"] == "kronecker":
        left, right = (numbers[leaf].reshape(transform[leaf], transform[leaf]) for leaf in ("left", "right"))
        found: Floats = left @ (values.reshape(-1, len(left), len(right)) @ right.T)
        return found.reshape(values.shape)
    distance = 1
    while distance < transform["block"]:
        pairs = values.reshape(len(values), -1, 2, distance)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        values = np.stack((first + second, first - second), axis=2).reshape(len(values), site.columns)
        distance *= 2
    return values * np.float32(transform["block"] ** -0.5) * numbers["signs"]


DECODERS: dict[str, Callable[..., Any]] = {
    "bitpack": _bitpack,
    "dense": _dense,
    "mixed": _mixed,
    "table": _table,
    "two_level": _two_level,
    "sparse": _sparse,
    "bitmask": _bitmask,
    "pattern": _pattern,
    "low_rank": _low_rank,
    "input": _multiplied_out,
}
ROLES = ("base", "keep", "outliers", "low_rank", "input")


def _parts(stored: Stored, site: str) -> dict[str, _Site]:
    """The parts of a site by role."""
    spec = stored.sites[site]
    found = {}
    for role in ROLES:
        if role not in spec:
            continue
        form = spec[role].get("format")
        if form not in DECODERS:
            raise UnknownFormatError(f"{site}: {role} has the format {form!r}; this reader knows {', '.join(DECODERS)}")
        found[role] = _Site(stored, site, "" if role == "base" else f"{role}_", spec[role], tuple(spec["shape"]))
    if unknown := spec.keys() - {"shape", *ROLES}:
        raise UnknownFormatError(f"{site}: has the part {min(unknown)!r}; this reader knows {', '.join(ROLES)}")
    return found


def _rows(parts: dict[str, _Site], start: int, stop: int, whole: bool) -> Floats:
    """Rows start..stop of keep * base + outliers; `whole`: + low_rank, and of the original input."""

    def read(role: str, *more: Any) -> Any:
        return DECODERS[parts[role].described["format"]](parts[role], start, stop, *more)

    if "keep" in parts:
        mask = read("keep")
        values: Floats = np.where(mask, read("base", mask), np.float32(0))
    else:
        values = read("base")
    for role in ("outliers", "low_rank") if whole else ("outliers",):
        if role in parts:
            values = values + read(role)
    if whole and "input" in parts:
        values = DECODERS[parts["input"].described["format"]](parts["input"], values)
    return values


def decode(stored: Stored, site: str, whole: bool = True) -> Iterator[Floats]:
    """Yield the weight of a site in float32, some rows at a time, (rows, in). Raises CheckpointError."""
    rows, columns = stored.sites[site]["shape"]
    parts = _parts(stored, site)
    step = max(_ROWS, _SLAB // columns // _ROWS * _ROWS)
    for start in range(0, rows, step):
        try:
            with np.errstate(all="ignore"):  # what a damaged file decodes to may be anything
                values = _rows(parts, start, min(start + step, rows), whole)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(f"{stored.folder}: {site} does not fit its description ({error}); fetch it again") from error
        yield values


def digest(stored: Stored, site: str) -> str:
    """Return the SHA-256 of a site's weight: its float32 values, little endian, row by row. Raises CheckpointError.

    A product of factors, or with a transform, depends on the order of its sums: it is left out, and the factors follow as they
    are, then the description of the input as JSON and its numbers.
    """
    result = hashlib.sha256()
    for values in decode(stored, site, whole=False):
        result.update(np.ascontiguousarray(values, dtype="<f4").data)
    parts = _parts(stored, site)
    try:
        for factor in _factors(parts["low_rank"]) if "low_rank" in parts else ():
            result.update(np.ascontiguousarray(factor, dtype="<f4").data)
        if "input" in parts:
            result.update(json.dumps(parts["input"].described, sort_keys=True, separators=(",", ":")).encode())
            for values in _input_values(parts["input"]).values():
                result.update(np.ascontiguousarray(values, dtype="<f4").data)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{stored.folder}: {site} does not fit its description ({error}); fetch it again") from error
    return result.hexdigest()
