"""y = x W^T for weights whose groups of columns have codes of different widths: one product per width, added in float32.

x is gathered once per width, with the columns of its groups next to each other; each product adds to the sums of the previous
one, and the last rounds the result. Everything else is as in `weight_only`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _cuda, _weights, weight_only
from compress.kernels._on_gpu import ROLES, Added, OnGpu
from compress.kernels._operator import operator
from compress.kernels._weights import Tiles
from compress.kernels.kernel import Kernel, Use
from compress.weights.mixed import Mixed
from compress.weights.uniform import Uniform


def prepare(part: Mixed) -> list[Tiles]:
    """Lay out a part for the kernels, width by width; the `order` of each lists its columns of x."""
    columns = part.codes.shape[1]
    group = torch.arange(columns, device=part.codes.device) // part.group_size if part.group is None else part.group.long()
    found = []
    for bits, count in enumerate(part.counts, 1):
        if not count:
            continue
        chosen = part.widths.to(group.device) == bits
        place = torch.argsort(torch.where(chosen[group], group, len(chosen)), stable=True)[: count * part.group_size]
        zero = part.zero[:, chosen] if part.zero is not None and bits > 1 else None
        sub = Uniform(part.codes[:, place], part.scale[:, chosen], bits, part.group_size, zero)
        tiles = _weights.prepare(sub)
        found.append(Tiles(tiles.codes, tiles.meta, None, None, place, tiles.shape, bits, tiles.steps, tiles.kind))
    return found


def _gathered(x: Tensor, tiles: Tiles) -> tuple[Tensor, Tiles]:
    """Return the columns of x for one width, and its tiles without `order`."""
    assert tiles.order is not None
    plain = Tiles(tiles.codes, tiles.meta, None, None, None, tiles.shape, tiles.bits, tiles.steps, tiles.kind)
    return x.index_select(1, tiles.order), plain


def matmul_tiles(x: Tensor, widths: Sequence[Tiles], addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus `addend` (tokens, out) in float32, plus bias (out,) in the type of x -> (..., out).

    Raises KernelError.
    """
    rows, flat = widths[0].shape[0], x.reshape(-1, x.shape[-1])
    if (columns := sum(tiles.shape[1] for tiles in widths)) != x.shape[-1]:
        raise KernelError(f"x has {x.shape[-1]} columns; expected in={columns}")
    weight_only.check_added(x, rows, addend, bias)
    y = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
    if y.numel():
        whole = torch.empty(y.shape, dtype=torch.float32, device=x.device) if len(widths) > 1 else None
        for number, tiles in enumerate(widths):
            mine, plain = _gathered(flat, tiles)
            mine = weight_only.rows_of(mine, plain)
            if number + 1 < len(widths):
                weight_only.launch(mine, None, plain, addend, None, None, whole)
                addend = whole
            else:
                weight_only.launch(mine, None, plain, addend, bias, y)
    return y.reshape(*x.shape[:-1], rows)


def _dense(x: Tensor, widths: Sequence[Tiles], addend: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute the same by decoding W."""
    flat = x.reshape(-1, x.shape[-1])
    y = None if addend is None else addend.clone()
    for tiles in widths:
        mine, plain = _gathered(flat, tiles)
        if x.is_cuda:
            part = weight_only.matmul_dense(mine, plain)
        else:
            part = torch.nn.functional.linear(mine, _weights.decode(plain).to(x.dtype))
        y = part.float() if y is None else y.add_(part)
    assert y is not None
    y = y.to(x.dtype).reshape(*x.shape[:-1], widths[0].shape[0])
    return y if bias is None else y + bias


@dataclass(frozen=True, eq=False)
class Widths:
    """The tiles of all widths, as the operator takes them."""

    codes: tuple[Tensor, ...]
    meta: tuple[Tensor, ...]
    order: tuple[Tensor, ...]
    bits: tuple[int, ...]
    steps: tuple[int, ...]
    kinds: str  # separated by blanks
    rows: int

    @classmethod
    def of(cls, tiles: Sequence[Tiles]) -> Widths:
        """Collect the tiles of all widths."""
        codes, meta = tuple(t.codes for t in tiles), tuple(t.meta for t in tiles)
        order = tuple(t.order for t in tiles if t.order is not None)
        bits, steps = tuple(t.bits for t in tiles), tuple(t.steps for t in tiles)
        return cls(codes, meta, order, bits, steps, " ".join(t.kind for t in tiles), tiles[0].shape[0])

    @property
    def tiles(self) -> list[Tiles]:
        """The reverse of `of`."""
        each = zip(self.codes, self.meta, self.order, self.bits, self.steps, self.kinds.split(), strict=True)
        return [
            Tiles(codes, meta, None, None, order, (self.rows, len(order)), bits, steps, kind)
            for codes, meta, order, bits, steps, kind in each
        ]


def _shape(x: Tensor, widths: Widths, addend: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    return (*x.shape[:-1], widths.rows)


@operator("compress::mixed", _shape)
def _op(x: Tensor, widths: Widths, addend: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.is_cuda and x.shape[:-1].numel() < weight_only.CROSSOVER:
        return matmul_tiles(x, widths.tiles, addend, bias)
    return _dense(x, widths.tiles, addend, bias)


def product(x: Tensor, widths: Sequence[Tiles], addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus addend and bias -> (..., out); an operator for torch.compile."""
    return _op(x, Widths.of(widths), addend, bias)


def _why_not(spec: Mapping[str, Any], use: Use) -> str | None:
    if packing.base_type(spec) is not Mixed:
        return "all groups have codes of one width"
    if (why := _cuda.why_not(use) or _weights.reason(spec)) is not None:
        return why
    return None if use.activation_bits == 16 else f"activations of {use.activation_bits} bits; expected 16"


def _again(widths: Sequence[Tiles]) -> dict[str, Tensor]:
    return {f"codes{tiles.bits}": _weights.stored_codes(tiles) for tiles in widths}


def _lay_out(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], use: Use) -> OnGpu[Sequence[Tiles]]:
    widths = prepare(packing.unpack_base(spec, tensors))
    return OnGpu(KERNEL, widths, product, _again, tuple(f"codes{tiles.bits}" for tiles in widths), Added.of(tensors))


KERNEL = Kernel("mixed", 40, ROLES, _why_not, _lay_out, decodes_from=weight_only.CROSSOVER)
