"""`mixed`: a `Mixed` part as bytes. For each width that occurs, the codes of its groups are one dense bit stream of that width.

    widths          I32 (words,)        width minus one of each group, in fields of 3 bits
    codes1..codes8  I32 (words,)        codes of the columns of all groups of that width, in column order, row by row
    scale           BF16 (out, groups)
    zero2..zero8    I32 (words,)        zero codes of the groups of that width, row by row, only on asymmetric grids
    group           I32 (words,)        group of each column, only if a group's columns are not adjacent: fields of
                                        ceil(log2 groups) bits, at least 1; for more than 256 groups I16 or I32 (in,)

The description counts the groups of each width, so that sizes are known without data; the order of groups is in `widths`. 32
rows of any stream fill whole words.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights import bit_stream as _bits
from compress.weights.mixed import WIDTH_BITS, WIDTHS, Mixed, group_bits, group_dtype

_KEYS = ("format", "group_size", "groups", "zero", "scattered")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_column(widths: Tensor, group: Tensor | None, group_size: int) -> Tensor:
    """The width of each column (in,)."""
    return widths.repeat_interleave(group_size) if group is None else widths[group.long()]


class MixedWidths:
    """The bijection between a Mixed part and named tensors."""

    name = "mixed"
    part = Mixed
    roles = ("base",)

    def describe(self, part: Mixed) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        described = {"format": self.name, "group_size": part.group_size, "groups": part.counts, "zero": part.zero is not None}
        return described if part.group is None else {**described, "scattered": True}

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        counts = described["groups"]
        mean = sum(bits * count for bits, count in zip(WIDTHS, counts, strict=True)) / sum(counts)
        present = [bits for bits, count in zip(WIDTHS, counts, strict=True) if count]
        widths = f"{present[0]}-bit" if len(present) == 1 else f"{mean:.3g}-bit ({present[0]}..{present[-1]})"
        more = (" with zeros", "zero"), (" scattered", "scattered")
        return f"{widths} g{described['group_size']}" + "".join(text for text, key in more if described.get(key))

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        rows, columns = shape
        group_size, counts, zero = described.get("group_size"), described.get("groups"), described.get("zero", False)
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"mixed: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        if not (_whole(group_size) and 0 < group_size <= columns and columns % group_size == 0):
            raise FormatError(f"mixed: group_size is {group_size!r:.80}; expected a divisor of in={columns}")
        groups = columns // group_size
        if not (isinstance(counts, list) and len(counts) == len(WIDTHS) and all(_whole(n) and 0 <= n <= groups for n in counts)):
            raise FormatError(f"mixed: groups is {counts!r:.80}; expected the number of groups of 1, 2, ..., 8 bits as a list")
        if sum(counts) != groups:
            raise FormatError(
                f"mixed: groups add up to {sum(counts)}; expected {groups}, which is in={columns} over group_size={group_size}. "
                "The config does not belong to these weights"
            )
        if not isinstance(zero, bool):
            raise FormatError(f"mixed: zero is {zero!r:.80}; expected true or false")
        if "scattered" in described and described["scattered"] is not True:
            raise FormatError(f"mixed: scattered is {described['scattered']!r:.80}; expected true, or no scattered")
        layout: Layout = {"widths": (torch.int32, (_bits.words(groups, WIDTH_BITS),)), "scale": (torch.bfloat16, (rows, groups))}
        for bits, count in zip(WIDTHS, counts, strict=True):
            if count:
                layout[f"codes{bits}"] = (torch.int32, (_bits.words(rows * count * group_size, bits),))
                if zero and bits > 1:
                    layout[f"zero{bits}"] = (torch.int32, (_bits.words(rows * count, bits),))
        if "scattered" in described:
            layout["group"] = (group_dtype(groups), (columns,))
            if groups <= 256:
                layout["group"] = (torch.int32, (_bits.words(columns, group_bits(groups)),))
        return layout

    def pack(self, part: Mixed) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        tensors = {"widths": _bits.pack(part.widths - 1, WIDTH_BITS), "scale": part.scale.contiguous()}
        if part.group is not None:
            groups = len(part.widths)
            tensors["group"] = _bits.pack(part.group, group_bits(groups)) if groups <= 256 else part.group.contiguous()
        of_column = _of_column(part.widths, part.group, part.group_size)
        for bits, count in zip(WIDTHS, part.counts, strict=True):
            if count:
                tensors[f"codes{bits}"] = _bits.pack(part.codes[:, of_column == bits], bits)
                if part.zero is not None and bits > 1:
                    tensors[f"zero{bits}"] = _bits.pack(part.zero[:, part.widths == bits], bits)
        return tensors

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        widths = self._widths(described, shape, tensors["widths"])
        if "scattered" in described:
            self._group(tensors["group"], shape[1], len(widths))

    def _widths(self, described: dict[str, Any], shape: tuple[int, int], stored: Tensor) -> Tensor:
        """Return the width of each group (groups,). Raises FormatError unless there are as many of each as described."""
        widths = _bits.unpack(stored, WIDTH_BITS, shape[1] // described["group_size"]) + 1
        found = torch.bincount(widths.long(), minlength=WIDTHS.stop)[1:].tolist()
        if found != described["groups"]:
            raise FormatError(
                f"mixed: widths has {found} groups of 1..8 bits; expected {described['groups']} as described. The file is damaged"
            )
        return widths

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> Mixed:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        (rows, columns), size, counts = shape, described["group_size"], described["groups"]
        widths, scale = self._widths(described, shape, tensors["widths"]), tensors["scale"]
        group = self._group(tensors["group"], columns, columns // size) if "scattered" in described else None
        of_column = _of_column(widths, group, size)
        codes = torch.empty(shape, dtype=torch.uint8, device=scale.device)
        zero = torch.zeros(scale.shape, dtype=torch.uint8, device=scale.device) if described.get("zero") else None
        for bits, count in zip(WIDTHS, counts, strict=True):
            if count:
                fields = _bits.unpack(tensors[f"codes{bits}"], bits, rows * count * size)
                codes[:, of_column == bits] = fields.view(rows, count * size)
                if zero is not None and bits > 1:
                    zero[:, widths == bits] = _bits.unpack(tensors[f"zero{bits}"], bits, rows * count).view(rows, count)
        return Mixed(codes, scale, widths, size, zero, group)

    def _group(self, stored: Tensor, columns: int, groups: int) -> Tensor:
        """Return the group of each column. Raises FormatError unless all groups have the same number of columns."""
        group = _bits.unpack(stored, group_bits(groups), columns) if groups <= 256 else stored
        _fit.check_groups(self.name, group, groups)
        return group

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop; `start`, a multiple of 32, begins on a word in each stream."""
        cut = {**tensors, "scale": tensors["scale"][start:stop]}
        for bits, count in zip(WIDTHS, described["groups"], strict=True):
            for name, fields in ((f"codes{bits}", count * described["group_size"]), (f"zero{bits}", count)):
                if name in tensors:
                    cut[name] = tensors[name][start * fields * bits // 32 : _bits.words(stop * fields, bits)]
        return described, cut


FORMAT = MixedWidths()
