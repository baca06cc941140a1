"""What `make test` takes of an exhaustive test, and `make test-all` whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

THOROUGH = bool(os.environ.get("COMPRESS_SLOW"))


def times(few: int, many: int) -> int:
    """How often something random is tried."""
    return many if THOROUGH else few


def some(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All values as parameters of a test; those that are not among `fast`, which must be there, are marked slow."""
    values = list(values)
    assert all(value in values for value in fast), fast
    each = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [() if value in fast else pytest.mark.slow for value in values]
    return [pytest.param(*value, marks=mark) for value, mark in zip(each, marks, strict=True)]
