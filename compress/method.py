"""What a method is: frozen options, the schema of `options:` in a recipe; what it needs to know; and a call on tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibration.statistics import Statistics, Stats
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
    # Rows do not influence each other given the statistics: sites that share a tap are compressed in one call.
    rows_independent: ClassVar[bool] = True

    @property
    def path(self) -> str:
        """The method as a recipe writes it: kind/name."""
        return "/".join(type(self).__module__.split(".")[-2:])

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what is wrong with a weight of this shape (out, in), or None; called before any weight is read."""
        return None

    def stored_bits(self, shape: tuple[int, int]) -> int | None:
        """Bits that a weight of this shape (out, in) will occupy; None where it depends on the values."""
        return None


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
