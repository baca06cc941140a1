"""Equalization: channels scaled so that what error compensation cannot mend is least (after arXiv 1906.04721 and 2306.00978).

Problem     all columns of a group share one step, as wide as the group's largest weight demands. Multiplying column j of W by
            s_j and dividing input j by s_j changes nothing, but the step is then that of the scaled weights, and an error of
            column j counts 1/s_j of what it did. AWQ picks s for rounding to nearest, from the size of inputs alone; what
            compensation (GPTQ) leaves of an error depends on neither, and scales chosen so lose at low bits.
Loss        With H = R R^T in processing order and pivots r_k = R_kk, compensated rounding costs sum_k r_k^2 |e_k|^2, e_k the
            rounding error of column k (see `error_feedback`). In the same order the pivots of the scaled Hessian
            S^-1 H S^-1 are r_k / s_k, so a step of the search needs no factorisation:
                L(s) = sum over groups g of  sum_o step_og(s)^2 / 12 * sum_{k in g} (r_k / s_k)^2,
            step_og = (2 / (2^b - 1)) max_{j in g} |w_oj s_j|, the maximum as a norm of order 8. Where the method that
            rounds compensates nothing, r_k^2 is H_kk. Linears of one place, and experts each with their own H times its
            tokens, add up.
Places      as for AWQ: a norm and all that reads it; v_proj for o_proj; up_proj for down_proj; the family says where.
Steps       1. H input by input.
            2. Twice: the pivots of the Hessian as scaled so far, and `steps` of Adam on log s for log L. The second time is for
               the damping, which is a share of the mean diagonal: with outliers in H, it hides all other channels.
            3. Check: at s^t, t = 0, 1/2, 1, a sample of rows is rounded as GPTQ does it under the scaled H, or to nearest where
               nothing compensates, on the grid of the method that rounds; the least error tr(D H D^T) wins.
            4. The norm's weight or the producer's rows are divided, columns multiplied.
Shapes      W (out, in), s (channels,), H (in, in), r (in,).
Failures    where channels are alike there is nothing to gain, and nothing is moved. Norms take scales to their own
            precision only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, statistic
from compress.methods.block import Block, Scalable, TransformResult
from compress.methods.method import GroupSize, Method, group_columns, indivisible
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.error_feedback import factorise, full_precision, importance
from compress.methods.solvers.uniform_grid import encode, fit
from compress.methods.transform._scaling import Moved, expand

_ROUNDS = 2
_ROWS = 256  # of each linear that scales are searched and checked with
_INPUTS = 8  # of a place, those with the most tokens: hundreds of experts may read one norm
_STRENGTHS = (0.0, 0.5, 1.0)
_RATE = 0.05  # of Adam, on log s
_DAMP = 0.01


@dataclass(frozen=True)
class _Rounding:
    """What is known of the grid of a method that rounds, and whether it compensates for errors."""

    bits: int
    group_size: GroupSize
    symmetric: bool
    compensates: bool

    @classmethod
    def of(cls, method: Method) -> _Rounding | None:
        """Read it from the method's options; None where it has no grid with bits and groups."""
        bits, size = getattr(method, "bits", None), getattr(method, "group_size", None)
        if not isinstance(bits, int) or size is None:
            return None
        return cls(bits, size, bool(getattr(method, "symmetric", True)), Hessian in method.needs or method.scope == "block")

    def pivots(self, hessian: Tensor) -> Tensor:
        """What a squared error of each column (in,) costs: r_k^2 of hessian (in, in) after compensation, or H_kk."""
        if not self.compensates:
            return hessian.diagonal().clone()
        factor = factorise(hessian, _DAMP, descending=True)
        return importance(factor) * factor.mean

    def error(self, weight: Tensor, hessian: Tensor) -> float:
        """tr(D H D^T) of rounding weight (rows, in) under hessian (in, in)."""
        size = group_columns(self.group_size, weight.shape[1])
        if self.compensates:
            codes, grid, _ = compensated(weight, hessian, self.bits, size, symmetric=self.symmetric, refinements=0)
        else:
            grid = fit(weight, self.bits, size, symmetric=self.symmetric, search=True)
            codes = encode(weight, grid, size)
        zero = grid.levels(weight.dtype)[2]
        steps = codes.to(weight.dtype).view(*grid.scale.shape, size) - (zero.unsqueeze(2) if isinstance(zero, Tensor) else zero)
        wrong = weight - (steps * grid.scale.to(weight.dtype).unsqueeze(2)).view_as(weight)
        return float(((wrong @ hessian) * wrong).sum(dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class _Input:
    """A tensor that linears of a place read, with one grid: what scales are searched and checked with."""

    rounding: _Rounding
    weight: Tensor  # (rows, in), a sample of all
    hessian: Tensor  # (in, in), times the tokens
    tokens: int

    def costs(self, scales: Tensor) -> Tensor:
        """What a squared error of each unscaled column costs (in,), given that rounding happens behind scales (in,)."""
        return self.rounding.pivots(self.hessian / scales / scales.unsqueeze(1)) * scales.square()

    def error(self, scales: Tensor) -> float:
        """The error of the sample's outputs, summed over tokens, if it is rounded behind scales (in,)."""
        return self.rounding.error(self.weight * scales, self.hessian / scales / scales.unsqueeze(1))


def loss(scales: Tensor, costs: Tensor, eighths: Tensor, rounding: _Rounding) -> Tensor:
    """L of scales (in,) for the eighth powers of a weight (rows, in), with costs r_k^2 (in,) of the unscaled Hessian."""
    size = group_columns(rounding.group_size, len(scales))
    sums = torch.einsum("rgk,gk->rg", eighths.view(len(eighths), -1, size), scales.pow(8).view(-1, size))
    top = (sums + torch.finfo(sums.dtype).tiny).pow(0.25).sum(0)  # squares of the norm of order 8, over rows: (groups,)
    left = (costs / scales.square()).view(-1, size).sum(1)
    step = 2 / ((1 << rounding.bits) - 1)
    return (top * left).sum() * (step * step / 12)


def search(inputs: Sequence[_Input], place: Scalable, channels: int, steps: int) -> Tensor:
    """Return the scales (channels,) of least loss over all inputs of one place."""
    logs = inputs[0].hessian.new_zeros(channels)
    unit = max(float(i.weight.abs().amax()) for i in inputs)  # eighth powers of small numbers are none
    if unit == 0:
        return logs.exp()
    for _ in range(_ROUNDS):
        before = expand(place, logs.exp())
        terms = [(i.costs(before), (i.weight / unit).pow(8), i.rounding) for i in inputs]
        with torch.enable_grad():
            leaf = logs.clone().requires_grad_()
            adam = torch.optim.Adam([leaf], lr=_RATE)
            for _ in range(steps):
                adam.zero_grad()
                scales = expand(place, leaf).exp()
                torch.stack([loss(scales, *term) for term in terms]).sum().log().backward()
                adam.step()
        logs = leaf.detach()
    return (logs - logs.mean()).exp()


class Equalize(Method):
    """Options of equalization."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    scope: ClassVar[Literal["site", "block"]] = "block"

    steps: Annotated[int, Field(ge=1, le=10_000, description="of the search, in each of two rounds")] = 100

    def check_before(self, shape: tuple[int, int], rounding: Method) -> str | None:
        """Say whether the grid is unknown, or its group size does not divide the columns of a weight (out, in)."""
        found = _Rounding.of(rounding)
        if found is None:
            return f"{rounding.path} has no grid with bits and a group size, for which scales could be searched"
        return indivisible(shape[1], found.group_size)

    def __call__(self, block: Block) -> TransformResult:
        """Move scales between tensors of a block."""
        notes: dict[str, dict[str, Any]] = {site: {"scales": "what produces its input can take none"} for site in block.sites}
        moved = Moved(block)
        with torch.no_grad(), full_precision():
            for place, inputs in _inputs_in_turn(block, notes):
                strength, ratio = self._equalize(moved, place, inputs)
                notes |= {site: {"strength": strength, "error": round(ratio, 4)} for site in place.sites}
        return moved.changed(notes)

    def _equalize(self, moved: Moved, place: Scalable, inputs: Sequence[_Input]) -> tuple[float, float]:
        """Move the best scales of a place; return their strength, and the error left over that without scales."""
        wanted = search(inputs, place, moved.number(place), self.steps)
        wanted = torch.where(moved.read(place).to(wanted.device), wanted, 1.0)
        tried = [moved.effective(place, wanted.pow(strength)) for strength in _STRENGTHS]
        errors = [sum(i.error(expand(place, scales)) for i in inputs) for scales in tried]
        best = min(range(len(errors)), key=errors.__getitem__)
        if best:
            moved.move(place, tried[best])
        return _STRENGTHS[best], errors[best] / errors[0] if errors[0] > 0 else 1.0


def _inputs_in_turn(block: Block, notes: dict[str, dict[str, Any]]) -> Iterator[tuple[Scalable, list[_Input]]]:
    """Yield each place that can take scales, when all inputs of its linears have been observed; say why others cannot."""
    places = {}
    for number, place in enumerate(block.scalables):
        notes |= {site: {"scales": place.obstacle} for site in place.sites}
        if place.obstacle is None:
            places[number] = place
    owner = {site: number for number, place in places.items() for site in place.sites}
    missing = {number: set(place.sites) for number, place in places.items()}
    found: dict[int, list[_Input]] = {number: [] for number in places}
    for sites, stats in block.observe_in_turn((Hessian,)):
        mine = [site for site in sites if site in owner]
        if not mine:
            continue
        number = owner[mine[0]]  # all that read one tensor are at one place
        missing[number] -= set(mine)
        hessian = statistic(stats, Hessian)
        if hessian.tokens:
            found[number] += _of_one_tensor(block, mine, hessian)
            found[number].sort(key=lambda i: i.tokens, reverse=True)
            del found[number][_INPUTS:]
        if not missing[number] and found[number]:
            yield places[number], found.pop(number)


def _of_one_tensor(block: Block, sites: Sequence[str], hessian: Hessian) -> list[_Input]:
    """What scales are searched and checked with for the linears that read one tensor, by grid."""
    by_grid: dict[_Rounding, list[Tensor]] = {}
    for site in sites:
        rounding = _Rounding.of(block.rounding(site))
        assert rounding is not None, "checked before any weight was read"
        by_grid.setdefault(rounding, []).append(block.weight(site))
    matrix = hessian.matrix() * hessian.tokens
    return [
        _Input(rounding, torch.cat([_sample(w) for w in weights]), matrix, hessian.tokens)
        for rounding, weights in by_grid.items()
    ]


def _sample(weight: Tensor) -> Tensor:
    """Evenly spaced rows of weight (out, in)."""
    return weight[:: max(1, len(weight) // _ROWS)]


METHOD = Equalize
