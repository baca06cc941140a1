"""Whether tensors fit their description: what every format asks before it follows any number in them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import FormatError


def check_tensors(name: str, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Mapping[str, Tensor]) -> None:
    """Raise FormatError where a tensor of a format's layout is missing, or of another type or shape."""
    for leaf, (dtype, expected) in layout.items():
        got = tensors.get(leaf)
        if got is None or got.dtype != dtype or tuple(got.shape) != expected:
            found = "nothing" if got is None else f"{got.dtype} {tuple(got.shape)}"
            raise FormatError(f"{name}: {leaf} is {found}; expected {dtype} {expected}")


def check_groups(name: str, group: Tensor, groups: int) -> None:
    """Raise FormatError unless each of the groups has as many of the columns (in,): kernels count on it."""
    if not bool(((group >= 0) & (group < groups)).all()):
        raise FormatError(f"{name}: group names a group outside 0..{groups - 1}; the file is damaged")
    if bool((torch.bincount(group.long(), minlength=groups) != len(group) // groups).any()):
        raise FormatError(
            f"{name}: group does not give each of the groups 0..{groups - 1} {len(group) // groups} columns; the file is damaged"
        )
