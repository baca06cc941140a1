"""The type of a progress callback."""

from __future__ import annotations

from collections.abc import Callable

Listen = Callable[[int, int, str, float], None]
