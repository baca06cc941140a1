"""Error-compensating rounding: factor a Hessian once, round one column after another, improve what came out.

Rounding W (out, in) to Q costs E = tr(D H D^T), D = W - Q. With the columns in processing order, H = R R^T and R upper
triangular with pivots r_k = R[k, k], the cost is a sum of squares over columns:

    E = sum_k r_k^2 |D_k + sum_{i<k} D_i a_ik|^2,    a_ik = R[i, k] / r_k

so column k is rounded towards W_k + sum_{i<k} D_i a_ik, the weight that makes its square vanish. This is GPTQ's update written
as feedback of the errors made so far (QuIP, arXiv 2307.13304, theorem 6). GPTQ's U with U^T U = H^-1 is R^-1: feedback needs one
Cholesky factorisation, and neither an inverse nor a second factorisation.

Working layout: (in, out), so that a column of the weight is one contiguous row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.methods.solvers.operators import SPAN, round_columns
from compress.methods.solvers.uniform_grid import Grid, nearest, stored

_ATTEMPTS = 4  # the damping asked for, then ten times as much, three times
_LEAST_RETRY = 1e-4  # where the ladder starts when no damping was asked for
BLOCK = 32  # columns that are solved one by one between matrix products


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep matrix products of float32 in float32: TF32 or bfloat16 products would change codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, eq=False)
class Factor:
    """A damped Hessian over its mean diagonal, and its factor in processing order."""

    hessian: Tensor  # (in, in) damped, in natural order
    order: Tensor  # (in,) int64: the column processed at each step
    feedback: Tensor  # (in, in) lower triangular: row k holds a_ik for i < k
    pivots: Tensor  # (in,) r_k
    mean: float  # mean diagonal of the columns that are not dead, that the Hessian was divided by
    damp: float  # what was added to the diagonal
    dead: int  # columns that no token touched
    fallback: str | None  # what was done where the Hessian was of no use

    @property
    def plain(self) -> bool:
        """Whether there is nothing to compensate with, and rounding to nearest is what is left."""
        return self.fallback is not None and self.fallback.startswith("rtn")

    @property
    def notes(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"damp": self.damp, "dead_columns": self.dead} | ({} if self.fallback is None else {"fallback": self.fallback})


def factorise(hessian: Tensor, damp: float, *, descending: bool) -> Factor:
    """Factor hessian (in, in) plus `damp` times its mean diagonal, columns in natural or descending diagonal order.

    A factorisation that fails is tried again with ten times the damping, three times; after that, and where no token was
    seen, the factor is that of the identity. Raises CalibrationError on values that are not finite.
    """
    if not all(map(math.isfinite, hessian.aminmax())):  # a value that is not a number is passed on by both
        raise CalibrationError("Hessian: got values that are not finite; look for activations that overflow the model's dtype")
    size, diagonal = hessian.shape[0], hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if descending else torch.arange(size, device=hessian.device)
    unseen = diagonal <= 0
    dead = int(unseen.sum())
    if dead == size:
        return _identity(hessian, order, 1.0, damp, dead, "rtn: no token was seen")
    mean = float(diagonal.sum()) / (size - dead)
    damped = hessian / mean
    damped.diagonal()[unseen] = 1.0  # coupled to nothing: such a column is rounded plainly
    damped.diagonal().add_(damp)
    backwards = order.flip(0)  # R is found from its last column on
    for attempt in range(_ATTEMPTS):
        lower, info = torch.linalg.cholesky_ex(damped.index_select(0, backwards).index_select(1, backwards))
        if int(info) == 0:
            pivots = lower.diagonal().flip(0)
            feedback = lower.mT.flip(0, 1).div_(pivots.unsqueeze(1))
            note = f"damp raised to {damp:g}" if attempt else None
            return Factor(damped, order, feedback, pivots, mean, damp, dead, note)
        if attempt + 1 < _ATTEMPTS:
            more = max(10 * damp, _LEAST_RETRY)
            damped.diagonal().add_(more - damp)
            damp = more
    return _identity(hessian, order, mean, damp, dead, f"rtn: the Hessian is not positive definite with damp {damp:g}")


def _identity(hessian: Tensor, order: Tensor, mean: float, damp: float, dead: int, fallback: str) -> Factor:
    """The factor that compensates nothing."""
    ones = torch.ones_like(hessian.diagonal())
    return Factor(torch.diag(ones), order, torch.zeros_like(hessian), ones, mean, damp, dead, fallback)


Rounder = Callable[[Tensor, int], None]


class RoundingGrid(Protocol):
    """What a weight is rounded to, in the working layout: `step * scale`, steps of any kind and a scale per group."""

    scale: Tensor  # (groups, out)
    inverse: Tensor  # (groups, out)

    def rounder(self) -> Rounder:
        """Return what replaces a column w / scale (out,) in place by the nearest steps of its group."""
        ...

    def encode(self, steps: Tensor, groups: Tensor) -> Tensor:
        """Return the codes of steps (n, out) that belong to groups (n,), in any type; the steps may be overwritten."""
        ...

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the steps of codes (n, out); only of a single group."""
        ...

    def storable(self, scale: Tensor) -> Tensor:
        """Round a scale (out,) to the nearest that can be stored, in its own dtype."""
        ...

    def group(self, index: int) -> Self:
        """One group, sharing memory."""
        ...


@dataclass(eq=False)
class GridLayout:
    """Uniform grids in the working layout: one row of scales (and of what goes with them) per group."""

    scale: Tensor  # (groups, out)
    inverse: Tensor  # (groups, out)
    low: Tensor | float | list[Tensor | float]  # lowest `code - zero`: (groups, out), a number, or per group (out,) or a number
    high: Tensor | float | list[Tensor | float]
    zero: Tensor | float  # (groups, out), (groups, 1) or a number

    @classmethod
    def of(cls, grid: Grid, dtype: torch.dtype) -> GridLayout:
        """Lay out a grid for solving in `dtype`."""
        scale = grid.scale.T.to(dtype).contiguous()
        low, high, zero = (x.T.contiguous() if isinstance(x, Tensor) else x for x in grid.levels(dtype))
        return cls(scale, scale.reciprocal(), low, high, zero)

    @classmethod
    def empty(cls, groups: int, like: Tensor, bits: int, symmetric: bool) -> GridLayout:
        """Room for grids that are fitted later, for weights like the one given, (in, out)."""
        blank = like.new_ones(like.shape[1], groups)
        return cls.of(Grid(blank, None if symmetric else blank.clone(), bits), like.dtype)

    def group(self, index: int) -> GridLayout:
        """One group, sharing memory."""

        def part(values: Tensor | float | list[Tensor | float]) -> Any:
            if isinstance(values, list):
                return values[index : index + 1]
            return values[index : index + 1] if isinstance(values, Tensor) else values

        one = slice(index, index + 1)
        return GridLayout(self.scale[one], self.inverse[one], part(self.low), part(self.high), part(self.zero))

    def rounder(self) -> Rounder:
        """Return what replaces a column w / scale (out,) in place by the nearest `code - zero` of its group."""
        count = len(self.scale)  # views are made once: the inner loop runs five small operations per column
        low, high = _each(self.low, count), _each(self.high, count)

        def nearest_step(scaled: Tensor, group: int) -> None:
            nearest(scaled, low[group], high[group])

        return nearest_step

    def encode(self, steps: Tensor, groups: Tensor) -> Tensor:
        """Return the codes of steps (n, out) that belong to groups (n,), in place."""
        return steps.add_(self.zero.index_select(0, groups) if isinstance(self.zero, Tensor) else self.zero)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `code - zero` of codes (n, out); only of a single group."""
        return codes.to(dtype).sub_(self.zero)

    def storable(self, scale: Tensor) -> Tensor:
        """Round a scale (out,) to bfloat16."""
        return stored(scale)

    def assign(self, other: GridLayout) -> None:
        """Take over the values of another with as many groups and the same bits in each."""
        count = len(self.scale)
        for name in ("scale", "inverse", "low", "high", "zero"):
            for mine, new in zip(_each(getattr(self, name), count), _each(getattr(other, name), count), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(new if isinstance(new, Tensor) else mine.new_tensor(new))

    def grid(self, bits: int) -> Grid:
        """Return the grids (out, groups) as they are stored."""
        zero = self.zero.T.to(torch.uint8).contiguous() if isinstance(self.zero, Tensor) else None
        return Grid(self.scale.T.to(torch.bfloat16).contiguous(), zero, bits)


def _each(values: Tensor | float | list[Tensor | float], groups: int) -> Sequence[Tensor | float]:
    """What a GridLayout holds, by group."""
    if isinstance(values, list):
        return values
    return values.unbind(0) if isinstance(values, Tensor) else [values] * groups


class ColumnRounding:
    """One pass over the columns in processing order, each rounded towards its compensated weight.

    A span is solved as two halves, with one product that carries the errors of the first into the second: large products
    at the top, and column by column only inside `block` columns. The codes do not depend on `block`.
    """

    def __init__(
        self,
        target: Tensor,  # (in, out) the weight; becomes what each column was rounded towards
        delta: Tensor,  # (in, out) the weight; becomes weight - rounded
        codes: Tensor,  # (in, out) uint8, written
        feedback: Tensor,  # (in, in), of which the part below the diagonal is read
        layout: RoundingGrid,
        groups: Tensor,  # (in,) int64 group of each step
        block: int,
        # What is called before each run of so many steps is begun, longer ones first, of which each is a multiple of the next.
        reached: Mapping[int, Callable[[slice], None]] | None = None,
        keep: Tensor | None = None,  # (in, out) 1 or 0 in the type of the weight: where 0, the value is 0 and not rounded
    ) -> None:
        self.target, self.delta, self.codes, self.feedback, self.layout = target, delta, codes, feedback, layout
        self.groups, self.reached, self.keep = groups, dict(reached or {}), keep
        # On a GPU the time of single columns is that of their launches: there one operator takes as many as it can.
        self.joined = _joined(target) and isinstance(layout, GridLayout) and keep is None
        self.block = SPAN if self.joined else block
        # Everything the inner loop touches is made once: it runs five small operations per column.
        self._group = groups.tolist()
        self._targets, self._deltas = target.unbind(0), delta.unbind(0)
        self._steps = torch.empty(min(self.block, len(target)), target.shape[1], dtype=target.dtype, device=target.device)
        self._step = self._steps.unbind(0)
        self._scale, self._inverse, self._round = layout.scale.unbind(0), layout.inverse.unbind(0), layout.rounder()

    def run(self, start: int, stop: int, within: int | None = None) -> None:
        """Round the steps start..stop, whose targets hold the errors of all steps before `start`.

        `within` is the shortest run that these steps are part of and that was announced.
        """
        count = stop - start
        unit = max((length for length in self.reached if within is None or length < within), default=0)
        if unit and count <= unit:
            self.reached[unit](slice(start, stop))
            self.run(start, stop, unit)
            return
        if not unit and count <= self.block:
            self._columns(start, stop)
            return
        unit = unit or self.block  # a run is announced when all of it is up to date: never split across
        half = start + max(1, -(-count // unit) // 2) * unit
        self.run(start, half, within)
        self.target[half:stop].addmm_(self.feedback[half:stop, start:half], self.delta[start:half])
        self.run(half, stop, within)

    def current(self, steps: slice) -> Tensor:
        """Return the weights (n, out) at steps that are reached, as the errors before them want them to be.

        A target is complete only once the columns before it in the run are rounded. Without rounding these would take their own
        targets: with S the shift of the run's columns and T - W what came from before it, S + A S = T - W.
        """
        weight = self.delta[steps]  # untouched so far
        shift = torch.linalg.solve_triangular(
            self.feedback[steps, steps], self.target[steps] - weight, upper=False, unitriangular=True
        )
        wanted: Tensor = weight + shift
        return wanted

    def _columns(self, start: int, stop: int) -> None:
        """Round the steps start..stop one by one; a target gathers the errors since `start` when its turn comes."""
        if self.joined:
            self._columns_joined(slice(start, stop))
            return
        for k in range(start, stop):
            group, step = self._group[k], self._step[k - start]
            if k > start:
                self._targets[k].addmv_(self.delta[start:k].T, self.feedback[k, start:k])
            torch.mul(self._targets[k], self._inverse[group], out=step)
            self._round(step, group)
            if self.keep is not None:
                step.mul_(self.keep[k])
            self._deltas[k].addcmul_(step, self._scale[group], value=-1)
        self.codes[start:stop] = self.layout.encode(self._steps[: stop - start], self.groups[start:stop])

    def _columns_joined(self, span: slice) -> None:
        """The same by `operators.round_columns`."""
        layout, steps = self.layout, self._steps[: span.stop - span.start]
        assert isinstance(layout, GridLayout)
        low, high = (_whole(bound, layout.scale) for bound in (layout.low, layout.high))
        feedback, scales = self.feedback[span, span], (layout.scale, layout.inverse)
        round_columns(self.target[span], self.delta[span], steps, feedback, *scales, low, high, self.groups[span])
        self.codes[span] = layout.encode(steps, self.groups[span])


def swept(
    weight: Tensor, factor: Factor, layout: RoundingGrid, size: int, keep: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Round weight (in, out) on grids of groups of `size` columns; return weight - rounded and codes, in natural order.

    Where keep (in, out) is 0, the value is 0 whatever the code.
    """
    target = weight[factor.order]
    delta, codes = target.clone(), torch.empty_like(target, dtype=torch.uint8)
    kept = None if keep is None else keep[factor.order]
    ColumnRounding(target, delta, codes, factor.feedback, layout, factor.order // size, block, keep=kept).run(0, len(weight))
    natural = torch.empty_like(factor.order).scatter_(0, factor.order, torch.arange(len(weight), device=weight.device))
    return delta[natural], codes[natural]


def importance(factor: Factor) -> Tensor:
    """What an error of each column (in,) costs after all later ones have made up for it, in natural order."""
    return torch.empty_like(factor.pivots).scatter_(0, factor.order, factor.pivots.square())


def _joined(target: Tensor) -> bool:
    """Whether columns are rounded by `operators.round_columns`."""
    return target.is_cuda and target.dtype == torch.float32


def _whole(bound: Tensor | float | list[Tensor | float], like: Tensor) -> Tensor:
    """A bound of steps for every group and row (groups, out)."""
    if isinstance(bound, list):
        return torch.stack([_whole(each, like[0]) for each in bound])
    return torch.as_tensor(bound, dtype=like.dtype, device=like.device).expand_as(like).contiguous()


def refine(
    weight: Tensor,
    hessian: Tensor,
    layout: RoundingGrid,
    delta: Tensor,
    codes: Tensor,
    passes: int,
    block: int,
    keep: Tensor | None = None,
) -> None:
    """Lower tr(D H D^T) by passes of coordinate descent over contiguous groups, in place: the scale, then the codes one by one.

    weight, delta = weight - rounded, codes and keep are (in, out), hessian (in, in); where keep is 0, the value stays 0. No step
    raises the cost by more than rounding: a scale becomes the storable one nearest to the best, which is no farther from it than
    the scale it replaces.
    """
    size = len(weight) // len(layout.scale)
    for _ in range(passes):
        for index in range(len(layout.scale)):
            span, level = slice(index * size, (index + 1) * size), layout.group(index)
            inner = hessian[span, span]
            gradient = hessian[span] @ delta  # (group size, out)
            kept = None if keep is None else keep[span]
            _rescale(level, inner, gradient, delta[span], codes[span], kept)

            # A column is rounded to where its row of H D vanishes. What columns of this group contribute changes on the way:
            # those before it are fed back by the sweep.
            pivots = inner.diagonal().unsqueeze(1)
            target = gradient.addmm_(inner.tril(), delta[span], alpha=-1).div_(pivots).add_(weight[span])
            delta[span] = weight[span]
            one = torch.zeros(size, dtype=torch.int64, device=weight.device)
            ColumnRounding(target, delta[span], codes[span], inner.tril(-1).div_(pivots), level, one, block, keep=kept).run(
                0, size
            )


def _rescale(level: RoundingGrid, inner: Tensor, gradient: Tensor, delta: Tensor, codes: Tensor, keep: Tensor | None) -> None:
    """Give one group the scale s + <t, G> / <t, H t>, t the steps, which is the best one for its codes.

    inner is the group's part of H, gradient G = H D and delta D are (group size, out); the last two are kept up to date.
    """
    step = level.decode(codes, delta.dtype)
    if keep is not None:
        step.mul_(keep)
    bent = inner @ step
    curvature = (step * bent).sum(0)
    old = level.scale[0].clone()
    level.scale[0] = level.storable(old + torch.where(curvature > 0, (step * gradient).sum(0) / curvature, 0.0))
    torch.reciprocal(level.scale, out=level.inverse)
    change = level.scale[0] - old
    delta.addcmul_(step, change, value=-1)
    gradient.addcmul_(bent, change, value=-1)
