"""SignRound: where each weight is rounded, and to what range, learned by gradients of the block's error (arXiv 2309.05516).

Problem   minimise the mean squared error of a block's outputs, with inputs taken after the compressed blocks and the original's
          outputs as targets, over all linears of the block together. GPTQ minimises the error of each linear alone.
Weights   x = W / s + V,  q = clamp(round(x), low, high),  Q = s q                  W and V (out, in), s (out, groups)
          symmetric    s = alpha s0, of either sign: the longer end of the range is on the side of the larger weight
          asymmetric   lo = alpha lo0, hi = beta hi0, s = (hi - lo) / (2^b - 1), zero z = round(-lo / s), low = -z,
                       high = 2^b - 1 - z
          where s is rounded to bfloat16, the type it is stored in. V is in steps of the grid.
Gradients G = dLoss/dQ is the block's; the rest is closed form, with the slope of round(y) taken as 1:
          dQ/dV = s inside the range and 0 outside;   dQ/ds = q - W/s inside, q outside;   dQ/dz = 0 inside, -s outside
Step      p <- p - rate (1 - t/T) d, for V and for alpha and beta, whose rate is divided by 2^(b-1): all rates are in steps of the
          grid, at the end of the range. d is the direction of Adam or, as in the paper, the sign of the gradient.
Best      the loss over all batches, with weights as stored, is measured at the start and `evaluations` times during training; the
          least is kept, so the result is never worse than its start. (The paper keeps the step whose own batch lost least.)
Start     gptq   V moves each x just far enough into the cell of the code that GPTQ with refined scales gives it
          mse    V = 0 on the grid of least squared error
Storage   codes on a uniform grid, like GPTQ's.
Failures  needs gradients through the block, with float32 V and G of its weights and the activations of one batch. An expert that
          no token was routed to keeps its start. Overfits few calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, statistic
from compress.methods.block import Block
from compress.methods.method import GroupedGrid, GroupSize, Result, StepBatches, group_columns
from compress.methods.solvers.block_loss import Adam, drawn, gradients, loss
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.uniform_grid import Grid, fit, nearest, stored
from compress.weights.uniform import Uniform, middle
from compress.weights.weight import CompressedWeight

Start = Literal["gptq", "mse"]
Rule = Literal["adam", "sign"]
# How far inside the cell of its code a weight is put if GPTQ did not round it to nearest, in steps of the grid.
_MARGIN = 0.05
# How far V and the ends of a range can move over all steps, in steps of the grid; those of `sign` are the paper's.
_REACH = {"adam": (0.25, 0.25), "sign": (0.5, 0.5)}
_SHORTEST, _LONGEST = 0.1, 2.0  # relative to the range that a group starts with


@dataclass(eq=False)
class Rounding:
    """One weight in training: where it is rounded to, its range, and the gradients with respect to both."""

    weight: Tensor  # (out, groups, group size)
    shift: Tensor  # V, the same shape
    start: Tensor  # (out, groups) s0 of a symmetric grid, hi0 of an asymmetric one
    low: Tensor | None  # (out, groups) lo0; None: symmetric
    range: Tensor  # (ends, out, groups) multipliers: of s0; or of lo0 and hi0
    bits: int
    adam: tuple[Adam, Adam] | None = None  # of V and of the range; None: signs

    @classmethod
    def at(cls, weight: Tensor, grid: Grid, size: int, codes: Tensor | None) -> Rounding:
        """Start from a grid of weight (out, in), with the given codes (out, in) or else the nearest ones."""
        grouped, scale = weight.unflatten(1, (-1, size)), grid.scale.to(weight.dtype)
        top = (1 << grid.bits) - 1
        shift, zeros = torch.zeros_like(grouped), None if grid.zero is None else grid.zero.to(weight.dtype)
        if codes is not None:
            zero = middle(grid.bits) if zeros is None else zeros.unsqueeze(2)
            scaled = grouped / scale.unsqueeze(2)
            want = codes.unflatten(1, (-1, size)).to(weight.dtype) - zero
            reach = 0.5 - _MARGIN
            inside = torch.maximum(torch.minimum(scaled, want + reach), want - reach)
            # A weight beyond the range that is rounded to its end is left there, without a gradient until the range grows.
            agrees = nearest(scaled.clone(), *_limits(grid.bits, zeros)) == want
            shift = torch.where(agrees, 0.0, inside - scaled)
        if zeros is None:
            return cls(grouped, shift, scale, None, torch.ones_like(scale).unsqueeze(0), grid.bits)
        ends = torch.ones_like(scale).expand(2, -1, -1).clone()
        return cls(grouped, shift, (top - zeros) * scale, -zeros * scale, ends, grid.bits)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Return the scale as stored and the zero, both (out, groups), of the current ranges."""
        if self.low is None:
            return stored(self.range[0] * self.start), None
        top = (1 << self.bits) - 1
        low, high = self.range[0] * self.low, self.range[1] * self.start
        scale = stored((high - low) / top)
        return scale, (-low / scale).round_().clamp_(0, top)

    def levels(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x, and what it is rounded to, `code - zero` (out, groups, group size)."""
        scaled = (self.weight / scale.unsqueeze(2)).add_(self.shift)
        return scaled, nearest(scaled.clone(), *_limits(self.bits, zero))

    def value(self) -> Tensor:
        """Return the weight (out, in) as it would be stored."""
        scale, zero = self.grid()
        return (self.levels(scale, zero)[1] * scale.unsqueeze(2)).flatten(1)

    def part(self) -> Uniform:
        """Return the weight as stored."""
        scale, zero = self.grid()
        code = self.levels(scale, zero)[1] + (middle(self.bits) if zero is None else zero.unsqueeze(2))
        codes, size = code.to(torch.uint8).flatten(1), self.weight.shape[2]
        return Uniform(codes, scale.to(torch.bfloat16), self.bits, size, None if zero is None else zero.to(torch.uint8))

    def gradients(self, by_value: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient for the weight (out, in) -> gradients for V (out, groups, group size) and the range (ends, out, groups)."""
        scale, zero = self.grid()
        scaled, level = self.levels(scale, zero)
        given = by_value.unflatten(1, (-1, self.weight.shape[2]))
        pair = self.bits == 1 and zero is None  # -1/2 and +1/2, whose cells reach one step out
        inside = scaled.abs() <= 1 if pair else scaled.round() == level
        by_shift = torch.where(inside, given * scale.unsqueeze(2), 0.0)
        change = torch.where(inside, level - self.weight / scale.unsqueeze(2), level)
        by_scale = (given * change).sum(2)
        if self.low is None or zero is None:
            return by_shift, (by_scale * self.start).unsqueeze(0)
        by_zero = -(torch.where(inside, 0.0, given).sum(2)) * scale
        top, low = (1 << self.bits) - 1, self.range[0] * self.low
        whole = by_scale + by_zero * low / scale.square()  # z = -lo / s moves with s
        return by_shift, torch.stack([(-whole / top - by_zero / scale) * self.low, whole / top * self.start])

    def step(self, by_value: Tensor, rate: float, range_rate: float) -> None:
        """Move V and the range against their gradients, given the gradient for the weight (out, in)."""
        by_shift, by_range = self.gradients(by_value)
        if self.adam is None:
            by_shift, by_range = by_shift.sign_(), by_range.sign_()
        else:
            by_shift, by_range = self.adam[0].direction(by_shift), self.adam[1].direction(by_range)
        self.shift.sub_(by_shift, alpha=rate)
        self.range.sub_(by_range, alpha=range_rate / (1 << (self.bits - 1))).clamp_(_SHORTEST, _LONGEST)


def _limits(bits: int, zero: Tensor | None) -> tuple[Any, Any]:
    """Return the lowest and highest `code - zero`, broadcastable to (out, groups, group size)."""
    low = -middle(bits) if zero is None else -zero.unsqueeze(2)
    return low, low + ((1 << bits) - 1)


def signround(
    block: Block,
    *,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
    steps: int,
    batches: int,
    rate: float | None,
    range_rate: float | None,
    start: Start,
    rule: Rule,
    evaluations: int,
) -> dict[str, Result]:
    """Round all weights of a block together; rates that are None follow from `_REACH`."""
    notes: dict[str, dict[str, Any]] = {site: {} for site in block.sites}
    roundings: dict[str, Rounding] = {}
    stats = block.observe((Hessian,)) if start == "gptq" else {}
    for site, (_, columns) in block.sites.items():
        size = group_columns(group_size, columns)
        weight = block.weight(site)
        if start == "gptq":
            matrix = statistic(stats[site], Hessian).matrix()
            codes, grid, factor = compensated(weight, matrix, bits, size, symmetric=symmetric)
            if factor.fallback is not None:
                notes[site]["fallback"] = factor.fallback
        else:
            codes, grid = None, fit(weight, bits, size, symmetric=symmetric, search=True)
        found = Rounding.at(weight, grid, size, codes)
        if rule == "adam":
            found.adam = Adam(found.shift), Adam(found.range)
        roundings[site] = found

    def values() -> dict[str, Tensor]:
        return {site: rounding.value() for site, rounding in roundings.items()}

    before = least = loss(block, values())
    best = {site: (rounding.shift.clone(), rounding.range.clone()) for site, rounding in roundings.items()}
    best_step, done = 0, {round(steps * (k + 1) / evaluations) for k in range(evaluations)}
    rates = [
        2 * reach / max(steps, 1) if given is None else given
        for reach, given in zip(_REACH[rule], (rate, range_rate), strict=True)
    ]
    source = drawn(block, batches)
    for step in range(steps if block.total_batches else 0):
        _, by_weight, _ = gradients(block, next(source), values())
        for site, gradient in by_weight.items():
            roundings[site].step(gradient, *(rate * (1 - step / steps) for rate in rates))
        if step + 1 in done and (now := loss(block, values())) < least:
            least, best_step = now, step + 1
            best = {site: (rounding.shift.clone(), rounding.range.clone()) for site, rounding in roundings.items()}
        block.say((step + 1) / steps)
    for site, rounding in roundings.items():
        rounding.shift, rounding.range = best[site]
        notes[site] |= {"loss_before": before, "loss": least, "best_step": best_step}
    return {site: Result(CompressedWeight(rounding.part()), notes[site]) for site, rounding in roundings.items()}


class SignRound(GroupedGrid):
    """Options of SignRound."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    scope: ClassVar[Literal["site", "block"]] = "block"
    compares: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = False

    steps: Annotated[int, Field(ge=0, le=100000, description="steps of signed gradients per block")] = 200
    batches: StepBatches = 1
    rate: Annotated[
        float | None, Field(gt=0, le=1, description="first step of V, in steps of the grid; null: by rule and steps")
    ] = None
    range_rate: Annotated[float | None, Field(gt=0, le=1, description="first step of the ends of a range, likewise")] = None
    start: Annotated[Start, Field(description="what is improved on: GPTQ's codes, or rounding on the best grid")] = "gptq"
    rule: Annotated[Rule, Field(description="how gradients become steps: Adam's directions, or the paper's signs")] = "adam"
    evaluations: Annotated[int, Field(ge=1, description="times that the loss over all batches is taken on the way")] = 8

    def __call__(self, block: Block) -> dict[str, Result]:
        """Round all weights of a block together."""
        return signround(block, **self.model_dump())


METHOD = SignRound
