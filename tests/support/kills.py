"""A process that dies at a durable step, acted in the process of a test: that step and all after it do not happen."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

STEPS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "truncate")


class Killed(BaseException):
    """What no clause of the package may catch and go on from."""


class Steps:
    """The durable steps that were seen, and the one to die at; 0: none."""

    def __init__(self, last: int = 0) -> None:
        self.seen, self.last = 0, last

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            if 0 < self.last <= self.seen:  # the dead do nothing more: what cleans up after an error has no effect
                raise Killed
            return real(*args, **kwargs)

        return call


@contextmanager
def dying_at(step: int) -> Iterator[Steps]:
    """Die at a durable step of the block: fsync, replace, rename, unlink, mkdir, rmdir and truncate are counted."""
    steps = Steps(step)
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, steps.counted(getattr(os, name)))
        yield steps


def count_steps(work: Callable[[], object]) -> int:
    """Do work to its end and return the number of its durable steps."""
    with dying_at(0) as steps:
        work()
    return steps.seen


def killed_at(step: int, work: Callable[[], object]) -> None:
    """Do work until it is killed at a durable step. Locks of the dead are free."""
    with dying_at(step), pytest.raises(Killed) as found:
        work()
    found.value.__traceback__ = None
    del found
    gc.collect()
