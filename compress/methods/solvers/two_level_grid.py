"""Grids in two levels: scales and zero points of a group of columns, themselves on a grid per 16 rows, fitted to weights.

With code q and `value = (q - z) s`, the squared error of a row in a group is a quadratic form in s and s z, whatever the metric.
Five moments of the codes say all about it:

    E(s, z) = s^2 (qq - 2 z q1 + z^2 oo) - 2 s (qg - z og) + const
    qq = <q, H q>   q1 = <q, H 1>   oo = <1, H 1>   qg = <q, G>   og = <1, G>,   G = H w

Over places that are stored elsewhere (outliers) q and 1 are 0. For fixed z this is E = A s^2 - 2 B s, for fixed s likewise in
z, so that over 16 rows the best second level is a least-squares line through (first-level code, B / A) with weights A, and the
best first-level codes of a row are found by trying all scale codes, each with its best zero code.

Layout: (groups, out), and (groups, tiles) for the second level. Codes are whole numbers in the dtype of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.methods.solvers.uniform_grid import stored
from compress.weights.two_level import STEP_BITS, TILE, TwoLevel, decode_scale, decode_zero, tiles

_DETERMINED = 1e-5  # variance of codes over their mean square; below it float32 would follow its own rounding
_FIRST = ("scale_code", "zero_code")
_SECOND = ("top", "step", "offset", "zero_step")


@dataclass(frozen=True, eq=False)
class Moments:
    """What the squared error of each row and group depends on, (groups, out) each."""

    qq: Tensor
    q1: Tensor
    oo: Tensor
    qg: Tensor
    og: Tensor

    @classmethod
    def diagonal(cls, codes: Tensor, weight: Tensor, cost: Tensor) -> Moments:
        """Moments of one group under a diagonal metric: codes, weight and cost (size, out), cost 0 at outliers."""
        bent = cost * codes
        made = (bent * codes, bent, cost, bent * weight, cost * weight)
        return cls(*(values.sum(0, keepdim=True) for values in made))

    @classmethod
    def full(cls, codes: Tensor, free: Tensor, inner: Tensor, gradient: Tensor) -> Moments:
        """Moments of one group: codes, free (1 where the grid is what is stored) and gradient (size, out), inner (size, size)."""
        codes = codes * free
        bent, ones = inner @ codes, inner @ free
        made = (codes * bent, codes * ones, free * ones, codes * gradient, free * gradient)
        return cls(*(values.sum(0, keepdim=True) for values in made))


@dataclass(eq=False)
class TwoLevelGrid:
    """Scales and zero points in two levels, while they are searched."""

    scale_code: Tensor  # (groups, out)
    zero_code: Tensor  # (groups, out)
    top: Tensor  # (groups, tiles) largest scale, a value of bfloat16
    step: Tensor  # (groups, tiles)
    offset: Tensor  # (groups, tiles)
    zero_step: Tensor  # (groups, tiles)
    bits: int
    scale_bits: int
    zero_bits: int

    @classmethod
    def empty(cls, groups: int, rows: int, like: Tensor, bits: int, scale_bits: int, zero_bits: int) -> TwoLevelGrid:
        """Room for grids that are fitted later."""
        scale_code, zero_code = (like.new_zeros(groups, rows) for _ in range(2))
        top, step, offset, zero_step = (like.new_zeros(groups, tiles(rows)) for _ in range(4))
        return cls(scale_code, zero_code, top, step, offset, zero_step, bits, scale_bits, zero_bits)

    @classmethod
    def covering(cls, scale: Tensor, zero: Tensor, bits: int, scale_bits: int, zero_bits: int) -> TwoLevelGrid:
        """Place scales and zeros (groups, out) on second levels that cover those of 16 rows."""
        grid = cls.empty(scale.shape[0], scale.shape[1], scale, bits, scale_bits, zero_bits)
        grid.top = stored(_tiled(scale, -torch.inf).amax(2))
        drop = 1 - _tiled(scale, torch.inf).amin(2) / grid.top
        unit, last = 1 << (STEP_BITS + scale_bits), (1 << scale_bits) - 1
        grid.step = (drop * (unit / last)).round_().clamp_(0, grid.step_limit)
        below = (1 - scale / grid.spread(grid.top)) * unit
        grid.scale_code = _divided(below, grid.spread(grid.step)).round_().clamp_(0, last)

        fine, last = zero * 2.0 ** (8 - bits), (1 << zero_bits) - 1
        low, high = _tiled(fine, torch.inf).amin(2), _tiled(fine, -torch.inf).amax(2)
        grid.offset = low.round().clamp_(0, 255)
        grid.zero_step = ((high - grid.offset) * ((last + 1) / last)).round_().clamp_(0, 255)
        grid.zero_code = grid._zero_codes(fine)
        return grid

    @property
    def step_limit(self) -> int:
        """The largest scale step, with which no scale is negative."""
        return min(255, (1 << (STEP_BITS + self.scale_bits)) // ((1 << self.scale_bits) - 1))

    def spread(self, values: Tensor) -> Tensor:
        """(groups, tiles) -> (groups, out)"""
        return values.repeat_interleave(TILE, 1)[:, : self.scale_code.shape[1]]

    def scale(self) -> Tensor:
        """Return the scales (groups, out)."""
        return decode_scale(self.scale_code, self.spread(self.top), self.spread(self.step), self.scale_bits)

    def zero(self) -> Tensor:
        """Return the zero points (groups, out)."""
        offset, step = self.spread(self.offset), self.spread(self.zero_step)
        return decode_zero(self.zero_code, offset, step, self.zero_bits, self.bits, offset.dtype)

    def group(self, index: int) -> TwoLevelGrid:
        """One group, sharing memory."""
        return replace(self, **{name: getattr(self, name)[index : index + 1] for name in (*_FIRST, *_SECOND)})

    def assign(self, other: TwoLevelGrid, where: Tensor) -> None:
        """Take over another's tiles where (groups, tiles) is true, in place."""
        rows = self.spread(where)
        for name in _FIRST:
            getattr(self, name).copy_(torch.where(rows, getattr(other, name), getattr(self, name)))
        for name in _SECOND:
            getattr(self, name).copy_(torch.where(where, getattr(other, name), getattr(self, name)))

    def reordered(self, groups: Tensor) -> TwoLevelGrid:
        """The same with its groups in another order."""
        return replace(self, **{name: getattr(self, name)[groups] for name in (*_FIRST, *_SECOND)})

    def total(self, values: Tensor) -> Tensor:
        """Sum (groups, out) over the rows of each tile: (groups, tiles)."""
        return _tiled(values, 0.0).sum(2)

    def part(self, codes: Tensor, group_size: int, group: Tensor | None) -> TwoLevel:
        """Return codes (out, in) on this grid as they are stored."""

        def octets(values: Tensor) -> Tensor:
            return values.T.to(torch.uint8).contiguous()

        return TwoLevel(
            codes=codes,
            scale_code=octets(self.scale_code),
            zero_code=octets(self.zero_code),
            scale_top=self.top.T.to(torch.bfloat16).contiguous(),
            scale_step=octets(self.step),
            zero_offset=octets(self.offset),
            zero_step=octets(self.zero_step),
            bits=self.bits,
            scale_bits=self.scale_bits,
            zero_bits=self.zero_bits,
            group_size=group_size,
            group=group,
        )

    # ---------------------------------------------------------------- fitting

    def improve(self, moments: Moments) -> None:
        """Lower the error of fixed codes: second level of the scales, that of the zeros, then both codes of every row."""
        self._improve_scales(moments)
        self._improve_zeros(moments)
        self._improve_codes(moments)

    def _improve_scales(self, m: Moments) -> None:
        """Fit s = t - t (step / unit) n to 16 rows by least squares, n the scale codes."""
        zero, unit = self.zero(), 1 << (STEP_BITS + self.scale_bits)
        curve, slope = m.qq - 2 * zero * m.q1 + zero.square() * m.oo, m.qg - zero * m.og
        a0, a1, a2, b0, b1 = _line(curve, slope, self.scale_code)

        def error(top: Tensor, step: Tensor) -> Tensor:
            k = step / unit
            return top.square() * (a0 - 2 * k * a1 + k.square() * a2) - 2 * top * (b0 - k * b1)

        best = error(self.top, self.step)
        wanted = _divided((a1 * b0 - a0 * b1) * unit, a2 * b0 - a1 * b1)
        wanted = torch.where(_determined(a0, a1, a2), wanted, self.step)
        for step in (self.step.clone(), wanted.floor(), wanted.ceil()):
            step = step.clamp(0, self.step_limit)
            k = step / unit
            top = _divided(b0 - k * b1, a0 - 2 * k * a1 + k.square() * a2)
            top = torch.where(top > 0, stored(top), self.top)
            found = error(top, step)
            better = found < best
            best = torch.where(better, found, best)
            self.top.copy_(torch.where(better, top, self.top))
            self.step.copy_(torch.where(better, step, self.step))

    def _improve_zeros(self, m: Moments) -> None:
        """Fit y = offset + (step / unit) n to 16 rows by least squares, y the zeros in 2^(bits - 8), n the zero codes."""
        scale, unit, grain = self.scale(), 1 << self.zero_bits, 2.0 ** (self.bits - 8)
        curve, slope = scale.square() * m.oo, (scale.square() * m.q1 - scale * m.og) / grain
        a0, a1, a2, b0, b1 = _line(curve, slope, self.zero_code)

        def error(offset: Tensor, step: Tensor) -> Tensor:
            k = step / unit
            return offset.square() * a0 + 2 * offset * k * a1 + k.square() * a2 - 2 * (offset * b0 + k * b1)

        best = error(self.offset, self.zero_step)
        wanted = _divided((a0 * b1 - a1 * b0) * unit, a0 * a2 - a1.square())
        wanted = torch.where(_determined(a0, a1, a2), wanted, self.zero_step)
        for step in (self.zero_step.clone(), wanted.floor(), wanted.ceil()):
            step = step.clamp(0, 255)
            offset = _divided(b0 - (step / unit) * a1, a0).round_().clamp_(0, 255)
            found = error(offset, step)
            better = found < best
            best = torch.where(better, found, best)
            self.offset.copy_(torch.where(better, offset, self.offset))
            self.zero_step.copy_(torch.where(better, step, self.zero_step))

    def _improve_codes(self, m: Moments) -> None:
        """Give every row the best of all scale codes, each with its best zero code."""
        grain = 2.0 ** (self.bits - 8)

        def error(scale: Tensor, zero: Tensor) -> Tensor:
            return scale.square() * (m.qq - 2 * zero * m.q1 + zero.square() * m.oo) - 2 * scale * (m.qg - zero * m.og)

        shape = (1 << self.scale_bits, *self.scale_code.shape)
        number = torch.arange(shape[0], dtype=self.top.dtype, device=self.top.device).view(-1, 1, 1).expand(shape)
        scale = decode_scale(number, self.spread(self.top), self.spread(self.step), self.scale_bits)
        fitting = self._zero_codes(_divided(scale * m.q1 - m.og, scale * m.oo) / grain)
        offset, zero_step = self.spread(self.offset), self.spread(self.zero_step)
        zero = decode_zero(fitting, offset, zero_step, self.zero_bits, self.bits, offset.dtype)
        found, place = error(scale, zero).min(0, keepdim=True)
        better = found[0] < error(self.scale(), self.zero())
        self.scale_code.copy_(torch.where(better, place[0].to(number.dtype), self.scale_code))
        self.zero_code.copy_(torch.where(better, fitting.gather(0, place)[0], self.zero_code))

    def _zero_codes(self, fine: Tensor) -> Tensor:
        """The codes nearest to zeros (groups, out) in units of 2^(bits - 8)."""
        above = (fine - self.spread(self.offset)) * (1 << self.zero_bits)
        return _divided(above, self.spread(self.zero_step)).round_().clamp_(0, (1 << self.zero_bits) - 1)


def _tiled(values: Tensor, fill: float) -> Tensor:
    """(groups, out) -> (groups, tiles, 16)"""
    missing = -values.shape[1] % TILE
    padded: Tensor = torch.nn.functional.pad(values, (0, missing), value=fill).unflatten(1, (-1, TILE))
    return padded


def _line(curve: Tensor, slope: Tensor, code: Tensor) -> tuple[Tensor, ...]:
    """Sums over tiles, (groups, tiles) each: of A, A n, A n^2, B, B n."""
    bent = curve * code
    return tuple(_tiled(values, 0.0).sum(2) for values in (curve, bent, bent * code, slope, slope * code))


def _determined(a0: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """Whether a tile has codes different enough to say which way its line goes."""
    return a0 * a2 - a1.square() > _DETERMINED * a0 * a2


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where there is none."""
    quotient = numerator / denominator
    return torch.where(quotient.isfinite(), quotient, 0.0)
