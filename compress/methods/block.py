"""What a method sees of a block, and the contracts of methods that see whole blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.calibration.statistics import Drift, Statistics, Stats
from compress.methods.method import Method, Result
from compress.weights.weight import CompressedWeight


@dataclass(frozen=True, eq=False)
class Scalable:
    """A norm or linear of a block, and all that reads its output.

    The block's function stays if the producer's channels are divided by scales (channels,), its bias with them, and column j of
    every reader is multiplied by the scale of channel `channels[j]`.
    """

    producer: str  # a site, or the disk name of a norm's weight
    sites: tuple[str, ...]  # readers that are compressed, all on this step's list
    norm: bool = True  # whether the producer is a norm
    offset: float = 0.0  # a norm multiplies by this plus its weight
    bias: str | None = None  # disk name of the producer's bias
    copied: tuple[str, ...] = ()  # disk names of readers (out, in) that are copied, such as a router
    channels: Tensor | None = None  # (in,) int64; None: one by one
    obstacle: str | None = None  # why no scales can move here; nothing else but the names is known then


@dataclass(frozen=True, eq=False)
class Permutable:
    """A linear of a block whose inputs can change places together with the rows that they come from.

    There are sets of channels, each with an order of its own. Channel i of set s is in the columns `columns[s, :, i]` of the
    reader, several where heads share values, in the rows `rows[p][s, :, i]` of each producer p, and in those places of its bias.
    """

    reader: str  # a site
    columns: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.int64))  # (sets, copies, size)
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # producing sites: (sets, parts, size)
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # disk names: (sets, parts, size), places in the flattened tensor
    obstacle: str | None = None  # why they stay in their order; nothing else but the reader is known then


class Block(Protocol):
    """One decoder block as a method sees it: weights by site, the calibration that enters it, and what it should give.

    Methods call it on every rank at the same time; what they compute from `total` and `generator` is the same on all of them.
    """

    @property
    def sites(self) -> Mapping[str, tuple[int, int]]:
        """The sites that the method is to work on, with the shapes (out, in) of their weights."""
        ...

    @property
    def scalables(self) -> Sequence[Scalable]:
        """Where scales can move between tensors of the block, and where they could but for an obstacle."""
        ...

    @property
    def permutables(self) -> Sequence[Permutable]:
        """Where channels can change places between tensors of the block, and where they could but for an obstacle."""
        ...

    def rounding(self, site: str) -> Method:
        """Return the method that will compress a site, or has."""
        ...

    @property
    def batches(self) -> int:
        """Number of this rank's calibration batches."""
        ...

    @property
    def first(self) -> int:
        """Place of this rank's first batch among the batches of all ranks: what is drawn does not depend on their number."""
        ...

    @property
    def total_batches(self) -> int:
        """Number of calibration batches of all ranks."""
        ...

    def weight(self, site: str) -> Tensor:
        """Return the weight of a site (out, in) in float32, as transforms have left it and before it is compressed."""
        ...

    def others(self) -> dict[str, Tensor]:
        """Return the block's other floating-point tensors (norms, biases) by disk name, in float32."""
        ...

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Return a value of one of the other tensors as it comes back from where it is stored, in float32."""
        ...

    def observe(self, kinds: Sequence[type[Statistics]]) -> dict[str, Stats]:
        """Return statistics of the inputs of every site, over the calibration of all ranks."""
        ...

    def observe_in_turn(self, kinds: Sequence[type[Statistics]]) -> Iterator[tuple[tuple[str, ...], Stats]]:
        """Yield the same tensor by tensor, with the sites that read it; no more of them are in memory than a run may hold."""
        ...

    def drift_in_turn(self) -> Iterator[tuple[tuple[str, ...], Drift]]:
        """Yield, tensor by tensor, how it differs from the original model's, with the sites that read it, as the block is now."""
        ...

    def inputs(self, batch: int) -> Tensor:
        """Return one batch of hidden states (samples, length, width) that enter the block behind compressed ones."""
        ...

    def targets(self, batch: int) -> Tensor:
        """Return what the original model's block gives for this batch of the original model (samples, length, width)."""
        ...

    def run(self, hidden: Tensor, weights: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the block's output for a batch with these weights (out, in) and other tensors; gradients pass through."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def generator(self) -> torch.Generator:
        """Return a new source of random numbers that belongs to this block: the same on all ranks and in every run."""
        ...

    def say(self, share: float) -> None:
        """Tell how much of the work is done, from 0 to 1."""
        ...


@dataclass(frozen=True)
class TransformResult:
    """What a transform makes of a block: weights (out, in) in float32 by site, and other tensors by disk name."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    # What the inputs of sites (in,) were divided by, where nothing else about the inputs of the block's sites has changed: their
    # Hessians are then known. None: they are observed again.
    divided: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class TuningResult:
    """What tuning makes of the compressed weights of a block, and of its other tensors by disk name."""

    weights: dict[str, CompressedWeight] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class BlockMethod(Protocol):
    """A method of `compress/quant` whose scope is a block: it compresses all sites of a step in a block together."""

    def __call__(self, block: Block) -> dict[str, Result]:
        """Return the compressed weight of every site of `block.sites`; deterministic."""
        ...


class Transform(Protocol):
    """A method of `compress/transform`: it rewrites a block before its weights are rounded."""

    def __call__(self, block: Block) -> TransformResult:
        """Return the weights and tensors that change; the block's output stays what it is or comes nearer to the original's."""
        ...


class Tuning(Protocol):
    """A method of `compress/tune` or `compress/retrain`: it adjusts compressed weights to what the block should give."""

    def __call__(self, block: Block, weights: Mapping[str, CompressedWeight]) -> TuningResult:
        """Return the weights and other tensors that change; sizes stay, but for a low-rank part that is added."""
        ...
