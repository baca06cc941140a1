"""`sparse`: a `Sparse` part as bytes, compressed sparse rows.

pointers  I32 (out + 1,)             where each row begins in the other two, then their length
columns   U8, I16 or I32 (nnz,)      the smallest type that holds all columns of the weight; rising within each row
values    BF16 (nnz,)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import _fit
from compress.weights.sparse import Sparse, column_dtype

_KEYS = ("format", "nnz")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class SparseRows:
    """The bijection between a Sparse part and named tensors."""

    name = "sparse"
    part = Sparse
    roles = ("outliers",)

    def describe(self, part: Sparse) -> dict[str, Any]:
        """Return what is needed to read the tensors, as JSON values for the model's config."""
        return {"format": self.name, "nnz": part.columns.shape[0]}

    def short(self, described: dict[str, Any]) -> str:
        """Return a short description of how a part is stored, for tables."""
        return f"{described['nnz']} sparse"

    def layout(self, described: dict[str, Any], shape: tuple[int, int]) -> Layout:
        """Return dtype and shape of each tensor of a part, without data. Raises FormatError."""
        if unknown := sorted(described.keys() - _KEYS):
            raise FormatError(
                f"sparse: {unknown[0]!r:.80} is not known; expected {', '.join(_KEYS)}. Written by a newer compress?"
            )
        nnz, (rows, columns) = described.get("nnz"), shape
        if not isinstance(nnz, int) or isinstance(nnz, bool) or not 0 <= nnz <= min(rows * columns, 2**31 - 1):
            raise FormatError(f"sparse: nnz is {nnz!r:.80}; expected 0 to {rows * columns}, all weights. The config is damaged")
        return {
            "pointers": (torch.int32, (rows + 1,)),
            "columns": (column_dtype(columns), (nnz,)),
            "values": (torch.bfloat16, (nnz,)),
        }

    def pack(self, part: Sparse) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        return {name: getattr(part, name).contiguous() for name in ("pointers", "columns", "values")}

    def check(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
        """Raise FormatError where tensors do not fit their description, or name what is not there."""
        _fit.check_tensors(self.name, self.layout(described, shape), tensors)
        pointers, columns, nnz = tensors["pointers"], tensors["columns"], described["nnz"]
        if int(pointers[0]) != 0 or int(pointers[-1]) != nnz or bool((pointers[1:] < pointers[:-1]).any()):
            raise FormatError(f"sparse: pointers do not rise from 0 to nnz={nnz}; the file is damaged, fetch it again")
        index = columns.long()
        if not bool(((index >= 0) & (index < shape[1])).all()):
            raise FormatError(f"sparse: columns names a column outside 0..{shape[1] - 1}; the file is damaged, fetch it again")
        # Columns may only decrease where a row begins: the flat indices, row by row, rise over the whole matrix.
        row = torch.arange(shape[0], device=index.device).repeat_interleave(pointers.diff().long(), output_size=nnz)
        if not bool(((row * shape[1] + index).diff() > 0).all()):
            raise FormatError("sparse: columns do not rise within a row; the file is damaged, fetch it again")

    def unpack(self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor]) -> Sparse:
        """Return the part that was packed, equal bit for bit. Raises FormatError where tensors do not fit their description."""
        self.check(described, shape, tensors)
        return Sparse(tensors["pointers"], tensors["columns"], tensors["values"], shape[1])

    def cut_rows(
        self, described: dict[str, Any], shape: tuple[int, int], tensors: dict[str, Tensor], start: int, stop: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return description and tensors of rows start..stop, with their own number of values. Raises FormatError."""
        pointers = tensors["pointers"][start : stop + 1]
        first, last = int(pointers[0]), int(pointers[-1])
        if not 0 <= first <= last <= described["nnz"]:
            raise FormatError(
                f"sparse: pointers of rows {start}..{stop} go from {first} to {last}; expected them to rise from 0 to "
                f"nnz={described['nnz']}. The file is damaged, fetch it again"
            )
        cut = {"pointers": pointers - first, "columns": tensors["columns"][first:last], "values": tensors["values"][first:last]}
        return {**described, "nnz": last - first}, cut


FORMAT = SparseRows()
