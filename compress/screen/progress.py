"""How far a run is: a live line on a terminal, a line per block elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from compress import memory
from compress.files import human_bytes

Listen = Callable[[int, int, str, float], None]
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


class _TimeLeft(ProgressColumn):
    """Time left at the rate of the blocks that are done."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["begun"]
        left = (task.total or 0) - task.completed
        if left <= 0:  # the checks at the end
            return Text("")
        if done < 0.02 * task.fields["blocks"] or not task.elapsed:
            return Text("-:-- left")
        seconds = int(task.elapsed / done * left)
        return Text(
            f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
            if seconds >= 3600
            else f"{seconds // 60}:{seconds % 60:02d} left"
        )


@contextmanager
def show_progress(quiet: bool) -> Iterator[Listen]:
    """Yield what a run reports to: a live line on a terminal, a line per block elsewhere, nothing when quiet."""
    if quiet:
        yield lambda block, blocks, step, share: None
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _plain_lines()
        return
    columns = [
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        _TimeLeft(),
    ]
    with Progress(*columns, TextColumn("{task.fields[memory]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, begun=0.0, blocks=1, memory="")
        first: list[float] = []

        def listen(block: int, blocks: int, step: str, share: float) -> None:
            start, size = _STEPS.get(step, (0.0, 1.0))
            done = block + start + size * share
            first.append(done) if not first else None
            name = f"block {min(block + 1, blocks)}/{blocks}  {step}" if step in _STEPS else step
            peak = f"{human_bytes(memory.peak())} peak"
            bar.update(task, description=name, total=float(blocks), completed=done, begun=first[0], blocks=blocks, memory=peak)

        yield listen


def _plain_lines() -> Listen:
    said: set[tuple[int, str]] = set()
    start = last = time.monotonic()
    current = ""

    def listen(block: int, blocks: int, step: str, share: float) -> None:
        nonlocal last, current
        key = (block, step if step not in ("calibrating", "compressing", "running") else "block")
        now = time.monotonic()
        if key in said or step == "loading" or (key[1] == current and now - last < _SECONDS):
            return
        said.add(key)
        last, current = now, key[1]
        of = f"{block + 1}/{blocks}"
        what = f"block {of}" if key[1] == "block" else step if block >= blocks or blocks == 1 else f"{step} {of}"
        print(f"{now - start:8.1f} s  {what}  ({human_bytes(memory.peak())} peak)", file=sys.stderr, flush=True)

    return listen
