"""Products of many experts with the tokens routed to them: one launch per kind of weight, without asking who got how many.

Rows of x are sorted by expert; `starts` says where each expert's begin, on the device. Every expert gets as many blocks as all
tokens could need, and those without a token return at once. Experts of different widths or groups are launches of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda, weight_only
from compress.kernels._weights import Tiles
from compress.kernels.weight_only import TYPES


@dataclass(frozen=True, eq=False)
class Group:
    """Experts whose weights are laid out alike."""

    tiles: list[Tiles]
    table: Tensor  # (experts, 4) int64: addresses of codes, records and scales of rows (or 0), number of the expert


def group(experts: Mapping[int, Tiles]) -> list[Group]:
    """Bring experts of the same shape, width and records together. Raises KernelError for columns in an order of their own."""
    alike: dict[tuple[object, ...], dict[int, Tiles]] = {}
    for number, tiles in experts.items():
        if tiles.order is not None or tiles.field != 16:
            raise KernelError(f"expert {number}: columns are scattered, or laid out for bytes; such experts go one by one")
        values = None if tiles.table is None else tuple(tiles.table.tolist())
        key = (tiles.shape, tiles.bits, tiles.steps, tiles.kind, values, tiles.row_scale is None)
        alike.setdefault(key, {})[number] = tiles
    groups = []
    for members in alike.values():
        rows = [
            (t.codes.data_ptr(), t.meta.data_ptr(), 0 if t.row_scale is None else t.row_scale.data_ptr(), number)
            for number, t in members.items()
        ]
        device = next(iter(members.values())).codes.device
        groups.append(Group(list(members.values()), torch.tensor(rows, dtype=torch.int64).to(device)))
    return groups


def matmul(x: Tensor, starts: Tensor, groups: Sequence[Group], most: int) -> Tensor:
    """Rows x (rows, in), sorted by expert, times each expert's W^T -> (rows, out); zeros where a row is no expert's.

    starts (experts + 1,) int32: where the rows of each expert begin. `most` is the largest number of rows that one can have.
    Raises KernelError.
    """
    first = groups[0].tiles[0]
    outputs, columns = first.shape
    if x.dim() != 2 or x.shape[1] != columns or x.dtype not in TYPES or starts.dtype != torch.int32 or not starts.is_contiguous():
        raise KernelError(f"x is {x.dtype} {tuple(x.shape)}, starts {starts.dtype}; expected 16-bit (rows, {columns}) and int32")
    y = torch.zeros(len(x), outputs, dtype=x.dtype, device=x.device)
    if not y.numel() or most < 1:
        return y
    rows = weight_only.rows_of(x, first)
    average = -(-len(x) // max(1, len(starts) - 1))
    for one in groups:
        tiles = one.tiles[0]
        shape, device = weight_only.shape_of(tiles), _cuda.device(x.device.index or 0)
        # As many tokens in a block as twice what an expert has in the mean: a few have more, and take more blocks.
        tokens, stages, shared, _ = weight_only.plan(min(most, 2 * average), tiles, shape, device)
        batches, panels = -(-most // tokens), -(-shape.row_blocks // weight_only.BLOCKS)
        kernel = weight_only.instance("wqmm", x.dtype, tiles.bits, tiles.kind, tiles.table is not None, tokens)
        arguments: list[_cuda.Argument] = [rows, None, None, None, tiles.table, None, None, None, y, None, None, None]
        arguments += [one.table, starts, batches, 0, outputs, rows.shape[1], np.int64(rows.stride(0)), shape.tiles]
        arguments += [shape.row_blocks, shape.tiles, shape.record_bits, shape.steps, shape.reciprocal, stages, shape.entries]
        reads = [t for member in one.tiles for t in (member.codes, member.meta, member.row_scale) if t is not None]
        _cuda.launch(kernel, (panels, 1, len(one.tiles) * batches), arguments, shared, x.device, reads)
    return y
