"""Gauss-Newton rounding: GPTQ's coordinate descent, led by the error of the whole block instead of each linear's own.

Problem    minimise the mean squared error of a block's outputs, with inputs taken after the compressed blocks and the original's
           outputs as targets, over the codes and scales of all its linears together.
Model      around the current values Q, with G = dLoss/dQ (out, in) and D the change of a weight,
               Loss(Q + D) ~ Loss(Q) + <G, D> + 1/2 sum_r mu k_r D_r H D_r^T
           H is the damped mean of x x^T that GPTQ uses, k_r how strongly the block's outputs depend on output r of the linear:
           the Gauss-Newton matrix with one number per row, as if the inputs of a linear and what follows it were independent.
Curvature  for random signs v at the block's N outputs, g = d<v, outputs>/dQ has E[g_r H^-1 g_r^T] = N k_r / 2 * in: one backward
           pass gives the k of every row of every linear, averaged over `in` directions. They are right for rounding errors,
           which have no direction; along G, where rows and linears act together, the outputs move more. So the k of a linear
           are multiplied by how far the outputs really move along G H^-1 / k over what the model predicts, if that is above 1.
Step       the model's minimum is T_r = Q_r - G_r H^-1 / (mu k_r), so rounding again minimises tr((T - Q) H (T - Q)^T): one pass
           of coordinate descent from the current codes, scales in closed form, see `error_feedback.refine`.
Rule       all linears step together, and mu compensates for what the model leaves out (it couples no two linears). A step is
           kept if the loss over all batches falls, with weights as stored; then mu is multiplied by 0.7, else by 2.
Start      GPTQ's solution with refined scales. The result is never worse than that.
Compared   signed or normalised gradients move all weights at one pace, also along directions of high curvature, and leave GPTQ's
           solution for a worse one unless bits are few. H corrects for that.
Storage    codes on a uniform grid, like GPTQ's.
Failures   needs gradients through the block. A linear that no token was routed to keeps its start. Overfits few calibration
           tokens.
Source     the model is that of Levenberg (1944) and Marquardt (1963) with Hutchinson's estimate of the curvature (1989).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, statistic
from compress.methods.block import Block
from compress.methods.method import GroupedGrid, GroupSize, Result, group_columns
from compress.methods.solvers.block_loss import gradients, loss, moved, probe
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.error_feedback import BLOCK, GridLayout, full_precision, refine
from compress.methods.solvers.uniform_grid import Grid
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

_LEAST_MU, _MU = 0.25, 1.0
_PROBED = 4  # batches on which the curvature along the gradient is measured
_SOFTER, _HARDER = 0.7, 2.0


@dataclass(frozen=True, eq=False)
class Linear:
    """The current state of one linear."""

    codes: Tensor  # (out, in) uint8
    grid: Grid
    size: int
    hessian: Tensor  # (in, in) damped, divided by its mean diagonal
    lower: Tensor  # (in, in) its Cholesky factor
    curvature: Tensor | None = None  # (out,) k_r; None: the linear keeps its start

    def part(self) -> Uniform:
        """Return the weight as it is stored."""
        return Uniform(self.codes, self.grid.scale, self.grid.bits, self.size, self.grid.zero)

    def value(self) -> Tensor:
        """Return the weight (out, in)."""
        return self.part().dequantize().to(self.hessian.dtype)

    def solved(self, rows: Tensor) -> Tensor:
        """Return rows (out, in) times H^-1."""
        return torch.cholesky_solve(rows.T, self.lower).T

    def curved(self, probed: Tensor, outputs: int, damp: float) -> Tensor:
        """Return k_r (out,) from gradients (out, in) of the outputs with random signs."""
        directions = self.hessian.shape[0] - damp * float(torch.cholesky_inverse(self.lower).trace())
        return 2 * (self.solved(probed) * probed).sum(1) / (outputs * max(directions, 1.0))

    def towards(self, gradient: Tensor) -> Tensor:
        """Return -G H^-1 / k (out, in), and 0 in rows without curvature."""
        assert self.curvature is not None
        curvature = self.curvature.unsqueeze(1)
        return torch.where(curvature > 0, -self.solved(gradient) / curvature, 0.0)

    def expected(self, change: Tensor) -> float:
        """Return the mean squared movement of the outputs that the model predicts for a change (out, in)."""
        assert self.curvature is not None
        return float((0.5 * self.curvature * ((change @ self.hessian) * change).sum(1)).sum())

    def after(self, gradient: Tensor, mu: float) -> Linear:
        """Return the linear after a pass of coordinate descent towards the model's minimum, given G (out, in)."""
        if self.curvature is None:
            return self
        value, change = self.value(), self.towards(gradient) / mu
        layout = GridLayout.of(self.grid, value.dtype)
        codes, delta = self.codes.T.contiguous(), change.T.contiguous()
        refine((value + change).T.contiguous(), self.hessian, layout, delta, codes, 1, BLOCK)
        return replace(self, codes=codes.T.contiguous(), grid=layout.grid(self.grid.bits))


def gaussnewton(
    block: Block,
    *,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
    damp: float,
    steps: int,
) -> dict[str, Result]:
    """Round all weights of a block together, in at most `steps` steps after GPTQ."""
    notes: dict[str, dict[str, Any]] = {}
    now: dict[str, Linear] = {}
    dampings: dict[str, float] = {}
    stats = block.observe((Hessian,))
    with full_precision():
        for site, (_, columns) in block.sites.items():
            size, matrix = group_columns(group_size, columns), statistic(stats[site], Hessian).matrix()
            codes, grid, factor = compensated(block.weight(site), matrix, bits, size, symmetric=symmetric, damp=damp)
            lower = torch.linalg.cholesky(factor.hessian)
            now[site] = Linear(codes, grid, size, factor.hessian, lower)
            notes[site] = factor.notes
            if not factor.plain:
                dampings[site] = factor.damp
        del stats

        def values(linears: dict[str, Linear]) -> dict[str, Tensor]:
            return {site: linear.value() for site, linear in linears.items()}

        before = least = loss(block, values(now))
        kept, mu, by_weight = 0, _MU, None
        if dampings:
            probed, outputs = probe(block, values(now))
            for site, added in dampings.items():
                now[site] = replace(now[site], curvature=now[site].curved(probed[site], outputs, added))
        for step in range(steps if dampings else 0):
            if by_weight is None:
                by_weight = gradients(block, range(block.batches), values(now))[1]
            if step == 0:
                now |= corrected(block, {site: now[site] for site in dampings}, by_weight, values(now))
            new = {site: linear.after(by_weight[site], mu) for site, linear in now.items()}
            found = loss(block, values(new))
            if found < least:
                now, least, by_weight, kept, mu = new, found, None, kept + 1, max(mu * _SOFTER, _LEAST_MU)
            else:
                mu *= _HARDER
            block.say((step + 1) / steps)
    for site in notes:
        notes[site] |= {"loss_before": before, "loss": least, "steps": kept}
    return {site: Result(CompressedWeight(linear.part()), notes[site]) for site, linear in now.items()}


def corrected(
    block: Block, linears: dict[str, Linear], by_weight: dict[str, Tensor], values: dict[str, Tensor]
) -> dict[str, Linear]:
    """Return the linears, their curvature raised to what the outputs show along the gradients."""
    changes = {}
    for site, linear in linears.items():
        change = linear.towards(by_weight[site])
        error = (values[site] - block.weight(site)).norm()
        changes[site] = change * (error / change.norm().clamp_min(torch.finfo(change.dtype).tiny))
    seen = moved(block, values, changes, _PROBED)
    result = {}
    for site, linear in linears.items():
        expected = linear.expected(changes[site])
        assert linear.curvature is not None
        more = max(1.0, seen[site] / expected) if expected > 0 else 1.0
        result[site] = replace(linear, curvature=linear.curvature * more)
    return result


class GaussNewton(GroupedGrid):
    """Options of Gauss-Newton rounding."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)
    scope: ClassVar[Literal["site", "block"]] = "block"
    compares: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = False

    damp: Annotated[float, Field(gt=0, le=100, description="added to the diagonal of the Hessian, over its mean")] = 0.01
    steps: Annotated[int, Field(ge=0, le=1000, description="steps after GPTQ's solution, each kept only if the loss falls")] = 10

    def __call__(self, block: Block) -> dict[str, Result]:
        """Round all weights of a block together."""
        return gaussnewton(block, **self.model_dump())


METHOD = GaussNewton
