"""Statistics of a block, kept for other recipes: one file for a statistic of a tap.

What reaches a block are the outputs of the compressed blocks before it, so its statistics belong to the model, the data, the
dtype and just those blocks. The name of a file is a hash of all of these, the packed bytes of the blocks before included: a
recipe that treats them in the same way finds the statistics, and any other does not. Those of the first block are found by
every recipe, and so are all of them where a recipe asks for those of the original's own inputs, which no recipe changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.calibration.observe import Tap
from compress.calibration.statistics import Statistics, Stats
from compress.checkpoint.tensor_file import load, save
from compress.errors import CheckpointError
from compress.system.files import writing


@dataclass
class StatisticsCache:
    """A folder of statistics; `identity` is what they depend on in addition to the blocks before."""

    folder: Path
    identity: Mapping[str, Any]
    found: int = 0  # passes over a block that were not needed
    kept: int = 0  # passes that were made and kept

    def at(self, block: int, before: Sequence[str], device: torch.device) -> BlockCache:
        """Return the statistics of one block, given the SHA-256 of the files of all blocks before."""
        return BlockCache(self, block, tuple(before), device)


@dataclass(frozen=True)
class BlockCache:
    """Where the statistics of the taps of one block are read from and kept."""

    cache: StatisticsCache
    block: int
    before: tuple[str, ...]
    device: torch.device

    def _path(self, tap: Tap, kind: type[Statistics]) -> Path:
        names = [tap.name, tap.columns, list(tap.pooled), kind.__name__]
        values = [dict(self.cache.identity), self.block, list(self.before), *names]
        return self.cache.folder / f"{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}.safetensors"

    def holds(self, taps: Sequence[Tap]) -> bool:
        """Whether there are files of all statistics of some taps."""
        return all(self._path(tap, kind).is_file() for tap in taps for kind in tap.kinds)

    def read(self, taps: Sequence[Tap]) -> dict[str, Stats] | None:
        """Return the statistics of some taps, None where they are not there whole."""
        result: dict[str, Stats] = {}
        for tap in taps:
            for kind in tap.kinds:
                found = _read(self._path(tap, kind), kind(tap.columns, self.device))
                if found is None:
                    return None  # a pass over the block gives all of them
                result.setdefault(tap.name, {})[kind] = found
        self.cache.found += 1
        return result

    def write(self, taps: Sequence[Tap], collected: Mapping[str, Stats]) -> None:
        """Keep the statistics of some taps. Raises OutputError."""
        with writing(self.cache.folder):
            self.cache.folder.mkdir(parents=True, exist_ok=True)
        for tap in taps:
            for kind, statistic in collected[tap.name].items():
                tensors = {str(number): total for number, total in enumerate(statistic.tensors())}
                save(self._path(tap, kind), tensors, {"tokens": str(statistic.tokens)})
        self.cache.kept += 1


def _read(path: Path, empty: Statistics) -> Statistics | None:
    if not path.is_file():
        return None
    try:
        tensors, metadata = load(path)
        for number, total in enumerate(empty.tensors()):
            total.copy_(tensors[str(number)])
        empty.tokens = int(metadata["tokens"])
    except (CheckpointError, ValueError, KeyError, TypeError, RuntimeError):
        return None  # a damaged file is made again
    return empty
