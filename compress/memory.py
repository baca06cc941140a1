"""The memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys


def peak() -> int:
    """Peak resident bytes of this process so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """Return freed memory to the system where the C library keeps it for itself.

    glibc keeps freed blocks of up to 32 MB for reuse, and weights and statistics of many sizes leave holes that add up.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
