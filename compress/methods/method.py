"""What a method is: frozen options, the schema of `options:` in a recipe; what it needs to know; and a call on tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from compress.calibration.statistics import Statistics, Stats
from compress.weights.table import ScaleType, code_bits, table_bits
from compress.weights.uniform import uniform_bits
from compress.weights.weight import CompressedWeight

# Options that several methods have. Defaults are those of each method's own class.
Bits = Annotated[int, Field(ge=1, le=8, description="bits per code")]
AUTO: Final = "auto"
# Those that runtimes have kernels for; `auto` takes the first that divides the columns, and others are suggested after them.
AUTO_SIZES = (128, 64, 32)


def read_group_size(value: Any) -> Any:
    """Check the value of a group size: auto, or a number of columns, -1 for the whole row. Raises ValueError."""
    number = int(value) if isinstance(value, str) and value.removeprefix("-").isdecimal() else value
    if number != AUTO and (not isinstance(number, int) or isinstance(number, bool) or number < -1):
        raise ValueError("expected a number of columns, -1 for the whole row, or auto")
    return number


GroupSize = Annotated[
    int | Literal["auto"],
    BeforeValidator(read_group_size),
    Field(description="input columns that share a scale; -1: the whole row; auto: 128 where that divides them, else 64 or 32"),
]
Symmetric = Annotated[bool, Field(description="no zero points: the scale may be negative")]
Compensate = Annotated[bool, Field(description="feed errors back as GPTQ does; false: to nearest, without data")]
Damp = Annotated[float, Field(ge=0, le=100, description="added to the diagonal of the Hessian, over its mean")]
Refinements = Annotated[int, Field(ge=0, le=100, description="passes over scales and codes after the first")]
StepBatches = Annotated[int, Field(ge=1, description="calibration batches (of batch_tokens tokens) that a step looks at")]


@dataclass(frozen=True)
class Described:
    """How a weight will be stored and in how many bits, as far as that is known before it is compressed."""

    spec: dict[str, Any] | None  # as a checkpoint describes it; None: nothing is known
    least: int  # bits; the same as `most` where they do not depend on the values
    likely: int
    most: int
    whole: bool = True  # whether the spec says all that a checkpoint will, or what is known of it

    @classmethod
    def exactly(cls, spec: dict[str, Any], bits: int) -> Described:
        """What is known of a weight whose size does not depend on its values."""
        return cls(spec, bits, bits, bits)

    @property
    def exact(self) -> bool:
        """Whether the bits are known."""
        return self.least == self.most


class Method(BaseModel):
    """Options of a method, validated where the recipe names it; unknown options are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Statistics of its inputs that it needs with some options or with all; `needs` says which with these.
    may_need: ClassVar[tuple[type[Statistics], ...]] = ()
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

    @property
    def needs(self) -> tuple[type[Statistics], ...]:
        """The statistics that it needs with these options."""
        return self.may_need

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what is wrong with a weight of this shape (out, in), or None; called before any weight is read."""
        return None

    def check_before(self, shape: tuple[int, int], rounding: Method) -> str | None:
        """Say why it cannot go before, or after, the method that compresses a weight of this shape (out, in), or None."""
        return self.check(shape)

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in), held in a type such as BF16 (None: not known), will be stored.

        Where a method does not say, a weight takes about its code and half a bit of scales, outliers and the like, or 16 bits.
        """
        options, count = self.model_dump(), shape[0] * shape[1]
        bits = options.get("target_bits") or options.get("bits", 15.5) + 0.5
        return Described(None, 0, int(count * bits), 32 * count)

    def added_bits(self, shape: tuple[int, int]) -> int:
        """Bits that tuning adds to a weight of this shape (out, in)."""
        return 0


class Grouped(Method):
    """Options of methods that store codes on a grid per row and group of neighbouring columns."""

    bits: Bits = 4
    group_size: GroupSize = AUTO

    def size(self, columns: int) -> int:
        """Columns of a group, of so many in all."""
        return group_columns(self.group_size, columns)

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether the group size does not divide the columns of a weight (out, in)."""
        return indivisible(shape[1], self.group_size)


class GroupedGrid(Grouped):
    """Options of methods whose grid has a zero point per group, or none."""

    symmetric: Symmetric = True

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        return uniform_described(shape, self.bits, self.size(shape[1]), zero=not self.symmetric)


def group_columns(group_size: GroupSize, columns: int) -> int:
    """Return the columns of a group, of so many in all: a group size of -1 is the whole row; for auto see `AUTO_SIZES`."""
    if group_size == AUTO:
        return next((size for size in AUTO_SIZES if columns % size == 0), AUTO_SIZES[0])
    return columns if group_size == -1 else group_size


def indivisible(columns: int, group_size: GroupSize, option: str = "group_size") -> str | None:
    """Say what is wrong with a group size that does not divide the columns, and name sizes that do: those of runtimes first.

    `option` is its name, where that is another: it has no `auto` then.
    """
    size = group_columns(group_size, columns)
    if size > 0 and columns % size == 0:
        return None
    near = sorted((n for n in range(1, columns + 1) if columns % n == 0), key=lambda n: abs(n - size))[:3]
    common: list[int | str] = [n for n in AUTO_SIZES if columns % n == 0]
    if common and option == "group_size":
        common.append(AUTO)
    use = ", ".join(map(str, common or sorted(near)))
    tried = ", ".join(map(str, AUTO_SIZES))
    wrong = f"any of {tried}, which group_size=auto tries" if group_size == AUTO else f"{option}={size}"
    return f"in={columns} is not a multiple of {wrong}; use {use}, or -1 for the whole row"


INDEX_NAMES = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}  # of types that the group of a column is stored in


def uniform_described(
    shape: tuple[int, int],
    bits: int,
    size: int,
    *,
    zero: bool = False,
    offset: bool = False,
    words: tuple[str, ...] = (),
    index: torch.dtype | None = None,
) -> Described:
    """Describe a weight (out, in) on an affine grid per group of `size` columns; `index`: with the group of each column.

    `words` are those of the description that are true of it in addition to these.
    """
    base: dict[str, Any] = {"format": "bitpack", "bits": bits, "group_size": size, "zero": zero}
    base |= dict.fromkeys((*(("offset",) if offset else ()), *words), True)
    base |= {} if index is None else {"group": INDEX_NAMES[index]}
    stored = uniform_bits(shape, bits, size, zero, 0 if index is None else 8 * index.itemsize, offset)
    return Described.exactly({"shape": list(shape), "base": base}, stored)


def table_described(shape: tuple[int, int], datatype: str, size: int, scale: ScaleType) -> Described:
    """Describe a weight (out, in) whose codes name entries of a table, with a scale per group of `size` columns."""
    base = {"format": "table", "datatype": datatype, "bits": code_bits(datatype), "group_size": size, "scale": scale}
    return Described.exactly({"shape": list(shape), "base": base}, table_bits(shape, datatype, size, scale))


@dataclass(frozen=True)
class Result:
    """A compressed weight and what the report should know of how it came about."""

    weight: CompressedWeight
    notes: dict[str, Any] = field(default_factory=dict)  # e.g. damp, dead_columns; "fallback" when a numerical one was taken


class SiteMethod(Protocol):
    """A method that sees one weight at a time."""

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Compress weight (out, in) in float32, given the statistics of its input; deterministic."""
        ...
