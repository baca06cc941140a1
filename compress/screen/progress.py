"""How far a run is: a live line on a terminal, a line per block elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveProgress
from rich.text import Text

from compress.system import memory
from compress.system.files import duration, human_bytes
from compress.system.progress import Progress

_SECONDS = 0.5  # between lines of one kind
# Where a step of a block begins and how much of the block's time it is likely to take.
_STEPS = {
    "loading": (0.0, 0.02),
    "calibrating": (0.02, 0.45),
    "compressing": (0.47, 0.28),
    "running": (0.75, 0.25),
    "replaying": (0.0, 1.0),
    "gradients": (0.0, 1.0),
}


def seconds_left(elapsed: float, done: float, blocks: float, predicted: float | None) -> float | None:
    """Seconds for `blocks` more blocks after `done` took `elapsed`; None where nothing is known yet.

    `predicted` is what a block was said to take: it counts as half a block that was measured, so that it is what is shown in the
    beginning and soon gives way to the pace of this run, on a machine that is as busy as it is.
    """
    if predicted:
        return blocks * (elapsed + 0.5 * predicted) / (done + 0.5)
    return None if done <= 0 or not elapsed else blocks * elapsed / done


class _TimeLeft(ProgressColumn):
    """Time left: as predicted in the beginning, then at the rate of what is done."""

    def render(self, task: Task) -> Text:
        left = (task.total or 0) - task.completed
        if left <= 0:  # the checks at the end
            return Text("")
        done, predicted = task.completed - task.fields["begun"], task.fields["predicted"]
        sure = predicted or done >= 0.02 * task.fields["blocks"]
        found = seconds_left(task.elapsed or 0.0, done, left, predicted) if sure else None
        if found is None:
            return Text("-:-- left")
        seconds = int(found)
        return Text(
            f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
            if seconds >= 3600
            else f"{seconds // 60}:{seconds % 60:02d} left"
        )


@contextmanager
def show_progress(quiet: bool, predicted: float | None = None) -> Iterator[Progress]:
    """Yield what a run reports to: a live line on a terminal, a line per block elsewhere, nothing when quiet.

    `predicted` is the seconds that the whole of it was said to take.
    """
    if quiet:
        yield lambda block, blocks, step, share: None
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _plain_lines(predicted)
        return
    columns = [
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        _TimeLeft(),
    ]
    with LiveProgress(*columns, TextColumn("{task.fields[memory]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, begun=0.0, blocks=1, memory="", predicted=None)
        first: list[float] = []

        def show(block: int, blocks: int, step: str, share: float) -> None:
            start, size = _STEPS.get(step, (0.0, 1.0))
            done = block + start + size * share
            first.append(done) if not first else None
            name = f"block {min(block + 1, blocks)}/{blocks}  {step}" if step in _STEPS else step
            peak = f"{human_bytes(memory.peak())} peak"
            each = predicted / blocks if predicted else None
            bar.update(task, description=name, total=float(blocks), completed=done, begun=first[0])
            bar.update(task, blocks=blocks, memory=peak, predicted=each)

        yield show


def _plain_lines(predicted: float | None) -> Progress:
    said: set[tuple[int, str]] = set()
    start = last = time.monotonic()
    current = ""
    first: list[int] = []

    def show(block: int, blocks: int, step: str, share: float) -> None:
        nonlocal last, current
        key = (block, step if step not in ("calibrating", "compressing", "running") else "block")
        now = time.monotonic()
        first.append(block) if not first else None
        if key in said or step == "loading" or (key[1] == current and now - last < _SECONDS and block + 1 < blocks):
            return
        said.add(key)
        last, current = now, key[1]
        of, each = f"{block + 1}/{blocks}", predicted / blocks if predicted else None
        what = f"block {of}" if key[1] == "block" else step if block >= blocks or blocks == 1 else f"{step} {of}"
        left = seconds_left(now - start, block - first[0], blocks - block, each) if key[1] == "block" else None
        more = "" if left is None else f", about {duration(left)} left"
        print(f"{now - start:8.1f} s  {what}  ({human_bytes(memory.peak())} peak{more})", file=sys.stderr, flush=True)

    return show
