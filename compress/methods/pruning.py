"""Options that all methods of pruning share, and what they make of a mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from compress.calibration.statistics import Hessian, MeanSquare, Statistics, Stats, statistic
from compress.methods.method import AUTO, Described, GroupSize, Method, Result, group_columns, indivisible
from compress.methods.solvers.error_feedback import full_precision
from compress.methods.solvers.mask_scores import exact, mean_square
from compress.methods.solvers.mask_selection import LARGEST_PATTERN, Target, Within, as_part, select
from compress.methods.solvers.mask_swaps import swapped
from compress.methods.solvers.masked_least_squares import updated
from compress.methods.solvers.masked_rounding import quantized
from compress.weights.bit_stream import stream_bits
from compress.weights.dense import DENSE_DTYPES, Dense, smallest_dtype
from compress.weights.kept_values import tiles
from compress.weights.mask import bitmask_bits, pattern_bits
from compress.weights.uniform import uniform_bits
from compress.weights.weight import CompressedWeight

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def _not_a_time(value: Any) -> Any:
    """YAML reads an unquoted 2:4 as two minutes and four seconds."""
    return f"{value // 60}:{value % 60}" if type(value) is int and value >= 60 else value


def _n_of_m(value: str | None) -> str | None:
    found = None if value is None else _PATTERN.fullmatch(value)
    if value is not None and (found is None or not int(found[1]) < int(found[2]) <= 64):
        raise ValueError("expected N:M with N kept of M, N below M and M at most 64, as 2:4")
    return value


NofM = Annotated[str | None, BeforeValidator(_not_a_time), AfterValidator(_n_of_m)]


def kept_of(pattern: str) -> tuple[int, int]:
    """Return how many weights a pattern keeps, of how many."""
    kept, _, of = pattern.partition(":")
    return int(kept), int(of)


class Pruning(Method):
    """Options of every method of pruning."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    rows_independent: ClassVar[bool] = False  # a matrix has a quota of its own

    sparsity: Annotated[float | None, Field(ge=0, lt=1, description="share of weights to remove; 0.5 if nothing is said")] = None
    pattern: Annotated[NofM, Field(description="N:M, as 2:4: N kept of every M neighbouring columns")] = None
    group: Annotated[int, Field(ge=1, description="neighbouring columns that go or stay together")] = 1
    within: Annotated[Within, Field(description="what competes: the weights of a row, or of the whole matrix")] = "row"
    dtype: Annotated[
        Dtype, Field(description="of kept values; auto: the type of 16 bits that held the weight, or else float32")
    ] = "auto"
    bits: Annotated[int | None, Field(ge=2, le=8, description="also quantize what is kept, in the same pass")] = None
    group_size: Annotated[GroupSize, Field(description="columns that share a scale, with bits")] = AUTO
    symmetric: Annotated[bool, Field(description="no zero points, with bits")] = True

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.pattern is None:
            return self
        if self.sparsity is not None:
            raise ValueError("sparsity: not with a pattern, which has its own; leave one of them out")
        if self.group > 1:
            raise ValueError("group: not with a pattern; leave one of them out")
        return self

    @property
    def target(self) -> Target:
        """What the mask is to be."""
        if self.pattern is None:
            return Target(0.5 if self.sparsity is None else self.sparsity, None, self.group, self.within)
        kept, of = kept_of(self.pattern)
        return Target(1 - kept / of, (kept, of))

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what does not divide the columns of a weight (out, in)."""
        target = self.target
        if target.pattern is not None and shape[1] % target.pattern[1]:
            return f"in={shape[1]} is not a multiple of {target.pattern[1]}, which the pattern {self.pattern} needs; use sparsity"
        if shape[1] % target.group and (wrong := indivisible(shape[1], target.group)):
            return wrong.replace("group_size", "group").replace(", or -1 for the whole row", "")
        return None if self.bits is None else indivisible(shape[1], self.group_size)

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in), held in a type such as BF16 (None: not known), will be stored.

        The least is where all that depends on the values takes least: as many weights in every row, kept weights in few groups.
        """
        known = self.dtype
        if known == "auto":  # of float32 values 16 bits may hold all
            known = "bfloat16" if dtype == "BF16" else "float16" if dtype == "F16" else "auto"
        width = 32 if known == "float32" else 16
        widths = (16, 32 if dtype == "F32" else 16, 32) if known == "auto" else (width, width, width)
        target, columns, size = self.target, shape[1], group_columns(self.group_size, shape[1])
        kept = self._kept(shape)
        spec = self._spec(shape, known)
        # Whether whole groups go, and with them their scales; and whether some may.
        scales_go = target.pattern is None and target.group % size == 0
        scales_may_go = not scales_go and (target.pattern is None or size % target.pattern[1] != 0) and kept <= columns - size
        likely = self._bits(shape, widths[1], self._ragged, 16, kept if scales_go else columns)
        if not self._ragged and not (known == "auto" if self.bits is None else scales_may_go):
            return Described(spec, likely, likely, likely, whole=self.bits is None or not scales_go)
        least = self._bits(shape, widths[0], False, 0, 0 if self._ragged else -(-kept // size) * size)
        most = self._bits(shape, widths[2], self._ragged, 31, columns)
        return Described(spec, least, likely, most, whole=known != "auto" if self.bits is None else not self._ragged)

    @property
    def _ragged(self) -> bool:
        """Whether rows may keep different numbers of weights."""
        return self.target.pattern is None and self.target.within == "matrix"

    def _bits(self, shape: tuple[int, int], dense: int, pointers: bool, filled: int, scaled: int) -> int:
        """Bits of the mask, and of kept values of `dense` bits, or of codes and the scales of `scaled` columns.

        Where rows differ there are `pointers`, and `filled` codes that are none at the end of each tile of rows.
        """
        (rows, columns), target = shape, self.target
        patterned = target.pattern is not None and target.pattern[1] <= LARGEST_PATTERN
        mask = pattern_bits(shape, *target.pattern) if patterned and target.pattern else bitmask_bits(shape, target.group)
        mask += 32 * (tiles(rows) + 1) if pointers else 0
        kept = self._all_kept(shape)
        if self.bits is None:
            return mask + kept * dense
        size = group_columns(self.group_size, columns)
        beside = uniform_bits((rows, scaled), self.bits, size, not self.symmetric) if scaled else 0
        beside -= stream_bits(rows * scaled, self.bits)
        return mask + (tiles(rows) * filled * self.bits if self._ragged else 0) + stream_bits(kept, self.bits) + beside

    def _spec(self, shape: tuple[int, int], dtype: Dtype) -> dict[str, Any]:
        """How a checkpoint will describe it, as far as is known, with kept values in a type."""
        # How many weights a row keeps may follow from the weights; that there is a mask does not.
        target = self.target
        base: dict[str, Any] = {"format": "dense"} | ({} if dtype == "auto" else {"dtype": _NAMES[dtype]})
        if self.bits is not None:
            size = group_columns(self.group_size, shape[1])
            base = {"format": "bitpack", "bits": self.bits, "group_size": size, "zero": not self.symmetric}
        if not self._ragged:
            base["kept"] = self._kept(shape)
        elif self.bits is None:  # codes have room between rows, which depends on what these keep
            base["fields"] = self._all_kept(shape)
        keep: dict[str, Any] = {"format": "bitmask", "size": target.group}
        if target.pattern is not None and target.pattern[1] <= LARGEST_PATTERN:
            keep = {"format": "pattern", "kept": target.pattern[0], "of": target.pattern[1]}
        return {"shape": list(shape), "base": base, "keep": keep}

    def _kept(self, shape: tuple[int, int]) -> int:
        """Weights that a row of a weight (out, in) keeps, in the mean."""
        target = self.target
        if target.pattern is not None:
            return shape[1] * target.pattern[0] // target.pattern[1]
        return shape[1] - target.pruned(shape[1] // target.group) * target.group

    def _all_kept(self, shape: tuple[int, int]) -> int:
        """Weights that a weight (out, in) keeps."""
        if not self._ragged:
            return shape[0] * self._kept(shape)
        return shape[0] * shape[1] - self.target.pruned(shape[0] * shape[1] // self.target.group) * self.target.group

    def result(
        self, weight: Tensor, keep: Tensor, values: Tensor | None, stats: Stats, notes: dict[str, Any] | None = None
    ) -> Result:
        """Store a mask (out, in) and values (out, in), those of the weight if None; rounded where there are bits."""
        target, notes = self.target, dict(notes or {})
        part = as_part(keep, target)
        if self.bits is None:
            dtype = smallest_dtype(weight) if self.dtype == "auto" else DENSE_DTYPES[_NAMES[self.dtype]]
            base = Dense((weight if values is None else values).masked_fill(~keep, 0.0).to(dtype))
            return Result(CompressedWeight.pruned(base, part), notes)
        matrix = statistic(stats, Hessian).matrix() if Hessian in stats else None
        codes, more = quantized(weight, keep, values, matrix, self.bits, self.group_size, self.symmetric)
        fallbacks = dict.fromkeys(n["fallback"] for n in (notes, more) if "fallback" in n)
        joined = {"fallback": "; ".join(fallbacks)} if fallbacks else {}
        return Result(CompressedWeight.pruned(codes, part), notes | more | joined)


class Scored(Pruning):
    """Options of methods that keep what scores high by the sizes of weights and inputs."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (MeanSquare, Hessian)

    swaps: Annotated[int, Field(ge=0, le=1000, description="exchanges of a kept for a removed weight, per row; 20 is plenty")] = 0
    update: Annotated[bool, Field(description="then move what is kept to the least error of the outputs")] = False

    @property
    def needs(self) -> tuple[type[Statistics], ...]:
        """The Hessian where values are moved or rounded or pairs of weights are looked at, else its diagonal."""
        return (Hessian,) if self.update or self.swaps or self.bits is not None else (MeanSquare,)

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say what does not divide the columns of a weight (out, in), or does not go together."""
        if self.swaps and self.group > 1:
            return f"swaps exchange single weights; with group={self.group} leave them out"
        return super().check(shape)

    def by_score(self, weight: Tensor, score: Callable[[Tensor, Tensor], Tensor], stats: Stats) -> Result:
        """Prune weight (out, in) by a score of it and of the mean square of its inputs (in,)."""
        weight, square, target = exact(weight), mean_square(stats), self.target
        keep, values = select(score(weight, square), target), None
        notes: dict[str, Any] = {} if bool(square.any()) else {"fallback": "magnitude: no token was seen"}
        if self.swaps and not notes:
            matrix = statistic(stats, Hessian).matrix().to(weight.dtype)
            with full_precision():
                of = None if target.pattern is None else target.pattern[1]
                keep = swapped(weight, keep, matrix, self.swaps, of)
        if self.update and not notes:
            values, notes = updated(weight, keep, stats)
        return self.result(weight, keep, values, stats, notes)
