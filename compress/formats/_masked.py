"""Shared by formats of a base that store only kept weights: the number of fields in their stream, and where tiles begin.

A description has `kept`, the number of weights that every row keeps; or, if rows differ, `fields`, the length of the stream, and
there is an additional tensor:

    pointers  I32 (ceil(out / 32) + 1,)   where every 32 rows begin in the stream, in units of 32 codes or of one value
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.weights.kept_values import TILE, Stream, same_in_rows, tiles

KEYS = ("kept", "fields")
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def describe(stream: Stream) -> dict[str, Any]:
    """Return the entries for a stream in the description of its base."""
    return {"kept": stream.count // stream.keep.shape[0]} if stream.pointers is None else {"fields": stream.count}


def layout(described: dict[str, Any], shape: tuple[int, int], align: int) -> Layout:
    """Return dtype and shape of the additional tensors; none for a base without a mask. Raises FormatError."""
    given = [key for key in KEYS if key in described]
    if not given:
        return {}
    key, value = given[0], described[given[0]]
    most = shape[1] if key == "kept" else shape[0] * shape[1] + tiles(shape[0]) * (align - 1)
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
    if len(given) > 1 or not whole or (key == "fields" and value % align):
        raise FormatError(
            f"{described.get('format')}: {' and '.join(given)} is {value!r:.80}; expected as kept how many weights each row "
            f"keeps, or as fields a multiple of {align}. The config is damaged"
        )
    return {} if key == "kept" else {"pointers": (torch.int32, (tiles(shape[0]) + 1,))}


def check(described: dict[str, Any], tensors: dict[str, Tensor], align: int) -> None:
    """Raise FormatError unless pointers rise within the stream; that they are those of the mask, `stream` says."""
    if "fields" not in described:
        return
    pointers, last = tensors["pointers"], described["fields"] // align
    if int(pointers[0]) != 0 or int(pointers[-1]) != last or bool((pointers[1:] < pointers[:-1]).any()):
        raise FormatError(f"{described['format']}: pointers do not rise from 0 to {last}; the file is damaged, fetch it again")


def fields(described: dict[str, Any], shape: tuple[int, int]) -> int:
    """Return the length of the stream."""
    return int(described.get("fields", shape[0] * described.get("kept", shape[1])))


def pointers(stream: Stream | None) -> dict[str, Tensor]:
    """Return the additional tensors of a stream."""
    return {} if stream is None or stream.pointers is None else {"pointers": stream.pointers}


def stream(name: str, described: dict[str, Any], tensors: dict[str, Tensor], keep: Tensor | None, align: int) -> Stream | None:
    """Return the stream of a mask (out, in); None without one. Raises FormatError if description or tensors do not fit it."""
    if (keep is None) == any(key in described for key in KEYS):
        found = "no mask" if keep is None else "a mask"
        raise FormatError(f"{name}: {found} beside the base; kept or fields say otherwise. The config is damaged")
    if keep is None:
        return None
    regular = "kept" in described
    if regular and same_in_rows(keep) != described["kept"]:
        raise FormatError(f"{name}: the mask does not keep {described['kept']} weights in every row; the file is damaged")
    made = Stream.of(keep, align, regular)
    if made.pointers is not None and not (made.count == described["fields"] and torch.equal(made.pointers, tensors["pointers"])):
        raise FormatError(f"{name}: pointers are not those of the mask; the file is damaged, fetch it again")
    return made


def cut(
    described: dict[str, Any],
    columns: int,
    tensors: dict[str, Tensor],
    start: int,
    stop: int,
    align: int,
    keep: Tensor | None,
) -> tuple[dict[str, Any], tuple[int, int], dict[str, Tensor]]:
    """Return the description of rows start..stop, their first and last field, and the additional tensors.

    `start` is a multiple of 32; `keep` is the mask of these rows, which determines where they end within their last tile. Raises
    FormatError if pointers do not rise within the stream.
    """
    if "fields" not in described or keep is None:
        each = described.get("kept", columns)
        return described, (start * each, stop * each), {}
    some = tensors["pointers"][start // TILE : tiles(stop) + 1]
    count = Stream.of(keep, align, False).count
    first, last = int(some[0]) * align, int(some[-1]) * align
    if not 0 <= first <= first + count <= last <= described["fields"]:
        raise FormatError(
            f"{described['format']}: pointers of rows {start}..{stop} go from {first} to {last}; expected them to rise from 0 to "
            f"{described['fields']} by what the mask keeps. The file is damaged, fetch it again"
        )
    pointers = some - some[0]
    pointers[-1] = count // align
    return {**described, "fields": count}, (first, first + count), {"pointers": pointers}
