"""BQPO: kept weights and their scales are trained through rounding, block by block (the first stage of GQSA, arXiv 2412.17560).

Problem   minimise the loss of a block over codes q and scales s of the weights that a mask keeps.
Forward   q = clamp(round(v), 0, 2^b - 1), value (q - z) s, 0 where nothing is kept; v (out, in) are places on the grid, in steps.
Backward  straight through the rounding: d value / d v = s within the range and 0 outside it, d value / d s = q - z. Zero points
          stay. Learned step sizes (arXiv 1902.08153) hold w = (v - z) s instead of v: then a scale that moves changes codes and
          hardly any value, and few steps gain less than with codes that are fixed.
Start     v is where the original's weight lies, at most 0.4 steps from the code that came, so that the first weight is the one
          that came, and codes that were close to another are close to it.
Others    dense bases move whole under their mask; where codes are not those of one uniform grid, scales and offsets move alone.
Defaults  one rate for v, in steps, and for s, relative to its size, see `_options`; epochs 8.
Failures  codes flip from side to side where the rate is large; only what is best as stored is kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.methods.retrain._options import Retraining
from compress.methods.solvers.trainable_weight import StateOfLeaves, Trainable, leaf, rest_of, trainable
from compress.weights.uniform import Uniform, middle
from compress.weights.weight import CompressedWeight

CELL = 0.4  # of a step, from a code


class Rounded(StateOfLeaves):
    """A weight on a uniform grid whose codes and scales move."""

    def __init__(self, weight: CompressedWeight, dense: Tensor) -> None:
        assert isinstance(weight.base, Uniform)
        self.weight, self.base = weight, weight.base
        self.rest = rest_of(weight)
        self.keep = None if weight.keep is None else weight.keep.mask()
        self.scale = weight.base.scale.float()
        codes = self._grouped(self.base.codes.float())
        off = (self._grouped(dense) / self.scale.unsqueeze(2) + self._zero() - codes).clamp(-CELL, CELL)
        self.start = codes + off
        self.leaves = {"v": leaf(torch.zeros_like(self.start)), "s": leaf(torch.zeros_like(self.scale))}

    def _grouped(self, values: Tensor) -> Tensor:
        """(out, in) -> (out, groups, group size)"""
        found: Tensor = values.unflatten(1, (-1, self.base.group_size))
        return found

    def _zero(self) -> Tensor | float:
        if self.base.zero is None:
            return middle(self.base.bits, self.base.bipolar)
        return self.base.zero.float().unsqueeze(2)

    def _scale(self) -> Tensor:
        return self.scale + self.scale.abs() * self.leaves["s"]

    def _codes(self) -> Tensor:
        """Return codes (out, groups, group size) in float32; gradients pass straight through."""
        place = self.start + self.leaves["v"]
        return (place + (place.round() - place).detach()).clamp(0, (1 << self.base.bits) - 1)

    def values(self) -> Tensor:
        """Return the weight (out, in) as it is rounded."""
        values = ((self._codes() - self._zero()) * self._scale().unsqueeze(2)).flatten(1)
        if self.keep is not None:
            values = torch.where(self.keep, values, 0.0)
        return values if self.rest is None else values + self.rest

    def stored(self) -> CompressedWeight:
        """Return the weight with its codes, and scales as they are stored."""
        with torch.no_grad():
            scale = self._scale().to(self.base.scale.dtype)
            codes = self._codes().round().to(torch.uint8).flatten(1)
        base = replace(self.base, codes=codes, scale=scale)
        return replace(self.weight, base=base if self.keep is None else base.under(self.keep))


class Bqpo(Retraining):
    """Options of training through rounding."""

    def trainable(
        self, weight: CompressedWeight, dense: Tensor, square: Tensor | None, generator: torch.Generator
    ) -> Trainable | None:
        """Return what moves of a weight: latent weights and scales, or what can."""
        base = weight.base
        if isinstance(base, Uniform) and base.group is None and base.offset is None and not base.bipolar and base.bits > 1:
            return Rounded(weight, dense)
        return trainable(weight, "full", 1, 1.0, True, generator)


METHOD = Bqpo
