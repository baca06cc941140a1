"""y = x W^T for pruned weights and 16-bit x, from the kept weights and their mask: codes on a grid, or 16-bit values.

Shapes      x (tokens, in), W (out, in) as `_layouts.Packets`, y (tokens, out) in the type of x.
Two of four the weight is the sparse operand of `mma.sp`, which skips what is not there: half the products.
Runs        of 16 neighbouring columns, whole groups kept or gone: what is gone is not read, and is 0 in a dense product.
Others      single weights anywhere are read as a mask and kept weights and put where they belong in registers.
Arithmetic  that of `weight_only`; sums of x for shifts are those of the columns that a row keeps. Values are exact.
Many tokens from `weight_only.CROSSOVER` on, rows of W are made whole in a buffer and multiplied by torch.
Limits      codes in groups of a multiple of 16 columns, or one group per row; values in the type of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.formats import bitmask, pattern
from compress.kernels import _cuda, _packets, _tiles, _weights, weight_only
from compress.kernels._cuda import TYPES
from compress.kernels._layouts import VALUE, Packets
from compress.kernels._on_gpu import ROLES, Added, OnGpu
from compress.kernels._operator import operator
from compress.kernels.kernel import Kernel, Use
from compress.kernels.weight_only import BLOCKS, TOKENS
from compress.weights import bit_stream as _bits
from compress.weights.bit_stream import WORD
from compress.weights.dense import Dense
from compress.weights.kept_values import Stream
from compress.weights.mask import Bitmask, Pattern
from compress.weights.uniform import Uniform

_WARPS, _ROWS = 8, BLOCKS * _tiles.ROWS  # of a block; of a warp
_LAYOUTS = {"SINGLE": "Single", "RUNS": "Runs", "TWO_OF_FOUR": "TwoOfFour"}
_KINDS = {torch.bfloat16: "BF16", torch.float16: "FP16"}
_DENSE = 1 << 27  # numbers of W made whole at a time, 256 MB


def reason(spec: Mapping[str, Any]) -> str | None:
    """Say why the kernel does not take the base of a pruned site of this description, or None if it does."""
    base = spec["base"]
    if packing.base_type(spec) is Dense:
        return None if base["dtype"] in ("BF16", "F16") else f"values of {base['dtype']}; expected 16 bits"
    if "scale" in base:
        return f"scales of {base['scale']} under a mask; expected BF16"
    return _weights.reason(spec)


def _value_type(spec: Mapping[str, Any]) -> torch.dtype | None:
    """The type of 16-bit values, which activations must have lest values be rounded; None for codes."""
    return {"BF16": torch.bfloat16, "F16": torch.float16}[spec["base"]["dtype"]] if packing.base_type(spec) is Dense else None


def instance(template: str, dtype: torch.dtype, layout: str, bits: int, kind: str, tokens: int | None = None) -> _cuda.Kernel:
    """Name an instantiation of `masked_products` (with the tokens of a block) or `masked_weight`; 16 bits are values."""
    decoder, meta = ("Value", "SYMMETRIC") if bits == VALUE else (f"Integer<{bits}>", kind)
    last = "" if tokens is None else f", {tokens}"
    return _cuda.Kernel("masked", f"{template}<{TYPES[dtype]}, {_LAYOUTS[layout]}<{decoder}, {meta}>{last}>", 32 * _WARPS)


def _shared(tokens: int, stages: int, packets: Packets) -> int:
    """Bytes of shared memory of `masked_products`: the teams' rings, or the sums that take their place."""
    members = weight_only.team(tokens)
    stage = tokens * 2 * packets.width + members * BLOCKS * packets.room
    return max(_WARPS // members * stages * stage, weight_only.sums_bytes(tokens, members))


def plan(count: int, packets: Packets, device: _cuda.Device) -> tuple[int, int, int]:
    """Choose tokens of a block, stages of a ring and tiles per block. Raises KernelError."""
    largest = next((n for n in TOKENS if n >= count), TOKENS[-1])
    for tokens in sorted((n for n in TOKENS if n <= largest), reverse=True):
        resident, members = 2 if tokens <= 16 else 1, weight_only.team(tokens)
        room = (device.shared + 1024) // resident - 1024  # the system takes 1 kB of each block
        for limit in (room, device.shared):
            stages = next((s for s in (4, 3, 2) if _shared(tokens, s, packets) <= limit), None)
            if stages is not None:
                blocks = -(-packets.shape[0] // (_ROWS * members)) * -(-count // tokens)
                splits = max(1, min(resident * device.processors // blocks, packets.tiles // (_WARPS // members)))
                return tokens, stages, -(-packets.tiles // splits)
    raise KernelError(f"packets of {packets.room} bytes: a block does not fit {device.shared} bytes of shared memory")


def _rows_of(x: Tensor, packets: Packets) -> Tensor:
    if packets.bits == VALUE and _KINDS.get(x.dtype) != packets.kind:
        raise KernelError(f"x is {x.dtype}; expected the type of the weight's values, {packets.kind}")
    return weight_only.aligned_rows(x, packets.shape[1], packets.order)


def matmul_packets(x: Tensor, packets: Packets, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus `addend` (tokens, out) in float32, plus bias (out,) in the type of x -> (..., out).

    Reads W from its packets, however many tokens there are. Raises KernelError.
    """
    rows, outputs = _rows_of(x, packets), packets.shape[0]
    y = torch.empty(len(rows), outputs, dtype=x.dtype, device=x.device)
    weight_only.check_added(x, outputs, addend, bias)
    if y.numel():
        device = _cuda.device(x.device.index or 0)
        tokens, stages, per_split = plan(len(rows), packets, device)
        high = _ROWS * weight_only.team(tokens)
        splits, panels, batches = -(-packets.tiles // per_split), -(-outputs // high), -(-len(rows) // tokens)
        workspace = counters = None
        if splits > 1:
            workspace = torch.empty(batches * panels * splits * high * tokens, dtype=torch.float32, device=x.device)
            counters = _cuda.counters(batches * panels, x.device)
        arguments: list[_cuda.Argument] = [rows, packets.data, packets.offsets, bias, addend, y, workspace, counters, len(rows)]
        arguments += [outputs, rows.shape[1], np.int64(rows.stride(0)), packets.tiles, -(-outputs // 16), per_split]
        arguments += [packets.record_bits, stages, packets.room]
        kernel = instance("masked_products", x.dtype, packets.layout, packets.bits, packets.kind, tokens)
        _cuda.launch(kernel, (panels, splits, batches), arguments, _shared(tokens, stages, packets), x.device)
    return y.reshape(*x.shape[:-1], outputs)


def weight_rows(packets: Packets, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Return rows start..stop of W in `dtype`, columns in the packets' order; `start` is a multiple of 16. Raises KernelError."""
    if start % _tiles.ROWS or not 0 <= start <= stop <= packets.shape[0] or dtype not in TYPES:
        raise KernelError(f"rows {start}..{stop} as {dtype}: expected a start that is a multiple of 16, and 16-bit numbers")
    where = packets.data.device
    w = torch.empty(stop - start, packets.shape[1], dtype=dtype, device=where)
    if w.numel():
        kernel = instance("masked_weight", dtype, packets.layout, packets.bits, packets.kind)
        grid = min(-(-(-(-len(w) // 16) * packets.tiles) // _WARPS), 8 * _cuda.device(where.index or 0).processors)
        arguments: list[_cuda.Argument] = [packets.data, packets.offsets, w, start, len(w), packets.shape[1], packets.tiles]
        arguments.append(packets.record_bits)
        _cuda.launch(kernel, (grid, 1, 1), arguments, _WARPS * 32 * packets.width, where)
    return w


def matmul_dense(x: Tensor, packets: Packets) -> Tensor:
    """x (..., in) times W^T by making some rows of W whole at a time -> (..., out). Raises KernelError."""
    rows, outputs = _rows_of(x, packets)[:, : packets.shape[1]], packets.shape[0]
    step = max(_DENSE // packets.shape[1] // _tiles.ROWS, 1) * _tiles.ROWS
    parts = [rows @ weight_rows(packets, x.dtype, at, min(at + step, outputs)).T for at in range(0, outputs, step)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return y.reshape(*x.shape[:-1], outputs)


def _shape(x: Tensor, packets: Packets, addend: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    return (*x.shape[:-1], packets.shape[0])


@operator("compress::masked", _shape)
def _op(x: Tensor, packets: Packets, addend: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.is_cuda and x.shape[:-1].numel() < weight_only.CROSSOVER:
        return matmul_packets(x, packets, addend, bias)
    y = matmul_dense(x, packets) if x.is_cuda else torch.nn.functional.linear(x, _packets.decode(packets).to(x.dtype))
    if addend is not None:
        y = (y.float() + addend.view(y.shape)).to(y.dtype)
    return y if bias is None else y + bias


def product(x: Tensor, packets: Packets, addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus `addend` (tokens, out) float32, plus bias (out,) -> (..., out); an operator for torch.compile.

    Takes the way that suits the number of tokens and the device; on a CPU, plain torch. Raises KernelError.
    """
    return _op(x, packets, addend, bias)


def prepare(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packets:
    """Lay out the base and the mask of a site for the kernels, on the device where they are. Raises KernelError."""
    if "keep" not in spec:
        raise KernelError("masked: the weight has no mask")
    if (why := reason(spec)) is not None:
        raise KernelError(f"masked: {why}")
    weight = packing.unpack({role: spec[role] for role in ("shape", "base", "keep")}, tensors)
    assert isinstance(weight.base, Dense | Uniform)
    assert isinstance(weight.keep, Bitmask | Pattern)
    return _packets.prepare(weight.base, weight.keep)


def stored(packets: Packets, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a site that packets take the place of, as they are stored: codes or values, and the mask."""
    fields, mask = _packets.stored(packets)
    described = spec["base"]
    compact = Stream.of(mask, 1 if packets.bits == VALUE else WORD, "kept" in described).compact(fields)
    tensors = {"values": compact} if packets.bits == VALUE else {"codes": _bits.pack(compact, packets.bits)}
    keep = spec["keep"]
    if "of" in keep:  # a pattern
        return {**tensors, "keep_choice": pattern.FORMAT.pack(Pattern.from_mask(mask, keep["kept"], keep["of"]))["choice"]}
    return {**tensors, "keep_bits": bitmask.FORMAT.pack(Bitmask(mask[:, :: keep["size"]], keep["size"]))["bits"]}


def matmul(x: Tensor, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """x (..., in) times base and mask of a site's packed weight, laid out for this product -> (..., out). Raises KernelError."""
    return matmul_packets(x, prepare(spec, tensors))


def _why_not(spec: Mapping[str, Any], use: Use) -> str | None:
    if "keep" not in spec:
        return "the weight has no mask"
    if (why := _cuda.why_not(use) or reason(spec)) is not None:
        return why
    if use.activation_bits != 16:
        return f"activations of {use.activation_bits} bits; expected 16"
    wanted = _value_type(spec)
    return None if wanted in (None, use.dtype) else f"x is {use.dtype}; expected the type of the weight's values, {wanted}"


def _lay_out(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], use: Use) -> OnGpu[Packets]:
    replaced = tuple(name for name in tensors if name in ("codes", "values", "keep_bits", "keep_choice"))
    again = partial(stored, spec=spec)
    return OnGpu(KERNEL, prepare(spec, tensors), product, again, replaced, Added.of(tensors), _value_type(spec))


KERNEL = Kernel("masked", 30, ROLES | {"keep"}, _why_not, _lay_out, decodes_from=weight_only.CROSSOVER)
