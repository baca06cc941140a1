"""Moving scales between tensors: a producer's output is divided by them, and the columns of its readers are multiplied.

A place is a `Scalable`: producer, readers, and the channel of the producer that each column of the readers comes from. Scales
are given per channel, (channels,), all positive. A norm's weight is rounded to its stored dtype, and its readers get the scale
by which the norm was actually divided.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.methods.block import Block, Scalable, TransformResult

# Largest relative error of a scale from rounding its norm; a channel with a larger one keeps its norm.
_MISS = 0.1


class Moved:
    """The weights and other tensors of a block while scales move between them."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.weights: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}  # what the columns (in,) of a site were multiplied by
        self._before: dict[str, Tensor] = block.others()

    def weight(self, site: str) -> Tensor:
        """Return the weight of a site (out, in) as it is now."""
        return self.weights[site] if site in self.weights else self.block.weight(site)

    def _other(self, name: str) -> Tensor:
        return self.others[name] if name in self.others else self._before[name]

    def _keep(self, name: str, value: Tensor) -> None:
        self.others[name] = self.block.stored(name, value)

    def number(self, place: Scalable) -> int:
        """Number of channels of a producer."""
        return self._before[place.producer].numel() if place.norm else self.block.sites[place.producer][0]

    def effective(self, place: Scalable, scales: Tensor) -> Tensor:
        """Return the scales (channels,) applied for the wanted ones: 1 without a reader, and what a stored norm allows."""
        return self._norm(place, scales)[1] if place.norm else torch.where(self.read(place).to(scales.device), scales, 1.0)

    def read(self, place: Scalable) -> Tensor:
        """Which channels of a producer its readers read, (channels,): of a joint matrix the values, but not the queries."""
        found = torch.ones(self.number(place), dtype=torch.bool)
        if place.channels is not None:
            found[:] = False
            found[place.channels] = True
        return found

    def _norm(self, place: Scalable, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of a norm divided by scales (channels,), as stored, and the scales by which it was actually divided."""
        before = self._other(place.producer)
        after = self.block.stored(place.producer, (before.double() + place.offset) / scales.double() - place.offset)
        found = (before.double() + place.offset) / (after.double() + place.offset)
        sound = found.isfinite() & ((found / scales - 1).abs() < _MISS)
        return torch.where(sound, after, before), torch.where(sound, found, 1.0).to(scales.dtype)

    def move(self, place: Scalable, scales: Tensor) -> None:
        """Divide the producer's channels by scales (channels,), as far as they apply, and multiply its readers' columns."""
        if place.norm:
            self.others[place.producer], scales = self._norm(place, scales)
        else:
            scales = self.effective(place, scales)
            self.weights[place.producer] = self.weight(place.producer) / scales.unsqueeze(1)
        if place.bias is not None:
            self._keep(place.bias, self._other(place.bias) / scales)
        spread = expand(place, scales)
        for site in place.sites:
            self.weights[site] = self.weight(site) * spread
            self.columns[site] = spread
        for name in place.copied:
            self._keep(name, self._other(name) * spread)

    def changed(self, notes: Mapping[str, object], scaled_only: bool = True) -> TransformResult:
        """The transformed block; `scaled_only`: whether scales are all that changed."""
        return TransformResult(self.weights, self.others, dict(notes), self.columns if scaled_only else None)


def expand(place: Scalable, channels: Tensor) -> Tensor:
    """Values per channel of a producer (channels,) -> values per column of its readers (in,)."""
    return channels if place.channels is None else channels[place.channels.to(channels.device)]


def gather(place: Scalable, columns: Tensor, number: int) -> Tensor:
    """Nonnegative values per column of the readers (in,) -> the largest of each of `number` channels, 0 without a reader."""
    if place.channels is None:
        return columns
    channels = columns.new_zeros(number)
    return channels.scatter_reduce_(0, place.channels.to(columns.device), columns, "amax")
