"""Products of many experts with the tokens routed to them: one launch per kind of weight, without asking who got how many.

Rows of x are sorted by expert; `starts` says where each expert's begin, on the device. Every expert gets as many blocks as all
tokens could need, and those without a token return at once. Experts of different widths or groups are launches of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _cuda, weight_only
from compress.kernels._cuda import TYPES
from compress.kernels._on_gpu import OnGpu
from compress.kernels._operator import operator
from compress.kernels._weights import Tiles, decode
from compress.kernels.kernel import Kernel, Laid


@dataclass(frozen=True, eq=False)
class Group:
    """Experts whose weights are laid out alike, one behind the other."""

    tiles: dict[int, Tiles]  # of each expert, as views of the tensors here
    codes: Tensor  # (experts, words) int32
    meta: Tensor  # (experts, groups, row-blocks, record) uint8
    row_scale: Tensor | None  # (experts, out) float32
    table: Tensor  # (experts, 4) int64: addresses of codes, records and scales of rows (or 0), number of the expert

    @property
    def like(self) -> Tiles:
        """One of the experts."""
        return next(iter(self.tiles.values()))


def group(experts: Mapping[int, Tiles]) -> list[Group]:
    """Bring experts of the same shape, width and records together, in memory too. Raises KernelError.

    That is for columns in an order of their own, and weights laid out for bytes.
    """
    alike: dict[tuple[object, ...], dict[int, Tiles]] = {}
    for number, tiles in experts.items():
        if tiles.order is not None or tiles.field != 16:
            raise KernelError(f"expert {number}: columns are scattered, or laid out for bytes; such experts go one by one")
        values = None if tiles.table is None else tuple(tiles.table.tolist())
        key = (tiles.shape, tiles.bits, tiles.steps, tiles.kind, values, tiles.row_scale is None)
        alike.setdefault(key, {})[number] = tiles
    return [_joined(members) for members in alike.values()]


def _joined(members: Mapping[int, Tiles]) -> Group:
    codes = torch.stack([t.codes for t in members.values()])
    meta = torch.stack([t.meta for t in members.values()])
    scales = [t.row_scale for t in members.values() if t.row_scale is not None]
    row_scale = torch.stack(scales) if scales else None
    views, rows = {}, []
    for i, (number, tiles) in enumerate(members.items()):
        own = None if row_scale is None else row_scale[i]
        views[number] = replace(tiles, codes=codes[i], meta=meta[i], row_scale=own)
        rows.append((codes[i].data_ptr(), meta[i].data_ptr(), 0 if own is None else own.data_ptr(), number))
    return Group(views, codes, meta, row_scale, torch.tensor(rows, dtype=torch.int64).to(codes.device))


def matmul(x: Tensor, starts: Tensor, groups: Sequence[Group], most: int) -> Tensor:
    """Rows x (rows, in), sorted by expert, times each expert's W^T -> (rows, out); zeros where a row is no expert's.

    starts (experts + 1,) int32: where the rows of each expert begin. `most` is the largest number of rows that one can have.
    Raises KernelError.
    """
    first = groups[0].like
    outputs, columns = first.shape
    if x.dim() != 2 or x.shape[1] != columns or x.dtype not in TYPES or starts.dtype != torch.int32 or not starts.is_contiguous():
        raise KernelError(f"x is {x.dtype} {tuple(x.shape)}, starts {starts.dtype}; expected 16-bit (rows, {columns}) and int32")
    y = torch.zeros(len(x), outputs, dtype=x.dtype, device=x.device)
    if not y.numel() or most < 1:
        return y
    rows = weight_only.rows_of(x, first)
    average = -(-len(x) // max(1, len(starts) - 1))
    for one in groups:
        tiles = one.like
        shape, device = weight_only.shape_of(tiles), _cuda.device(x.device.index or 0)
        # As many tokens in a block as twice what an expert has in the mean: a few have more, and take more blocks.
        planned = weight_only.plan(min(most, 2 * average), tiles, shape, device)
        p = replace(planned, per_split=-(-shape.tiles // planned.tiles), splits=1)
        batches, panels = -(-most // p.tokens), -(-outputs // p.rows)
        kernel = weight_only.instance("wqmm", x.dtype, tiles.bits, tiles.kind, tiles.table is not None, p.tokens, tiles=p.tiles)
        weight, output = weight_only.WeightArguments(None, None, tiles.table, None), weight_only.OutputArguments(y=y)
        arguments = weight_only.arguments(rows, None, weight, output, shape, p, batches, (one.table, starts))
        reads = [t for t in (one.codes, one.meta, one.row_scale) if t is not None]
        _cuda.launch(kernel, (panels, 1, len(one.table) * batches), arguments, p.shared, x.device, reads)
    return y


def _by_torch(x: Tensor, starts: Tensor, groups: Sequence[Group]) -> Tensor:
    """As `matmul`, expert by expert."""
    y = torch.zeros(len(x), groups[0].like.shape[0], dtype=x.dtype, device=x.device)
    bounds = starts.tolist()
    for one in groups:
        for number, tiles in one.tiles.items():
            rows = slice(bounds[number], bounds[number + 1])
            y[rows] = torch.nn.functional.linear(x[rows], decode(tiles).to(x.dtype))
    return y


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """All groups of the experts of a block, as the operator is given them; an empty tensor stands for one that a group lacks."""

    tables: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    meta: tuple[Tensor, ...]
    row_scales: tuple[Tensor, ...]
    values: tuple[Tensor, ...]  # of tables of a datatype
    bits: tuple[int, ...]
    steps: tuple[int, ...]
    kinds: str  # with blanks between
    shape: tuple[int, int]  # of one expert

    @classmethod
    def of(cls, groups: Sequence[Group]) -> ExpertGroups:
        """Bring them together."""
        likes = [one.like for one in groups]
        none = groups[0].codes.new_empty(0, dtype=torch.float32)
        return cls(
            tuple(one.table for one in groups),
            tuple(one.codes for one in groups),
            tuple(one.meta for one in groups),
            tuple(none if one.row_scale is None else one.row_scale for one in groups),
            tuple(none if like.table is None else like.table for like in likes),
            tuple(like.bits for like in likes),
            tuple(like.steps for like in likes),
            " ".join(like.kind for like in likes),
            likes[0].shape,
        )

    def groups(self, apart: bool) -> list[Group]:
        """The reverse of `of`: with the tiles of each expert where they are wanted apart, else of one of them."""
        found = []
        for i, kind in enumerate(self.kinds.split()):
            scale, value = (tensors[i] if tensors[i].numel() else None for tensors in (self.row_scales, self.values))
            like = Tiles(self.codes[i][0], self.meta[i][0], value, None, None, self.shape, self.bits[i], self.steps[i], kind)
            members = {0: like}
            if apart:
                members = {
                    number: replace(
                        like, codes=self.codes[i][e], meta=self.meta[i][e], row_scale=None if scale is None else scale[e]
                    )
                    for e, number in enumerate(self.tables[i][:, 3].tolist())
                }
            found.append(Group(members, self.codes[i], self.meta[i], scale, self.tables[i]))
        return found


def _shape(x: Tensor, starts: Tensor, groups: ExpertGroups, most: int) -> tuple[int, ...]:
    return x.shape[0], groups.shape[0]


@operator("compress::experts", _shape)
def _op(x: Tensor, starts: Tensor, groups: ExpertGroups, most: int) -> Tensor:
    if x.is_cuda:
        return matmul(x, starts, groups.groups(apart=False), most)
    return _by_torch(x, starts, groups.groups(apart=True))


def product(x: Tensor, starts: Tensor, groups: Sequence[Group], most: int) -> Tensor:
    """As `matmul`, as an operator for torch.compile; on a CPU in plain torch. Raises KernelError."""
    return _op(x, starts, ExpertGroups.of(groups), most)


def takes(kernel: Kernel) -> bool:
    """Whether experts that this kernel multiplies by may be multiplied by together."""
    return kernel.name == weight_only.KERNEL.name


def together(laid: Sequence[Laid]) -> tuple[list[Group], list[Laid]] | None:
    """Bring laid-out experts together: groups, and each expert as a view of them; None where they have to run one by one."""
    plain: dict[int, OnGpu[Tiles]] = {}
    for number, one in enumerate(laid):
        if not isinstance(one, OnGpu) or not isinstance(one.weight, Tiles) or not one.added.empty:
            return None
        plain[number] = one
    try:
        groups = group({number: one.weight for number, one in plain.items()})
    except KernelError:  # scattered columns
        return None
    tiles = {number: view for one in groups for number, view in one.tiles.items()}
    return groups, [replace(one, weight=tiles[number]) for number, one in plain.items()]
