"""What a method is: frozen options, the schema of `options:` in a recipe; what it needs to know; and a call on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibration.statistics import Statistics, Stats
from compress.weights.weight import CompressedWeight

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
