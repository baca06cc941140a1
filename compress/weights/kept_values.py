"""How the kept weights of a matrix lie in one stream, row by row: parts count their bits with it, formats write it.

Where every row keeps as many, row r begins at field r k and nothing else is stored. Otherwise tiles of 32 rows begin at a
multiple of `align` fields, and pointers say where, so that a tile can be read without those before it; the fields between are 0.
Nothing in a stream tells which column a field belongs to: that is what the mask is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 32  # rows


def tiles(rows: int) -> int:
    """Number of tiles that rows make."""
    return -(-rows // TILE)


def same_in_rows(keep: Tensor) -> int | None:
    """Return how many each row of a mask (out, in) keeps, or None where rows differ."""
    counts = keep.sum(1)
    return int(counts[0]) if bool((counts == counts[0]).all()) else None


def kept_groups(keep: Tensor, group_size: int, group: Tensor | None = None) -> Tensor:
    """Return which groups (out, groups) have a kept weight; `group` (in,) where columns of a group are not neighbours."""
    if group is not None:
        keep = keep[:, torch.argsort(group.long(), stable=True)]
    live: Tensor = keep.unflatten(1, (-1, group_size)).any(2)
    return live


def stored_groups(keep: Tensor, group_size: int, group: Tensor | None = None) -> int | None:
    """Return how many groups of each row are stored, those with a kept weight; None: all, because rows differ or all have one."""
    live = kept_groups(keep, group_size, group)
    count = same_in_rows(live)
    return None if count is None or count == live.shape[1] else count


@dataclass(frozen=True, eq=False)
class Stream:
    """Where the kept weights of a mask (out, in) are in their stream."""

    keep: Tensor  # (out, in) bool
    count: int  # fields of the stream, those between tiles too
    pointers: Tensor | None  # (tiles + 1,) int32, in units of `align` fields; None: as many in every row
    place: Tensor | None  # (nnz,) int64 field of each kept weight; None: one after the other

    @classmethod
    def of(cls, keep: Tensor, align: int, regular: bool | None = None) -> Stream:
        """Lay out the kept weights; `regular`: whether without pointers, by default where rows allow it."""
        counts = keep.sum(1)
        if regular is None:
            regular = same_in_rows(keep) is not None
        if regular:
            return cls(keep, int(counts.sum()), None, None)
        padded = torch.nn.functional.pad(counts, (0, -len(counts) % TILE)).view(-1, TILE).sum(1)  # kept weights of each tile
        zero = counts.new_zeros(1)
        pointers = torch.cat([zero, (-(-padded // align)).cumsum(0)])
        shift = pointers[:-1] * align - torch.cat([zero, padded.cumsum(0)[:-1]])
        total = int(counts.sum())
        place = torch.arange(total, device=keep.device) + shift.repeat_interleave(padded, output_size=total)
        return cls(keep, int(pointers[-1]) * align, pointers.to(torch.int32), place)

    @property
    def pointer_bits(self) -> int:
        """Bits of the pointers."""
        return 0 if self.pointers is None else 32 * self.pointers.shape[0]

    def compact(self, fields: Tensor) -> Tensor:
        """Return the stream (count,) of what fields (out, in) hold at kept places."""
        kept = fields[self.keep]
        if self.place is None:
            return kept
        stream = kept.new_zeros(self.count)
        stream[self.place] = kept
        return stream

    def spread(self, stream: Tensor) -> Tensor:
        """Return the fields (out, in) of a stream, 0 where nothing is kept."""
        fields = stream.new_zeros(self.keep.shape)
        fields[self.keep] = stream if self.place is None else stream[self.place]
        return fields
