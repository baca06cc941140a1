"""Which compressed weights hurt most: halves of them are made dense again, and the half that helps more is halved on.

The divergence is KL(original || model) over a few windows, one block at a time. Blocks are halved first, then the weights of the
block that is left. Each halving takes two evaluations, so 2 log2(blocks) + 2 log2(weights of a block) + 1 in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture.config import context_length, vocabulary
from compress.architecture.family import Site
from compress.architecture.inventory import take_inventory
from compress.blockwise.forward import open_streamed, through_all_blocks
from compress.calibration.data import load_ids
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CheckpointError
from compress.evaluation.quality import TOKENS
from compress.interop.foreign import open_any
from compress.model.detect import find_family
from compress.recipe.data import Data
from compress.system.device import DTYPES, pick_device
from compress.system.progress import Progress
from compress.verify.verify import recorded_ids
from compress.weights.site_input import SiteInput


@dataclass(frozen=True)
class HalfDense(PackedSource):
    """A compressed checkpoint of which some sites have the weights of the original."""

    original: Source | None = None
    dense: dict[str, Site] = field(default_factory=dict)  # the original's sites

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor; one of a dense site is the original's, (out, in)."""
        site = self.dense.get(name.removesuffix(".weight"))
        if site is None or self.original is None:
            return super().tensor(name, index)
        weight = self.original.tensor(site.tensor, site.slice)
        return weight.T.contiguous() if site.transposed else weight

    def rounded_input(self, name: str) -> SiteInput | None:
        """What rounds the input of a site; nothing does at a dense one."""
        return None if name.removesuffix(".weight") in self.dense else super().rounded_input(name)


@dataclass(frozen=True)
class Trial:
    """One evaluation: which blocks or weights were dense, and the divergence that was left."""

    what: str
    sites: int
    kl: float


@dataclass(frozen=True)
class WorstWeight:
    """What hurts most."""

    kl: float  # of the checkpoint as it is
    block: str
    block_kl: float  # with that block dense
    site: str
    site_kl: float  # with that weight alone dense
    trials: list[Trial]

    def plain(self) -> dict[str, Any]:
        """The search as JSON values."""
        return {**self.__dict__, "trials": [trial.__dict__ for trial in self.trials]}


def _logs(source: Source, ids: Tensor, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Log probabilities (length - 1, vocabulary) of each window, on the CPU."""
    model = open_streamed(source, dtype, device)
    stream = through_all_blocks(model, ids, TOKENS)
    with model.embeddings_and_head():
        return [logs.cpu() for logs in stream.logs(model)]


def divergence(original: Sequence[Tensor], model: Sequence[Tensor]) -> float:
    """Mean KL(original || model) over windows, nats per token."""
    each = [float((p.exp() * (p - q)).sum(-1).double().mean()) for p, q in zip(original, model, strict=True)]
    return sum(each) / len(each)


def halve(
    items: list[list[str]], measure: Callable[[list[str], str], float], name: Callable[[list[list[str]]], str]
) -> list[str]:
    """Return the item (a list of sites) whose halves, made dense, lowered the divergence more at each turn."""
    while len(items) > 1:
        middle = len(items) // 2
        halves = items[:middle], items[middle:]
        left = [measure([site for item in half for site in item], name(half)) for half in halves]
        items = halves[0] if left[0] <= left[1] else halves[1]
    return items[0]


def bisect(folder: Path, original: str, data: Data | None, device: str, dtype: str, progress: Progress) -> WorstWeight:
    """Find the block and the weight of a compressed checkpoint that hurt most. Raises CheckpointError, CalibrationError."""
    packed = PackedSource.open_packed(folder)
    source = open_any(original)
    if vocabulary(source) != vocabulary(packed):
        raise CheckpointError(f"{original}: has another vocabulary than {folder}; give the model it was made from")
    sites = {site.name: site for site in take_inventory(source, find_family(source)).sites}
    if unknown := [name for name in packed.table if name not in sites or list(sites[name].shape) != packed.table[name]["shape"]]:
        raise CheckpointError(f"{original}: has no weight {unknown[0]} of this shape; give the model that {folder} was made from")
    if data is None:
        ids = recorded_ids(folder)
    else:
        ids = load_ids(data, packed.folder, vocabulary(packed), context_length(packed), fewer=True)
    where, kind = pick_device(device), DTYPES[dtype]
    progress(1, 1, "the original", 0.0)
    expected = _logs(source, ids, kind, where)
    trials: list[Trial] = []

    def measure(names: list[str], what: str) -> float:
        progress(1, 1, f"evaluation {len(trials) + 1}: {what}", 0.0)
        dense = {name: sites[name] for name in names}
        fields = {key: getattr(packed, key) for key in PackedSource.__dataclass_fields__}
        found = divergence(expected, _logs(HalfDense(**fields, original=source, dense=dense), ids, kind, where))
        trials.append(Trial(what, len(names), found))
        return found

    blocks: dict[str, list[str]] = {}
    for name in packed.table:
        block = sites[name].block
        blocks.setdefault("head" if block is None else f"block {block}", []).append(name)
    if not blocks:
        raise CheckpointError(f"{folder}: holds no compressed weight; there is nothing to look for")
    labels = {members[0]: label for label, members in blocks.items()}
    start = measure([], "as it is")

    def of_blocks(some: list[list[str]]) -> str:
        first, last = labels[some[0][0]], labels[some[-1][0]]
        return f"{first} dense" if first == last else f"{first} to {last} dense"

    worst = halve(list(blocks.values()), measure, of_blocks)
    block_kl = next((t.kl for t in reversed(trials) if t.what == f"{labels[worst[0]]} dense"), None)
    block_kl = measure(worst, f"{labels[worst[0]]} dense") if block_kl is None else block_kl

    def of_sites(some: list[list[str]]) -> str:
        return f"{some[0][0]} dense" if len(some) == 1 else f"{some[0][0]} to {some[-1][0]} dense"

    site = halve([[name] for name in worst], measure, of_sites)[0]
    site_kl = next((t.kl for t in reversed(trials) if t.what == f"{site} dense"), block_kl)
    return WorstWeight(start, labels[worst[0]], block_kl, site, site_kl, trials)
