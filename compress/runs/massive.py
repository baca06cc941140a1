"""Massive activations: a few values of the hidden states that are orders of magnitude larger than all others.

They stand in few channels, mostly at the first token of a window, and arise in an early block (Sun et al. 2024, "Massive
Activations in Large Language Models", whose two bounds are used here). Sums over calibration tokens may be theirs alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from compress.blockwise.stream import Stream
from compress.output.job import Record
from compress.system import distributed

LEAST, TIMES = 100.0, 1000.0  # magnitude, and multiple of the median magnitude, from which a value is massive
SAMPLE = 1 << 20  # values that the median is taken of


def largest(stream: Stream, block: int) -> dict[str, Any] | None:
    """Return the largest value of the hidden states that enter a block, over all ranks; None where the stream is elsewhere.

    `token` is its id, `position` that in the window, `median` the median magnitude of the first batch.
    """
    found = None
    for number, cut in enumerate(stream.cuts if stream.position == block else ()):
        states = stream.states.read(number)
        flat = states.flatten()
        at = max((int(flat.argmax()), int(flat.argmin())), key=lambda index: abs(float(flat[index])))
        value = float(flat[at])
        if found is None:
            step = max(1, flat.numel() // SAMPLE)
            found = {"value": 0.0, "median": float(flat[::step].float().abs().median())}
        if abs(value) > abs(found["value"]):
            window, position, channel = (int(i) for i in torch.unravel_index(torch.tensor(at), states.shape))
            token = int(stream.ids[cut][window, position])
            found |= {"value": value, "channel": channel, "position": position, "token": token}
    everywhere = [one for one in distributed.gather(found) if one is not None]
    return max(everywhere, key=lambda one: abs(one["value"]), default=None)


def massive(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The blocks whose inputs hold massive activations, each with the largest."""
    return [
        {"block": record.block, **record.largest}
        for record in records
        if record.largest is not None and abs(record.largest["value"]) >= max(LEAST, TIMES * record.largest["median"])
    ]
