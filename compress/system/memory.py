"""The memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # from malloc.h
_LARGE = 1 << 23
_SHAPES = 32  # number of shapes whose compiled products are kept


def peak() -> int:
    """Peak resident bytes of this process so far."""
    # getrusage reports the parent's peak if the process was started by a larger one.
    if (high := _status("VmHWM")) is not None:
        return high
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def current() -> int | None:
    """Resident bytes of this process now; None if the system does not report them."""
    return _status("VmRSS")


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def machine() -> str:
    """The name of the processor, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}"


def be_sparing() -> None:
    """Keep libraries from holding unused memory. To be called before the first product is computed."""
    _few_shapes()
    _return_large()


def _few_shapes() -> None:
    """Make oneDNN keep compiled code for few shapes only.

    By default it keeps 1024, and experts see different numbers of tokens in every batch: in a model of 16 blocks with 8 experts
    each, memory grew by 15 MB per block, and with this limit not at all. A model without experts has some twenty shapes.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read by oneDNN, and by torch's wrapper of it
        os.environ.setdefault(name, str(_SHAPES))


def _return_large() -> None:
    """Make the C library map every block of 8 MB or more on its own, so that freeing it returns it to the system at once.

    Otherwise glibc raises that threshold to 32 MB over time, and the holes that tensors of many sizes leave in its heap grow with
    the number of blocks of a model: peaks of `bench/memory.py` with 32 blocks were 14 to 17 % above those with 4. A threshold of
    1 MB gives 2 to 3 %, but mapping is slow: small models then took 40 % longer.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Return to the system the freed memory that the C library keeps.

    glibc keeps freed blocks of up to 32 MB for reuse, and weights and statistics of many sizes leave holes that add up.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def available() -> int | None:
    """Bytes that this process may still allocate: free memory, within the limit of its control group; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    try:
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            cache = [
                line for line in (group / "memory.stat").read_text(encoding="ascii").splitlines() if line.startswith("file ")
            ]
            found.append(int(most) - int(used) + sum(int(line.split()[1]) for line in cache))
    except OSError:  # no control groups, or not this version of them
        return min(found, default=None)
    return min(found, default=None)
