"""Statistics of a block, kept for other recipes.

What reaches a block are the outputs of the compressed blocks before it, so its statistics belong to the model, the data, the
dtype and just those blocks. The name of a file is a hash of all of these, the packed bytes of the blocks before included: a
recipe that treats them in the same way finds the statistics, and any other does not. Those of the first block are found by
every recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.observe import Tap
from compress.calibration.statistics import Stats
from compress.container import load, save
from compress.errors import CheckpointError
from compress.files import writing


@dataclass
class StatisticsCache:
    """A folder of statistics; `identity` is what they depend on beside the blocks before."""

    folder: Path
    identity: Mapping[str, Any]
    found: int = 0  # passes over a block that were not needed
    kept: int = 0  # passes that were made and kept
    before: list[str] = field(default_factory=list)  # SHA-256 of the parts of all blocks before

    def _path(self, block: int, taps: Sequence[Tap]) -> Path:
        kinds = {tap.name: [kind.__name__ for kind in tap.kinds] for tap in taps}
        values = [dict(self.identity), block, self.before, kinds, {tap.name: tap.columns for tap in taps}]
        return self.folder / f"{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}.safetensors"

    def read(self, block: int, taps: Sequence[Tap], device: torch.device) -> dict[str, Stats] | None:
        """Return the statistics of some taps of a block, None where they are not there whole."""
        path = self._path(block, taps)
        if not path.is_file():
            return None
        try:
            tensors, metadata = load(path)
            tokens = json.loads(metadata["tokens"])
            result: dict[str, Stats] = {}
            for tap in taps:
                stats: Stats = {}
                for kind in tap.kinds:
                    stats[kind] = kind(tap.columns, device)
                    for number, total in enumerate(stats[kind].tensors()):
                        total.copy_(tensors[f"{tap.name}/{kind.__name__}/{number}"])
                    stats[kind].tokens = int(tokens[f"{tap.name}/{kind.__name__}"])
                result[tap.name] = stats
        except (CheckpointError, ValueError, KeyError, TypeError, RuntimeError):
            return None  # a damaged file is made anew
        self.found += 1
        return result

    def write(self, block: int, taps: Sequence[Tap], collected: Mapping[str, Stats]) -> None:
        """Keep the statistics of some taps of a block. Raises OutputError."""
        tensors: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        for tap in taps:
            for kind, statistic in collected[tap.name].items():
                tokens[f"{tap.name}/{kind.__name__}"] = statistic.tokens
                for number, total in enumerate(statistic.tensors()):
                    tensors[f"{tap.name}/{kind.__name__}/{number}"] = total
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        save(self._path(block, taps), tensors, {"tokens": json.dumps(tokens)})
        self.kept += 1
