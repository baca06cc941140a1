"""y = x W^T for weights whose groups of columns have codes of different widths: one product per width, added in float32.

x is gathered once per width, the columns of its groups beside each other; the sums of one product are what the next one adds to,
and the last rounds the result. Everything else is `weight_only`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _weights, weight_only
from compress.kernels._weights import Tiles
from compress.weights.mixed import Mixed
from compress.weights.uniform import Uniform


def prepare(part: Mixed) -> list[Tiles]:
    """Lay out a part for the kernels, width by width; `order` of each has the columns of x that are its."""
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
    """The columns of x for one width, and its tiles for them as they are."""
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
    """The same by decoding W."""
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


@torch.library.custom_op("compress::mixed", mutates_args=())
def _op(
    x: Tensor,
    codes: list[Tensor],
    metas: list[Tensor],
    orders: list[Tensor],
    addend: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: list[int],
    steps: list[int],
    kinds: str,
) -> Tensor:
    widths = [
        Tiles(codes[i], metas[i], None, None, orders[i], (rows, orders[i].shape[0]), bits[i], steps[i], kind)
        for i, kind in enumerate(kinds.split())
    ]
    if x.is_cuda and x.shape[:-1].numel() < weight_only.CROSSOVER:
        return matmul_tiles(x, widths, addend, bias)
    return _dense(x, widths, addend, bias)


@_op.register_fake
def _(
    x: Tensor,
    codes: list[Tensor],
    metas: list[Tensor],
    orders: list[Tensor],
    addend: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: list[int],
    steps: list[int],
    kinds: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def product(x: Tensor, widths: Sequence[Tiles], addend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times W^T, plus addend and bias -> (..., out); an operator for torch.compile."""
    orders = [tiles.order for tiles in widths if tiles.order is not None]
    numbers = [t.bits for t in widths], [t.steps for t in widths], " ".join(t.kind for t in widths)
    codes, metas = [t.codes for t in widths], [t.meta for t in widths]
    y: Tensor = _op(x, codes, metas, orders, addend, bias, widths[0].shape[0], *numbers)
    return y
