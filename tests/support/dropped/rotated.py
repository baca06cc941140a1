"""A method that is dropped into `quant/` by tests: a random Hadamard transform of a site's input, then rounding to nearest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import Stats
from compress.methods.method import Bits, Described, GroupSize, Method, Result, uniform_described
from compress.methods.solvers.uniform_grid import encode, fit
from compress.weights.activation import Activation
from compress.weights.input_transform import Hadamard
from compress.weights.site_input import SiteInput
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight


class Rotated(Method):
    """Options of the method."""

    bits: Bits = 4
    group_size: GroupSize = 32
    block: int = 128
    activation: str | None = None  # a datatype per token

    def __call__(self, weight: Tensor, stats: Stats) -> Result:
        columns = weight.shape[1]
        transform = Hadamard.random(columns, self.block, torch.Generator().manual_seed(columns))
        rotated = transform.apply_to_weight(weight)
        grid = fit(rotated, self.bits, self.group_size, symmetric=True, search=False)
        base = Uniform(encode(rotated, grid, self.group_size), grid.scale, self.bits, self.group_size, grid.zero)
        rounding = None if self.activation is None else Activation(columns, self.activation)
        return Result(replace(CompressedWeight(base), input=SiteInput(columns, transform, rounding)))

    def describe(self, shape: tuple[int, int], dtype: str | None = None) -> Described:
        grid = uniform_described(shape, self.bits, self.group_size)
        part: dict[str, Any] = {"format": "input", "transform": {"kind": "hadamard", "block": self.block}}
        if self.activation is not None:
            part["activation"] = {"datatype": self.activation, "per": "token", "symmetric": True, "static": False}
        return Described.exactly({**(grid.spec or {}), "input": part}, grid.most + -(-shape[1] // 32) * 32)


METHOD = Rotated
