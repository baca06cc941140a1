"""What a method is: frozen options, the schema of `options:` in a recipe; what it needs to know; and a call on tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibration.statistics import Drift, Statistics, Stats
from compress.weight import CompressedWeight

Bits = Annotated[int, Field(ge=1, le=8, description="bits per code")]
GroupSize = Annotated[int, Field(ge=-1, description="input columns that share a scale; -1: the whole row")]


class Needs(tuple[type[Statistics], ...]):
    """The statistics that a method may need; with the option named in `unless` at that value, it needs none."""

    _option: str
    _value: Any

    def __new__(cls, *kinds: type[Statistics], unless: tuple[str, Any]) -> Needs:
        """Make one of statistics."""
        needs = super().__new__(cls, kinds)
        needs._option, needs._value = unless
        return needs

    def __get__(self, instance: object, owner: type) -> tuple[type[Statistics], ...]:
        """Return the statistics of a method, or of a method with these options."""
        return () if instance is not None and getattr(instance, self._option) == self._value else self


class Method(BaseModel):
    """Options of a method, validated where the recipe names it; unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[tuple[type[Statistics], ...]] = ()
    # What it is called with: the weight of one site (quant), or a `Block` with all sites of a step.
    scope: ClassVar[Literal["site", "block"]] = "site"
    # Whether it compares with what the original block gives for the original's own inputs (`Block.targets`).
    compares: ClassVar[bool] = False
    # Rows do not influence each other given the statistics: sites that share a tap are compressed in one call.
    rows_independent: ClassVar[bool] = True

    @property
    def path(self) -> str:
        """The method as a recipe writes it: kind/name."""
        return "/".join(type(self).__module__.split(".")[-2:])

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what is wrong with a weight of this shape (out, in), or None; called before any weight is read."""
        return None

    def check_before(self, shape: tuple[int, int], rounding: Method) -> str | None:
        """Say why it cannot go before, or after, the method that compresses a weight of this shape (out, in), or None."""
        return self.check(shape)

    def stored_bits(self, shape: tuple[int, int]) -> int | None:
        """Bits that a weight of this shape (out, in) will occupy; None where it depends on the values."""
        return None

    def added_bits(self, shape: tuple[int, int]) -> int:
        """Bits that tuning adds to a weight of this shape (out, in)."""
        return 0

    def likely_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a weight of this shape (out, in) will occupy or about that; where nothing is known, 16 per weight."""
        known = self.stored_bits(shape)
        if known is not None:
            return known
        options = self.model_dump()
        bits = options.get("target_bits") or options.get("bits", 15.5) + 0.5  # half a bit of scales, outliers and the like
        return int(shape[0] * shape[1] * bits)

    def bits_range(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Least and most bits that a weight of this shape (out, in) will occupy: the same where they are known beforehand."""
        known = self.stored_bits(shape)
        return (0, 32 * shape[0] * shape[1]) if known is None else (known, known)

    def on(self, dtype: str) -> Method:
        """Return the method as it most likely is on weights of a type such as BF16, and for certain on those of 16 bits."""
        return self

    def described(self, shape: tuple[int, int]) -> dict[str, Any] | None:
        """Say how a weight of this shape (out, in) will be described in a checkpoint; None where it depends on the values."""
        return None


def grid_described(
    shape: tuple[int, int], bits: int, group_size: int, *, zero: bool = False, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describe a weight (out, in) on an affine grid, as a checkpoint does."""
    size = shape[1] if group_size == -1 else group_size
    base = {"format": "bitpack", "bits": bits, "group_size": size, "zero": zero, **(more or {})}
    return {"shape": list(shape), "base": base}


def table_described(shape: tuple[int, int], datatype: str, bits: int, group_size: int, scale: str) -> dict[str, Any]:
    """Describe a weight (out, in) whose codes of `bits` name entries of a table, as a checkpoint does."""
    size = shape[1] if group_size == -1 else group_size
    base = {"format": "table", "datatype": datatype, "bits": bits, "group_size": size, "scale": scale}
    return {"shape": list(shape), "base": base}


@dataclass(frozen=True)
class Result:
    """A compressed weight and what the report should know of how it came about."""

    weight: CompressedWeight
    notes: dict[str, Any] = field(default_factory=dict)  # e.g. damp, dead_columns; "fallback" when a numerical one was taken


class SiteMethod(Protocol):
    """A method that sees one weight at a time."""

    needs: ClassVar[tuple[type[Statistics], ...]]
    rows_independent: ClassVar[bool]

    @property
    def path(self) -> str:
        """The method as a recipe writes it: kind/name."""
        ...

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Compress weight (out, in) in float32, given the statistics of its input; deterministic."""
        ...

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what is wrong with a weight of this shape (out, in), or None; called before any weight is read."""
        ...

    def stored_bits(self, shape: tuple[int, int]) -> int | None:
        """Bits that a weight of this shape (out, in) will occupy; None where it depends on the values."""
        ...


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
    def everyones(self) -> int:
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
class Changed:
    """What a transform makes of a block: weights (out, in) in float32 by site, and other tensors by disk name."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
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

    def __call__(self, block: Block) -> Changed:
        """Return the weights and tensors that change; the block's output stays what it is or comes nearer to the original's."""
        ...


class Tuning(Protocol):
    """A method of `compress/tune` or `compress/retrain`: it adjusts compressed weights to what the block should give."""

    def __call__(self, block: Block, weights: Mapping[str, CompressedWeight]) -> Tuned:
        """Return the weights and other tensors that change; sizes stay, but for a low-rank part that is added."""
        ...
