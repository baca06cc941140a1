"""Training through rounding: values and gradients by the equations, codes that move, zeros that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import dequantized, mixing_block
from options import function_of
from weights import random_weight

from compress.calibration.statistics import Hessian
from compress.methods.prune.magnitude import METHOD as Magnitude
from compress.methods.retrain.bqpo import METHOD, Rounded
from compress.methods.solvers.block_loss import loss
from compress.methods.solvers.trainable_weight import DenseBase, Fields
from compress.weights.mask import Bitmask
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

gptq = function_of("quant/gptq")


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_equations(zero: bool, masked: bool) -> None:
    weight = random_weight(6, 32, bits=3, group_size=8, zero=zero)
    assert isinstance(weight.base, Uniform)
    generator = torch.Generator().manual_seed(1)
    if masked:
        weight = CompressedWeight.pruned(weight.base, Bitmask(torch.rand(6, 32, generator=generator) > 0.5))
    dense = weight.dequantize() + 0.02 * torch.randn(6, 32, generator=generator)
    moving, base = Rounded(weight, dense), weight.base
    off = moving.start - base.codes.float().unflatten(1, (-1, 8))
    assert 0.3 < float(off.abs().max()) <= 0.4001
    assert torch.equal(moving.stored().dequantize(), weight.dequantize())
    torch.testing.assert_close(moving.values(), weight.dequantize())
    with torch.no_grad():
        moving.leaves["v"].copy_(2 * torch.randn(6, 4, 8, generator=generator))
        moving.leaves["s"].copy_(0.2 * torch.randn(6, 4, generator=generator))
    given = torch.randn(6, 32, generator=generator)
    values = moving.values()
    values.backward(given)
    places = (moving.start + moving.leaves["v"]).detach().double().flatten(1)
    by_scale = torch.zeros(6, 4, dtype=torch.float64)
    for i in range(6):
        for j in range(32):
            g = j // 8
            scale = float(base.scale[i, g]) + abs(float(base.scale[i, g])) * float(moving.leaves["s"][i, g].detach())
            point = 4.0 if base.zero is None else float(base.zero[i, g])
            code = min(max(round(float(places[i, j])), 0), 7)
            kept = weight.keep is None or bool(weight.keep.mask()[i, j])
            assert float(values[i, j].detach()) == pytest.approx((code - point) * scale if kept else 0.0, rel=1e-4, abs=1e-6)
            inside = 0 <= round(float(places[i, j])) <= 7
            by_place = float(given[i, j]) * scale if kept and inside else 0.0
            assert float(moving.leaves["v"].grad[i, g, j % 8]) == pytest.approx(by_place, rel=1e-4, abs=1e-7)
            if kept:
                by_scale[i, g] += float(given[i, j]) * (code - point) * abs(float(base.scale[i, g]))
    torch.testing.assert_close(moving.leaves["s"].grad.double(), by_scale, rtol=1e-3, atol=1e-4)
    stored = moving.stored()
    if masked:
        assert not stored.dequantize()[~weight.keep.mask()].any()
    assert stored.stored_bits == weight.stored_bits


@pytest.mark.parametrize("options", [None, {"sparsity": 0.5, "group": 8}, {"pattern": "2:4"}], ids=str)
def test_the_loss_falls_below_what_scales_alone_reach(options: dict[str, Any] | None) -> None:
    block = mixing_block()
    before = {}
    for site, stats in block.observe((Hessian,)).items():
        if options is None:
            before[site] = gptq(block.weight(site), stats[Hessian].matrix(), bits=2, group_size=16).weight
        else:
            before[site] = Magnitude(bits=3, group_size=8, **options)(block.weight(site), {}).weight
    tuned = METHOD(epochs=12, relative_rate=1e-2)(block, before)
    changed = False
    for site, weight in tuned.weights.items():
        changed |= not torch.equal(weight.base.codes, before[site].base.codes)
        assert weight.stored_bits == before[site].stored_bits
        assert weight.keep is before[site].keep
    assert changed
    assert loss(block, dequantized(tuned.weights), tuned.others) < 0.9 * loss(block, dequantized(before))


def test_what_has_no_single_grid_moves_as_it_can() -> None:
    block, generator = mixing_block(), torch.Generator()
    scattered = random_weight(16, 32, desc_act=True, group_size=16)
    assert isinstance(METHOD().trainable(scattered, scattered.dequantize(), None, generator), Fields)
    dense = Magnitude()(block.weight("up"), {}).weight
    assert isinstance(METHOD().trainable(dense, block.weight("up"), None, generator), DenseBase)
    assert METHOD().path == "retrain/bqpo"
