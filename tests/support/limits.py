"""Limits on the time and memory that a test may take."""

from __future__ import annotations

import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

PROCESSOR = signal.ITIMER_PROF


@contextmanager
def quickly(seconds: float = 5.0, nbytes: int | None = None, timer: int = signal.ITIMER_REAL) -> Iterator[None]:
    """Fail where the block takes long, or allocates more than `nbytes` at a time.

    Time is that of the clock, since what waits for ever takes no time of the processor; `PROCESSOR` measures the latter.
    """

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    number = signal.SIGPROF if timer == PROCESSOR else signal.SIGALRM
    before = signal.signal(number, late)
    signal.setitimer(timer, seconds)
    if nbytes is not None:
        tracemalloc.start()
    try:
        yield
        assert nbytes is None or tracemalloc.get_traced_memory()[1] <= nbytes
    finally:
        tracemalloc.stop()
        signal.setitimer(timer, 0)
        signal.signal(number, before)
