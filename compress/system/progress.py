"""The type of a progress callback."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str, float], None]
"""Called with the number of the block in work, the number of blocks, what is being done, and the share of it that is done."""
