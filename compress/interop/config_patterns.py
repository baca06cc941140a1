"""Names and settings in the configs of other tools: patterns for many modules, and values that are checked before use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import site_table
from compress.errors import FormatError

Read = Callable[[str], Tensor]  # reads a tensor of the checkpoint by name


def fold(names: Iterable[str]) -> list[str]:
    """Fold runs of numbers in names, as `quantization_config` of the native format does."""
    return site_table.fold(names)


def pattern(folded: str) -> str:
    """Return the regular expression of a folded name, to be matched from its start: whole names and nothing else."""
    pieces = re.split(r"\{([^{}]*)\}", folded)
    text = re.escape(pieces[0])
    for runs, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        numbers = [n for run in runs.split(",") for n in _range(run)]
        text += (f"({'|'.join(numbers)})" if len(numbers) > 1 else numbers[0]) + re.escape(piece)
    return f"^{text}$"


def _range(run: str) -> list[str]:
    first, _, last = run.partition("-")
    return [str(n) for n in range(int(first), int(last or first) + 1)]


def override(dynamic: Any, site: str) -> dict[str, Any]:
    """Return what GPTQ's `dynamic` says of a module: the settings of the first pattern that matches."""
    for key, values in dynamic.items() if isinstance(dynamic, dict) else ():
        expression = key.removeprefix("+:")
        try:
            hit = not key.startswith("-:") and re.match(expression, site)
        except re.error as error:
            raise FormatError(
                f"quantization_config: dynamic has {key!r:.80}, which is no regular expression ({error})"
            ) from error
        if hit and isinstance(values, dict):
            return values
    return {}


def whole(values: Mapping[str, Any], key: str, place: str) -> int:
    """Return a setting that must be a whole number. Raises FormatError."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"{place}: {key} is {value!r:.80} in quantization_config; expected a whole number")
    return value


def scale_of(dtype: str, site: str) -> str:
    """Return the dtype of scales if it is one that a grid can have. Raises FormatError."""
    if dtype not in ("F16", "BF16", "F32"):
        raise FormatError(f"{site}: scales are {dtype}; expected F16, BF16 or F32")
    return dtype


def whole_groups(site: str, columns: int, size: int, lacking: list[str]) -> None:
    """Check that a site has all its tensors, and groups that divide its columns. Raises FormatError."""
    if lacking:
        raise FormatError(f"{site}.{lacking[0]}: missing; the checkpoint is incomplete, fetch it again")
    if size < 1 or columns % size:
        raise FormatError(
            f"{site}: in={columns} with group_size={size}; expected whole groups. The config does not belong to these weights"
        )


def check(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors that were read with what they should be. Raises FormatError."""
    for leaf, tensor in tensors.items():
        dtype, shape = layout[leaf]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise FormatError(f"{leaf} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
