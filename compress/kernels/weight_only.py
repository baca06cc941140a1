"""y = x W^T for quantized W and 16-bit x: few rows of x on tensor cores from the codes, many by decoding W first.

Shapes      x (tokens, in), W (out, in) as `_weights.Tiles`, y (tokens, out) in the type of x.
Arithmetic  values are scale * number + shift; numbers are exact in both types, but entries of tables are rounded. Tensor
            cores sum numbers times x over a group in float32; scale and shift are applied to that sum in float32, the shift to
            the sum of x, which comes from an additional product with ones. So y differs from the exact product only by the
            rounding of sums and of the result.
Order       teams of warps divide the columns of their rows among themselves, and several blocks may divide those of the same
            rows. Sums of teams and blocks are added in a fixed order: results do not depend on timing.
Rows        a block has 32 rows for up to 8 tokens and 64 or 128 for more, as each block reads x again.
Many tokens from `CROSSOVER` on, rows of W are decoded into a buffer, rounded to the type of x, and multiplied by torch.
Limits      groups of a multiple of 16 columns, or one group per row; two-level scales and zeros of at most 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _cuda, _tiles, _weights
from compress.kernels._cuda import TYPES
from compress.kernels._on_gpu import ROLES, Added, OnGpu
from compress.kernels._operator import operator
from compress.kernels._weights import RECORD, STEP, Tiles, decode, prepare
from compress.kernels.kernel import Kernel, Use
from compress.weights.mixed import Mixed

# Tokens from which decoding W and multiplying with torch is assumed to be faster; not measured yet, see docs/kernels.md.
CROSSOVER = 129
TOKENS = (8, 16, 32, 64)  # tokens per block
_WARPS, BLOCKS = 8, 2  # warps per block; row-blocks per warp
_DENSE = 1 << 27  # numbers of W decoded at a time, 256 MB


@dataclass(frozen=True)
class _Shape:
    """What both kernels need to know of a weight."""

    tiles: int  # along the columns
    row_blocks: int
    steps: int  # steps of 16 columns per group
    reciprocal: np.uint32
    entries: int  # entries of the table


@dataclass(frozen=True)
class Plan:
    """How `wqmm` is launched."""

    tokens: int  # tokens per block
    tiles: int  # tiles per piece of columns
    stages: int  # stages per ring
    record_bits: int  # log2 of records per piece
    shared: int  # bytes
    per_split: int  # pieces per block
    splits: int

    @property
    def rows(self) -> int:
        """Rows of W per block."""
        return 16 * BLOCKS * team(self.tokens)


class WeightArguments(NamedTuple):
    """Arguments of `wqmm` that are read of W; None where a weight lacks it, or where experts have their own."""

    codes: Tensor | None
    meta: Tensor | None
    table: Tensor | None
    row_scale: Tensor | None


class OutputArguments(NamedTuple):
    """Arguments of `wqmm` for what is added to the sums, and where they go: `y` after rounding, `whole` in float32."""

    bias: Tensor | None = None
    addend: Tensor | None = None
    y: Tensor | None = None
    whole: Tensor | None = None
    workspace: Tensor | None = None  # where several blocks share the columns, their sums
    counters: Tensor | None = None  # and how many are done


def arguments(
    rows: Tensor,
    x_scale: Tensor | None,
    weight: WeightArguments,
    output: OutputArguments,
    shape: _Shape,
    p: Plan,
    batches: int,
    experts: tuple[Tensor, Tensor] | None = None,
) -> list[_cuda.Argument]:
    """Return the arguments of `wqmm` in its order, for all columns in `p.per_split` pieces per block.

    `experts` are addresses and numbers of experts, and where the rows of each begin; else all rows (tokens, in) are one weight's.
    """
    table, starts = experts or (None, None)
    outputs = next(tensor.shape[1] for tensor in (output.y, output.whole) if tensor is not None)
    tokens = len(rows) if experts is None else 0  # each expert has its own number
    sizes: list[_cuda.Argument] = [batches, tokens, outputs, rows.shape[1], np.int64(rows.stride(0))]
    sizes += [shape.tiles, shape.row_blocks, p.per_split, p.record_bits, shape.reciprocal, p.stages, shape.entries]
    return [rows, x_scale, *weight, *output, table, starts, *sizes]


def team(tokens: int) -> int:
    """Return how many warps of a block share x and differ in rows, so that reading x costs no more than reading codes."""
    return {8: 1, 16: 2}.get(tokens, 4)


def pieces(tokens: int) -> tuple[int, ...]:
    """Return the supported numbers of tiles per piece, the best first: two cost fewer instructions, one less memory."""
    return (1,) if tokens == 64 else (2, 1)


def shape_of(tiles: Tiles) -> _Shape:
    high, wide = _tiles.padded(tiles.shape)
    if wide // STEP >= 1 << 15:
        raise KernelError(f"in={tiles.shape[1]}: kernels take fewer than {(1 << 15) * STEP} columns; cut the weight")
    # floor((2 s + 1) r / 2^32) with r = 2^31 / steps, rounded up, is floor(s / steps), since (2 s + 1) steps < 2^31.
    reciprocal = np.uint32(-(-(1 << 31) // tiles.steps))
    entries = 0 if tiles.table is None else tiles.table.numel()
    return _Shape(wide // _tiles.COLUMNS, high // 16, tiles.steps, reciprocal, entries)


def instance(
    template: str,
    dtype: torch.dtype,
    bits: int,
    kind: str,
    lookup: bool,
    tokens: int | None = None,
    octets: bool = False,
    tiles: int | None = None,
) -> _cuda.Kernel:
    """Name an instantiation of `wqmm` (with tokens of a block, tiles of a piece, whether x consists of bytes) or `dequantize`."""
    decoder = f"{'Lookup' if lookup else 'Integer'}<{bits}>"
    last = "" if tokens is None else f", {tokens}, {pieces(tokens)[0] if tiles is None else tiles}"
    numbers = f"Bytes<{TYPES[dtype]}>" if octets else TYPES[dtype]
    return _cuda.Kernel("weight_only", f"{template}<{numbers}, {decoder}, {kind}{last}>", 32 * _WARPS)


def _table_bytes(bits: int, lookup: bool) -> int:
    return 4 * (4 << bits) if lookup else 0


def sums_bytes(tokens: int, members: int) -> int:
    """Bytes of shared memory for the sums of a block with teams of `members` warps, see `add_up`."""
    return _WARPS // members * tokens * (16 * BLOCKS * members + 4) * 4 + 16


def _shared(tiles: Tiles, tokens: int, wide: int, stages: int, records: int) -> int:
    """Bytes of shared memory of `wqmm`: the table and the teams' rings, or the sums that replace them."""
    members = team(tokens)
    codes = members * BLOCKS * (wide * 128 * tiles.bits + records * RECORD[tiles.kind])
    rings = _WARPS // members * stages * (wide * tokens * 8 * tiles.field + codes)
    return max(_table_bytes(tiles.bits, tiles.table is not None) + rings, sums_bytes(tokens, members))


def _record_bits(shape: _Shape, wide: int) -> int:
    """log2 of the number of parts of a piece that lie in one group each, however pieces and groups are aligned."""
    steps = 4 * wide
    if shape.steps >= 4 * shape.tiles:
        return 0
    return next(bits for bits in range(steps.bit_length()) if shape.steps % (steps >> bits) == 0)


def plan_of(
    count: int,
    tiles: Tiles,
    shape: _Shape,
    device: _cuda.Device,
    tokens: int,
    wide: int,
    stages: int,
    resident: int,
    waves: int = 1,
) -> Plan | None:
    """Return how to launch `wqmm` for `count` tokens, with `tokens` per block, `wide` tiles per piece and `stages` per ring.

    `resident` blocks must fit on a multiprocessor. If there are too few blocks for `waves` waves on all multiprocessors, the
    columns are split among more blocks. Returns None if shared memory does not suffice.
    """
    record_bits = _record_bits(shape, wide)
    shared = _shared(tiles, tokens, wide, stages, 1 << record_bits)
    if shared > (device.shared + 1024) // resident - 1024:  # the system reserves 1 kB per block
        return None
    teams, number = _WARPS // team(tokens), -(-shape.tiles // wide)
    blocks = -(-shape.row_blocks // (BLOCKS * team(tokens))) * -(-count // tokens)
    splits = max(1, min(waves * resident * device.processors // blocks, number // teams))
    per_split = -(-number // splits)
    return Plan(tokens, wide, stages, record_bits, shared, per_split, -(-number // per_split))


def plan(count: int, tiles: Tiles, shape: _Shape, device: _cuda.Device) -> Plan:
    """Choose how to launch `wqmm` for `count` tokens; `bench/tune.py` times the alternatives. Raises KernelError."""
    largest = next((n for n in TOKENS if n >= count), TOKENS[-1])
    for tokens in sorted((n for n in TOKENS if n <= largest), reverse=True):
        for resident in range(2 if tokens <= 16 else 1, 0, -1):  # as in __launch_bounds__
            for wide in pieces(tokens):
                for stages in (4, 3, 2):
                    if (found := plan_of(count, tiles, shape, device, tokens, wide, stages, resident)) is not None:
                        return found
    raise KernelError(f"{tiles.kind} of {tiles.bits} bits: a block does not fit {device.shared} bytes of shared memory")


def rows_of(x: Tensor, tiles: Tiles) -> Tensor:
    """Return x (..., in) as rows for 16-byte copies: in the tiles' order, addresses and strides multiples of 8 numbers."""
    if tiles.field != 16:
        raise KernelError("weights are laid out for activations of bytes; expected fields of 16 bits")
    return aligned_rows(x, tiles.shape[1], tiles.order)


def aligned_rows(x: Tensor, columns: int, order: Tensor | None) -> Tensor:
    """Return x (..., in) as rows for 16-byte copies, with columns in the given order. Raises KernelError."""
    if x.dtype not in TYPES:
        raise KernelError(f"x is {x.dtype}; expected {' or '.join(map(str, TYPES))}")
    if x.shape[-1] != columns:
        raise KernelError(f"x has {x.shape[-1]} columns; expected in={columns}")
    rows = x.reshape(-1, x.shape[-1])
    if order is not None:
        rows = rows.index_select(1, order)
    if rows.shape[1] % 8:
        return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    aligned = rows.data_ptr() % 16 == 0 and rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.stride(0) >= rows.shape[1]
    return rows if aligned or not rows.numel() else rows.clone(memory_format=torch.contiguous_format)


def check_added(x: Tensor, outputs: int, addend: Tensor | None, bias: Tensor | None) -> None:
    """Raise KernelError for an addend or a bias that does not fit the product of x (..., in)."""
    shape = (x.shape[:-1].numel(), outputs)
    if addend is not None and (addend.dtype != torch.float32 or addend.shape != shape or not addend.is_contiguous()):
        raise KernelError(f"addend is {addend.dtype} {tuple(addend.shape)}; expected contiguous float32 {shape}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (outputs,) or not bias.is_contiguous()):
        raise KernelError(f"bias is {bias.dtype} {tuple(bias.shape)}; expected contiguous {x.dtype} ({outputs},)")


def matmul_tiles(x: Tensor, tiles: Tiles, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus `addend` (tokens, out) in float32, plus bias (out,) in the type of x -> (..., out).

    Reads W from its codes, for any number of tokens. Raises KernelError.
    """
    rows = rows_of(x, tiles)
    count, outputs = len(rows), tiles.shape[0]
    y = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    check_added(x, outputs, addend, bias)
    if count:
        launch(rows, None, tiles, addend, bias, y)
    return y.reshape(*x.shape[:-1], outputs)


def launch(
    rows: Tensor,
    x_scale: Tensor | None,
    tiles: Tiles,
    addend: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    whole: Tensor | None = None,
) -> None:
    """Write the product of rows (tokens, in), aligned to 16 bytes, to y; rows are 16-bit numbers, or bytes with a scale per row.

    If y is None, write it to `whole` (tokens, out) in float32, without the bias; addend may be the same tensor.
    """
    shape = shape_of(tiles)
    p = plan(len(rows), tiles, shape, _cuda.device(rows.device.index or 0))
    panels, batches = -(-tiles.shape[0] // p.rows), -(-len(rows) // p.tokens)
    workspace = counters = None
    if p.splits > 1:
        workspace = torch.empty(batches * panels * p.splits * p.rows * p.tokens, dtype=torch.float32, device=rows.device)
        counters = _cuda.counters(batches * panels, rows.device)
    assert (y is None) != (whole is None)
    dtype = rows.dtype if y is None else y.dtype
    kernel = instance("wqmm", dtype, tiles.bits, tiles.kind, tiles.table is not None, p.tokens, tiles.field == 8, p.tiles)
    weight = WeightArguments(tiles.codes, tiles.meta, tiles.table, tiles.row_scale)
    output = OutputArguments(bias, addend, y, whole, workspace, counters)
    given = arguments(rows, x_scale, weight, output, shape, p, batches)
    _cuda.launch(kernel, (panels, p.splits, batches), given, p.shared, rows.device)


def dequantize_rows(tiles: Tiles, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Return rows start..stop of W in `dtype`, columns in the tiles' order; `start` is a multiple of 16."""
    if start % _tiles.ROWS or not 0 <= start <= stop <= tiles.shape[0] or dtype not in TYPES:
        raise KernelError(
            f"rows {start}..{stop} as {dtype}: expected a start that is a multiple of 16, and {', '.join(map(str, TYPES))}"
        )
    if tiles.field != 16:
        raise KernelError("weights are laid out for activations of bytes; expected fields of 16 bits")
    shape, where = shape_of(tiles), tiles.codes.device
    w = torch.empty(stop - start, tiles.shape[1], dtype=dtype, device=where)
    if w.numel():
        lookup = tiles.table is not None
        kernel = instance("dequantize", dtype, tiles.bits, tiles.kind, lookup)
        count = -(-len(w) // _tiles.ROWS) * shape.tiles
        grid = min(-(-count // _WARPS), 8 * _cuda.device(where.index or 0).processors)
        weight = WeightArguments(tiles.codes, tiles.meta, tiles.table, tiles.row_scale)
        steps = (shape.tiles, shape.row_blocks, shape.reciprocal, shape.entries)
        given: list[_cuda.Argument] = [*weight, w, start, len(w), tiles.shape[1], *steps]
        _cuda.launch(kernel, (grid, 1, 1), given, _table_bytes(tiles.bits, lookup) + _WARPS * 2048, where)
    return w


def matmul_dense(x: Tensor, tiles: Tiles) -> Tensor:
    """x (..., in) times W^T by decoding some rows of W at a time -> (..., out)."""
    rows = rows_of(x, tiles)[:, : tiles.shape[1]]
    step = max(_DENSE // tiles.shape[1] // _tiles.ROWS, 1) * _tiles.ROWS
    outputs = []
    for start in range(0, tiles.shape[0], step):
        outputs.append(rows @ dequantize_rows(tiles, x.dtype, start, min(start + step, tiles.shape[0])).T)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y.reshape(*x.shape[:-1], tiles.shape[0])


def _shape(x: Tensor, tiles: Tiles, addend: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    return (*x.shape[:-1], tiles.shape[0])


@operator("compress::weight_only", _shape)
def _op(x: Tensor, tiles: Tiles, addend: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.is_cuda and x.shape[:-1].numel() < CROSSOVER:
        return matmul_tiles(x, tiles, addend, bias)
    y = matmul_dense(x, tiles) if x.is_cuda else torch.nn.functional.linear(x, decode(tiles).to(x.dtype))
    if addend is not None:
        y = (y.float() + addend.view(y.shape)).to(y.dtype)
    return y if bias is None else y + bias


def product(x: Tensor, tiles: Tiles, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus `addend` (tokens, out) float32, plus bias (out,) -> (..., out); an operator for torch.compile.

    Chooses the implementation by the number of tokens and the device; on a CPU, plain torch. Raises KernelError.
    """
    return _op(x, tiles, addend, bias)


def matmul(x: Tensor, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """x (..., in) times the base of a site's packed weight, laid out for this one product -> (..., out). Raises KernelError."""
    if (why := reason(spec)) is not None:
        raise KernelError(f"weight_only: {why}")
    return matmul_tiles(x, prepare(packing.unpack(dict(spec), tensors).base))


def reason(spec: Mapping[str, Any]) -> str | None:
    """Return why the kernel does not take the base of a site of this description, or None if it does."""
    if packing.base_type(spec) is Mixed:
        return "groups have codes of different widths"
    return _weights.reason(spec)


def _why_not(spec: Mapping[str, Any], use: Use) -> str | None:
    if (why := _cuda.why_not(use) or reason(spec)) is not None:
        return why
    return None if use.activation_bits == 16 else f"activations of {use.activation_bits} bits; expected 16"


def codes_again(tiles: Tiles) -> dict[str, Tensor]:
    """Return the codes of tiles as stored, by name."""
    return {"codes": _weights.stored_codes(tiles)}


def _lay_out(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], use: Use) -> OnGpu[Tiles]:
    base = packing.unpack_base(spec, tensors)
    return OnGpu(KERNEL, prepare(base), product, codes_again, ("codes",), Added.of(tensors))


KERNEL = Kernel("weight_only", 50, ROLES, _why_not, _lay_out, decodes_from=CROSSOVER)
