"""Gauss-Newton rounding: its model against what blocks do, its step against loops, and what it promises of its results."""

from __future__ import annotations

import itertools

import pytest
import torch
from blocks import dequantized, linear_block, mixing_block
from options import bits_known, function_of
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.methods.quant.gaussnewton import METHOD, Linear, corrected
from compress.methods.solvers.block_loss import gradients, loss, moved, probe
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.uniform_grid import stored
from compress.weights.uniform import Uniform, middle

gaussnewton = function_of("quant/gaussnewton")
gptq = function_of("quant/gptq")

GROUP = 8


def linear(rows: int = 5, columns: int = 24, bits: int = 2, symmetric: bool = True, seed: int = 0) -> tuple[Linear, Tensor]:
    """A linear of GPTQ's codes with curvatures of its own, in float64, and a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(200, columns) @ (torch.eye(columns).double() + 0.4 * normal(columns, columns))
    codes, grid, factor = compensated(normal(rows, columns) * 0.05, inputs.T @ inputs, bits, GROUP, symmetric=symmetric)
    lower = torch.linalg.cholesky(factor.hessian)
    curvature = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.2
    return Linear(codes, grid, GROUP, factor.hessian, lower, curvature), normal(rows, columns) * 0.02


def model(at: Linear, gradient: Tensor, mu: float, change: Tensor) -> float:
    """<G, D> + 1/2 sum_r mu k_r D_r H D_r^T, row by row."""
    assert at.curvature is not None
    return sum(
        float(gradient[r] @ change[r] + 0.5 * mu * at.curvature[r] * (change[r] @ at.hessian @ change[r]))
        for r in range(len(change))
    )


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (4, True), (4, False)])
def test_a_step_is_coordinate_descent_on_the_model(bits: int, symmetric: bool) -> None:
    """Code by code and scale by scale against loops, where every one is set to where the model's derivative vanishes."""
    mu = 1.7
    at, gradient = linear(bits=bits, symmetric=symmetric)
    assert at.curvature is not None
    found = at.after(gradient, mu)
    top = (1 << bits) - 1
    for row in range(5):
        strength, now = mu * float(at.curvature[row]), at.value()[row]
        scale, codes = at.grid.scale.double()[row].clone(), at.codes[row].double()
        zero = torch.full((3,), middle(bits)).double() if at.grid.zero is None else at.grid.zero.double()[row]
        value = now.clone()
        for group in range(3):
            span = slice(group * GROUP, (group + 1) * GROUP)

            def slope(value: Tensor = value, row: int = row, strength: float = strength, now: Tensor = now) -> Tensor:
                return gradient[row] + strength * (at.hessian @ (value - now))

            by = torch.zeros(24).double()
            by[span] = codes[span] - zero[group]
            curvature = strength * float(by @ at.hessian @ by)
            if curvature > 0:
                scale[group] = stored(scale[group] - (slope() @ by) / curvature)
            value[span] = (codes[span] - zero[group]) * scale[group]
            for k in range(span.start, span.stop):
                wanted = value[k] - slope()[k] / (strength * at.hessian[k, k])
                codes[k] = (wanted / scale[group] + zero[group]).round().clamp(0, top)
                value[k] = (codes[k] - zero[group]) * scale[group]
        assert torch.equal(found.codes[row].double(), codes)
        assert torch.equal(found.grid.scale.double()[row], scale)
    assert model(at, gradient, mu, found.value() - at.value()) < 0
    assert torch.equal(
        at.after(gradient * 0, mu).codes, Linear(at.codes, at.grid, GROUP, at.hessian, at.lower, at.curvature).codes
    )


def test_the_way_is_the_least_of_the_model() -> None:
    at, gradient = linear()
    best = at.towards(gradient)
    least = model(at, gradient, 1.0, best)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert model(at, gradient, 1.0, best + 0.01 * torch.randn(5, 24, generator=generator).double()) > least
    change = torch.randn(5, 24, generator=generator).double()
    assert at.expected(change) == pytest.approx(model(at, gradient * 0, 1.0, change), rel=1e-12)


def test_a_row_that_does_not_matter_stays() -> None:
    at, gradient = linear()
    assert at.curvature is not None
    curvature = at.curvature.clone()
    curvature[2] = 0
    still = Linear(at.codes, at.grid, GROUP, at.hessian, at.lower, curvature)
    assert torch.equal(still.towards(gradient)[2], torch.zeros(24).double())
    assert torch.isfinite(still.after(gradient, 1.0).value()).all()


def test_curvature_of_a_linear_is_known() -> None:
    """The loss of one linear is mean |D x|^2 over tokens and outputs: k is 2 mean(diag H) / out for every row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 96, generator=generator) @ (torch.eye(96) + 0.1 * torch.randn(96, 96, generator=generator))
    weight = torch.randn(24, 96, generator=generator)
    block = linear_block(weight, rows, 500)
    stats = block.observe((Hessian,))["w"][Hessian]
    codes, grid, factor = compensated(weight, stats.matrix(), 4, 16, symmetric=True)
    at = Linear(codes, grid, 16, factor.hessian, torch.linalg.cholesky(factor.hessian))
    probed, outputs = probe(block, {"w": at.value()})
    assert outputs == 4000 * 24
    found = at.curved(probed["w"], outputs, factor.damp)
    exact = 2 * factor.mean / 24
    assert float(found.mean()) == pytest.approx(exact, rel=0.05)
    assert ((found / exact).log().abs() < 0.6).all()
    # And the model then says what the loss is, for an error of rounding.
    at = Linear(codes, grid, 16, factor.hessian, at.lower, found)
    assert at.expected(at.value() - weight) == pytest.approx(loss(block, {"w": at.value()}), rel=0.1)


def test_what_the_outputs_show_corrects_the_curvature() -> None:
    block = mixing_block()
    linears, values = {}, {}
    for site, stats in block.observe((Hessian,)).items():
        codes, grid, factor = compensated(block.weight(site), stats[Hessian].matrix(), 3, 16, symmetric=True)
        lower = torch.linalg.cholesky(factor.hessian)
        linears[site] = Linear(codes, grid, 16, factor.hessian, lower, torch.full((len(codes),), 1e-6))
        values[site] = linears[site].value()
    by_weight = gradients(block, range(block.batches), values)[1]
    found = corrected(block, linears, by_weight, values)
    for site, at in linears.items():
        way = at.towards(by_weight[site])
        way = way * ((values[site] - block.weight(site)).norm() / way.norm())
        seen = moved(block, values, {site: way}, 4)[site]
        before, after = (block.run(torch.cat(block._batches), w) for w in (values, {**values, site: values[site] + way}))
        assert seen == pytest.approx(float((after - before).square().mean()), rel=1e-4)
        assert found[site].expected(way) == pytest.approx(seen, rel=1e-3)
    strong = {site: Linear(at.codes, at.grid, 16, at.hessian, at.lower, at.curvature * 1e12) for site, at in linears.items()}
    same = corrected(block, strong, by_weight, values)
    assert all(torch.equal(same[site].curvature, strong[site].curvature) for site in same)


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product([2, 3, 4], [True, False])))
def test_the_loss_of_the_block_falls_far_below_gptqs(bits: int, symmetric: bool) -> None:
    block = mixing_block()
    found = gaussnewton(block, bits=bits, group_size=16, symmetric=symmetric, steps=8)
    notes = found["up"].notes
    begun = {}
    for site, stats in block.observe((Hessian,)).items():
        begun[site] = gptq(block.weight(site), stats[Hessian].matrix(), bits=bits, group_size=16, symmetric=symmetric).weight
    assert notes["loss_before"] == pytest.approx(loss(block, dequantized(begun)), rel=1e-5)
    assert notes["loss"] == pytest.approx(loss(block, dequantized({k: r.weight for k, r in found.items()})), rel=1e-6)
    assert notes["loss"] < 0.85 * notes["loss_before"]
    assert block.said[-1] == 1.0


def test_no_step_is_taken_that_does_not_help() -> None:
    """With gradients that point the wrong way the start comes back."""
    block = mixing_block()
    begun = gaussnewton(block, bits=2, group_size=16, steps=0)
    real = block._forward
    block._targets = [real(b, block._weights, block._others) for b in block._batches]

    def backwards(hidden: Tensor, weights: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
        out = real(hidden, weights, others)
        return 2 * out.detach() - out if out.requires_grad else out

    block._forward = backwards  # type: ignore[assignment]
    found = gaussnewton(block, bits=2, group_size=16, steps=3)
    assert found["up"].notes["steps"] == 0
    for site in block.sites:
        assert torch.equal(found[site].weight.base.codes, begun[site].weight.base.codes)
        assert torch.equal(found[site].weight.base.scale, begun[site].weight.base.scale)


def test_probes_of_two_ranks_add_up_to_those_of_one() -> None:
    whole = mixing_block(batches=5)
    weights = {site: whole.weight(site) for site in whole.sites}
    expected, outputs = probe(whole, weights)
    found, count = {site: torch.zeros_like(w) for site, w in weights.items()}, 0
    for first, batches in ((0, 3), (3, 2)):
        part = mixing_block(batches=5)
        part._batches = part._batches[first : first + batches]
        part.first, part.batches = first, batches
        mine, many = probe(part, weights)
        found, count = {site: found[site] + mine[site] for site in found}, count + many
    assert count == outputs
    for site in weights:
        assert torch.allclose(found[site], expected[site], rtol=1e-4, atol=1e-4)


def test_without_tokens_it_stays_at_the_start() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    result = gaussnewton(linear_block(weight, torch.zeros(0, 32)), bits=3, group_size=16)["w"]
    codes, _, _ = compensated(weight, torch.zeros(32, 32), 3, 16, symmetric=True)
    assert torch.equal(result.weight.base.codes, codes)
    assert str(result.notes["fallback"]).startswith("rtn")


@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_as_announced(symmetric: bool) -> None:
    made = METHOD(bits=3, group_size=16, symmetric=symmetric, steps=1)
    for site, result in made(mixing_block()).items():
        assert isinstance(result.weight.base, Uniform)
        assert bits_known(made, mixing_block().sites[site]) == result.weight.stored_bits
