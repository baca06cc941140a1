"""decoupleQ: integers and floats of a weight found in turn, each the best for the other (arXiv 2404.12759).

Problem   minimise E = tr((W - Q) H (W - Q)^T) over Q = s a + o: integers a in -2^(b-1) .. 2^(b-1)-1, a scale s and an offset o
          per row and group, neither of which is tied to the range of the weights. H is the damped mean of x x^T.
Shapes    W and a (out, in), H (in, in), s and o (out, groups).
Start     the grid of least squared error that GPTQ begins with, its zero point written as an offset, and GPTQ's codes on it.
Floats    given a, E is quadratic in a row's 2 G floats. With D = W - Q and blocks of groups i, j:
              [A_i^T H_ij A_j   A_i^T H_ij 1] [ds]   [A_i^T (H D)_i]
              [1^T   H_ij A_j   1^T   H_ij 1] [do] = [1^T   (H D)_i]
          solved in float64 for the change (a group whose codes are all alike leaves a direction free: it then does not move).
          A_i^T H_ij A_j for all j is the sum per group of (A_i H_i:) * A: one product per group, nothing of (out, groups, in).
          The floats are rounded to bfloat16 one after the other, each making up for those before it (Babai's nearest plane).
Integers  given s and o, GPTQ's rounding of W - o on the grid s a.
Rule      every row keeps the new floats or integers only if its own E falls. A row that keeps neither in a round has come to an
          end, and when all have, so has the search: rows do not influence each other.
Polish    `refinements` times a pass of coordinate descent over scales and codes, and the floats once more, under the same rule.
Storage   codes, bfloat16 scales and offsets: b + 32 / group bits per weight (b + 16 / group if symmetric, without offsets).
Failures  H of fewer tokens than columns is singular: damping then decides. Without tokens H is the identity. `tune/grid` goes on
          with scales and offsets for the whole block, which is the paper's second half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.methods.method import Bits, Damp, Described, Grouped, GroupSize, Result, group_columns, uniform_described
from compress.methods.solvers.error_feedback import BLOCK, GridLayout, factorise, full_precision, importance, refine, swept
from compress.methods.solvers.uniform_grid import Grid, fit, stored
from compress.weights.uniform import Uniform, middle
from compress.weights.weight import CompressedWeight

_ROOM = 1 << 23  # float64 numbers of the least-squares matrices that are held at a time
_RIDGE = 1e-9  # of the mean diagonal of a row's least-squares matrix, for directions that no code fixes


def decoupleq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
    damp: float,
    rounds: int,
    refinements: int,
) -> Result:
    """Round weight (out, in) under hessian (in, in), in float32, or in float64 where either is."""
    dtype = torch.float64 if torch.float64 in (weight.dtype, hessian.dtype) else torch.float32
    weight, columns = weight.to(dtype), weight.shape[1]
    size = group_columns(group_size, columns)
    with full_precision():
        factor = factorise(hessian.to(dtype), damp, descending=True)
        fitted = fit(weight, bits, size, symmetric=symmetric, search=True, importance=importance(factor))
        scale = fitted.scale.to(dtype)
        offset = torch.zeros_like(scale)
        if fitted.zero is not None:
            offset = bfloat16((middle(bits) - fitted.zero.to(dtype)) * scale)

        def integers(scale: Tensor, offset: Tensor) -> Tensor:
            turned = weight.T.contiguous() - spread(offset, size).T
            layout = GridLayout.of(Grid(scale, None, bits), dtype)
            return swept(turned, factor, layout, size)[1].T.contiguous()

        def error(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
            delta = weight - decoded(codes, scale, offset, bits)
            return ((delta @ factor.hessian) * delta).sum(1)

        codes = integers(scale, offset)
        kept = BestRows(error, codes, scale, offset)
        done = 0
        for done in range(rounds + 1):
            if done == rounds:
                break
            moved = kept.offer(kept.codes, *floats(weight, factor.hessian, *kept.now, bits, symmetric=symmetric))
            moved |= kept.offer(integers(kept.scale, kept.offset), kept.scale, kept.offset)
            if not moved:
                break
        for _ in range(0 if factor.plain else refinements):
            kept.offer(*descended(weight, factor.hessian, *kept.now, bits))
            kept.offer(kept.codes, *floats(weight, factor.hessian, *kept.now, bits, symmetric=symmetric))
    beside = None if symmetric else kept.offset.to(torch.bfloat16)
    return Result(
        CompressedWeight(Uniform(kept.codes, kept.scale.to(torch.bfloat16), bits, size, offset=beside)),
        factor.notes | {"rounds": done},
    )


class BestRows:
    """The best codes, scales and offsets so far, row by row."""

    def __init__(self, error: Callable[[Tensor, Tensor, Tensor], Tensor], codes: Tensor, scale: Tensor, offset: Tensor) -> None:
        self._error, self.codes, self.scale, self.offset = error, codes, scale, offset
        self.lost = error(codes, scale, offset)  # (out,)

    @property
    def now(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in), scales and offsets (out, groups)."""
        return self.codes, self.scale, self.offset

    def offer(self, codes: Tensor, scale: Tensor, offset: Tensor) -> bool:
        """Take over the rows whose error falls; say whether there are any."""
        now = self._error(codes, scale, offset)
        better = now < self.lost
        row = better.unsqueeze(1)
        self.lost = torch.where(better, now, self.lost)
        self.codes = torch.where(row, codes, self.codes)
        self.scale, self.offset = torch.where(row, scale, self.scale), torch.where(row, offset, self.offset)
        return bool(better.any())


def descended(
    weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and offsets after a pass of coordinate descent over scales and codes."""
    size = weight.shape[1] // scale.shape[1]
    layout = GridLayout.of(Grid(scale, None, bits), weight.dtype)
    delta, turned = (weight - decoded(codes, scale, offset, bits)).T.contiguous(), codes.T.contiguous()
    refine((weight - spread(offset, size)).T.contiguous(), hessian, layout, delta, turned, 1, BLOCK)
    return turned.T.contiguous(), layout.scale.T.contiguous(), offset


def spread(values: Tensor, size: int) -> Tensor:
    """(out, groups) -> (out, in)"""
    return values.repeat_interleave(size, 1)


def bfloat16(values: Tensor) -> Tensor:
    """Round to what is stored, in the dtype given."""
    return values.to(torch.bfloat16).to(values.dtype)


def decoded(codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Return s a + o (out, in)."""
    size = codes.shape[1] // scale.shape[1]
    return (codes.to(scale.dtype) - middle(bits)) * spread(scale, size) + spread(offset, size)


def floats(
    weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets (out, groups) of least error for codes (out, in), rounded to bfloat16 with compensation."""
    groups = scale.shape[1]
    unknowns = groups if symmetric else 2 * groups
    rows = max(1, _ROOM // unknowns**2)
    hessian = hessian.double()
    found = []
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        matrix, right = normal(weight[part], hessian, codes[part], scale[part], offset[part], bits, symmetric=symmetric)
        now = torch.cat([scale[part], offset[part]][: 1 if symmetric else 2], 1).double()
        ridge = _RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        matrix.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        lower, info = torch.linalg.cholesky_ex(matrix)
        best = now + torch.cholesky_solve(right.unsqueeze(2), lower).squeeze(2)
        good = ((info == 0) & best.isfinite().all(1)).unsqueeze(1)
        found.append(torch.where(good, plane(best, lower, groups), now))
    both = torch.cat(found).to(scale.dtype)
    return stored(both[:, :groups]), offset if symmetric else bfloat16(both[:, groups:])


def normal(
    weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return matrix (out, n, n) and right side (out, n) of the change of scales and then offsets, n = 2 groups, in float64."""
    rows, groups = scale.shape
    size = weight.shape[1] // groups
    steps = codes.double() - middle(bits)
    bent = (weight.double() - decoded(codes, scale.double(), offset.double(), bits)) @ hessian

    def per_group(values: Tensor) -> Tensor:
        summed: Tensor = values.unflatten(1, (groups, size)).sum(2)
        return summed

    unknowns = groups if symmetric else 2 * groups
    matrix = weight.new_empty(rows, unknowns, unknowns, dtype=torch.float64)
    for i in range(groups):
        span = slice(i * size, (i + 1) * size)
        product = steps[:, span] @ hessian[span]  # (out, in)
        matrix[:, i, :groups] = per_group(product * steps)
        if not symmetric:
            mixed = per_group(product)
            matrix[:, i, groups:] = mixed
            matrix[:, groups:, i] = mixed
            matrix[:, groups + i, groups:] = per_group(hessian[span].sum(0, keepdim=True))
    right = per_group(bent * steps)
    return matrix, right if symmetric else torch.cat([right, per_group(bent)], 1)


def plane(best: Tensor, lower: Tensor, groups: int) -> Tensor:
    """Round unknowns (out, n) to bfloat16 one by one, each making up for those before it, given a factor L (out, n, n).

    With P = L L^T the cost of an error e is |L^T e|^2: unknown k has the square (L_kk e_k + sum_{j>k} L_jk e_j)^2, so the last
    one is rounded first: offsets before scales.
    """
    rounded = best.clone()
    for k in range(best.shape[1] - 1, -1, -1):
        error = rounded[:, k + 1 :] - best[:, k + 1 :]
        fed = (lower[:, k + 1 :, k] * error).sum(1) / lower[:, k, k]
        wanted = best[:, k] - fed
        rounded[:, k] = stored(wanted) if k < groups else bfloat16(wanted)
    return rounded


class DecoupleQ(Grouped):
    """Options of decoupleQ."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Hessian,)

    bits: Bits = 2
    symmetric: Annotated[bool, Field(description="scales without offsets")] = False
    damp: Damp = 0.01
    rounds: Annotated[int, Field(ge=0, le=100, description="turns of floats and integers after the first rounding, at most")] = 4
    refinements: Annotated[int, Field(ge=0, le=100, description="passes over scales and codes at the end")] = 4

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        """Say how a weight of this shape (out, in) will be stored."""
        return uniform_described(shape, self.bits, self.size(shape[1]), offset=not self.symmetric)

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        """Round weight (out, in) under the Hessian of its inputs."""
        return decoupleq(weight, statistic(stats, Hessian).matrix(), **self.model_dump())


METHOD = DecoupleQ
