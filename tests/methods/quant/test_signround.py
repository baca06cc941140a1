"""SignRound: its closed-form gradients against autograd and against loops, its steps, and what it promises of its results."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from blocks import SmallBlock, dequantized, linear_block, mixing_block
from options import bits_known, function_of
from torch import Tensor

from compress.methods.quant.signround import METHOD, Rounding
from compress.methods.solvers.block_loss import Adam, drawn, gradients, loss
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.uniform_grid import encode, fit
from compress.weights.uniform import Uniform, middle

gptq = function_of("quant/gptq")
signround = function_of("quant/signround")

GROUP = 16
CASES = list(itertools.product([1, 2, 3, 4], [True, False]))


def rounding(bits: int, symmetric: bool, seed: int = 0) -> Rounding:
    """A weight on its way in float64: shifts and ranges are anywhere, so that some weights are clipped at either end."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3 * GROUP, generator=generator, dtype=torch.float64) * 0.05 + 0.01
    found = Rounding.at(weight, fit(weight, bits, GROUP, symmetric=symmetric, search=True), GROUP, None)
    found.shift += 0.4 * torch.randn(found.shift.shape, generator=generator, dtype=torch.float64)
    found.range += 0.2 * torch.randn(found.range.shape, generator=generator, dtype=torch.float64)
    return found


def straight(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the slope of `exact`."""
    return exact + (rounded - exact).detach()


def by_autograd(at: Rounding, shift: Tensor, range_: Tensor) -> Tensor:
    """The weight (out, in) as the equations have it, every rounding with slope 1."""
    top, size = (1 << at.bits) - 1, at.weight.shape[2]
    if at.low is None:
        scale = range_[0] * at.start
        scale = straight(scale, scale.bfloat16().double()).unsqueeze(2)
        x, half = at.weight / scale + shift, middle(at.bits)
        level = straight(x, x.floor() + 0.5 if at.bits == 1 else x.round()).clamp(-half, top - half)
        return (level * scale).flatten(1)
    low, high = range_[0] * at.low, range_[1] * at.start
    scale = (high - low) / top
    scale = straight(scale, scale.bfloat16().double())
    zero = straight(-low / scale, (-low / scale).round()).unsqueeze(2)
    scale = scale.unsqueeze(2)
    x = at.weight / scale + shift
    assert at.weight.shape[2] == size
    return (((straight(x, x.round()) + zero).clamp(0, top) - zero) * scale).flatten(1)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_gradients_are_those_of_rounding_with_slope_one(bits: int, symmetric: bool) -> None:
    at = rounding(bits, symmetric)
    shift, range_ = at.shift.clone().requires_grad_(), at.range.clone().requires_grad_()
    value = by_autograd(at, shift, range_)
    assert torch.allclose(value, at.value(), rtol=1e-12, atol=0)
    given = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(value, [shift, range_], given)
    found = at.gradients(given)
    assert 0.02 < float((found[0] == 0).double().mean()) < 0.9  # some are clipped, some are not
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_is_that_of_the_equations(symmetric: bool) -> None:
    """One step on a linear, without autograd and number by number: the gradient of a mean square, then signs."""
    bits, rate, range_rate = 2, 0.03, 0.02
    generator = torch.Generator().manual_seed(4)
    at = rounding(bits, symmetric)
    rows = torch.randn(7, 3 * GROUP, generator=generator, dtype=torch.float64)
    weight = at.weight.flatten(1)
    block = linear_block(weight, rows)
    value = at.value()
    lost, found, _ = gradients(block, [0], {"w": value})

    # The loss and its gradient by every weight.
    error = [[float((value[o] - weight[o]) @ rows[t]) for o in range(5)] for t in range(7)]
    assert lost == pytest.approx(sum(e * e for row in error for e in row) / 35, rel=1e-5)
    slope = torch.zeros_like(value)
    for o, c in itertools.product(range(5), range(3 * GROUP)):
        slope[o, c] = sum(2 * error[t][o] * float(rows[t, c]) for t in range(7)) / 35
    assert torch.allclose(found["w"], slope, rtol=1e-4, atol=1e-7)

    # Every shift, and every range.
    top = (1 << bits) - 1
    scale, zero = at.grid()
    shift, range_ = at.shift.clone(), at.range.clone()
    for o, g in itertools.product(range(5), range(3)):
        s = float(scale[o, g])
        z = middle(bits) if zero is None else float(zero[o, g])
        by_scale = by_zero = 0.0
        for j in range(GROUP):
            slope_here, w = float(slope[o, g * GROUP + j]), float(at.weight[o, g, j])
            code = round(w / s + float(at.shift[o, g, j])) + z
            q = min(max(code, 0), top) - z
            if 0 <= code <= top:
                shift[o, g, j] -= rate * math.copysign(1, slope_here * s)
                by_scale += slope_here * (q - w / s)
            else:
                by_scale += slope_here * q
                by_zero -= slope_here * s
        if at.low is None:
            range_[0, o, g] -= range_rate / 2 * math.copysign(1, by_scale * float(at.start[o, g]))
            continue
        low0, high0 = float(at.low[o, g]), float(at.start[o, g])
        low = float(at.range[0, o, g]) * low0
        whole = by_scale + by_zero * low / s**2
        for end, by_end in ((0, (-whole / top - by_zero / s) * low0), (1, whole / top * high0)):
            range_[end, o, g] -= range_rate / 2 * ((by_end > 0) - (by_end < 0))
    at.step(slope, rate, range_rate)
    assert torch.allclose(at.shift, shift, rtol=0, atol=1e-12)
    assert torch.allclose(at.range, range_, rtol=0, atol=1e-12)


def test_adam_is_adam() -> None:
    """Directions equal those of the sums written out; where there never was a gradient, nothing moves."""
    adam, past = Adam(torch.zeros(3)), []
    for number in range(1, 6):
        past.append([math.sin(number * (k + 1)) for k in range(2)])
        found = adam.direction(torch.tensor([*past[-1], 0.0]))
        for k in range(2):
            mean = sum(0.1 * 0.9 ** (number - 1 - t) * g[k] for t, g in enumerate(past)) / (1 - 0.9**number)
            square = sum(0.01 * 0.99 ** (number - 1 - t) * g[k] ** 2 for t, g in enumerate(past)) / (1 - 0.99**number)
            assert float(found[k]) == pytest.approx(mean / math.sqrt(square), rel=1e-5)
        assert float(found[2]) == 0.0


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_start_has_the_codes_it_is_given(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 48, generator=generator) * 0.05
    grid = fit(weight, bits, GROUP, symmetric=symmetric, search=True)
    plain = Rounding.at(weight, grid, GROUP, None).part()
    assert torch.equal(plain.codes, encode(weight, grid, GROUP))
    some = torch.randint(0, 1 << bits, weight.shape, generator=generator, dtype=torch.uint8)
    part = Rounding.at(weight, grid, GROUP, some).part()
    assert torch.equal(part.codes, some)
    assert torch.equal(part.scale, grid.scale)
    assert grid.zero is None or torch.equal(part.zero, grid.zero)
    assert torch.equal(Rounding.at(weight, grid, GROUP, plain.codes).shift, torch.zeros(6, 3, GROUP))


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_those_that_are_stored(symmetric: bool) -> None:
    at = rounding(3, symmetric)
    assert torch.equal(at.value().float(), at.part().dequantize())


@pytest.mark.parametrize("start", ["gptq", "mse"])
def test_the_result_is_never_worse_than_its_start(start: Any) -> None:
    """Also when steps are so large that nothing good can come of them; the notes tell the truth."""
    block = mixing_block()
    results = signround(block, bits=2, group_size=GROUP, steps=4, rate=1.0, range_rate=1.0, start=start, evaluations=2)
    begun = signround(block, bits=2, group_size=GROUP, steps=0, start=start)
    for found in (results, begun):
        notes = found["up"].notes
        assert notes["loss"] <= notes["loss_before"]
        assert loss(block, dequantized({k: r.weight for k, r in found.items()})) == pytest.approx(notes["loss"], rel=1e-6)
    assert results["up"].notes["loss_before"] == begun["up"].notes["loss"]
    assert results["up"].notes["best_step"] == 0
    for site in block.sites:
        assert torch.equal(results[site].weight.base.codes, begun[site].weight.base.codes)


def test_start_is_gptqs_solution() -> None:
    from compress.calibration.statistics import Hessian

    block = mixing_block()
    begun = signround(block, bits=2, group_size=GROUP, steps=0)
    for site, stats in block.observe((Hessian,)).items():
        theirs = gptq(block.weight(site), stats[Hessian].matrix(), bits=2, group_size=GROUP).weight.base
        assert torch.equal(begun[site].weight.base.codes, theirs.codes)
        assert torch.equal(begun[site].weight.base.scale, theirs.scale)


@pytest.mark.parametrize(
    ("bits", "symmetric", "rule"), [(2, True, "adam"), (2, False, "adam"), (3, True, "sign"), (2, False, "sign")]
)
def test_training_lowers_the_loss_of_the_block(bits: int, symmetric: bool, rule: Any) -> None:
    block = mixing_block()
    notes = signround(block, bits=bits, group_size=GROUP, symmetric=symmetric, steps=60, start="mse", rule=rule)["up"].notes
    assert notes["loss"] < 0.6 * notes["loss_before"]
    assert block.said[-1] == 1.0


def test_at_two_bits_gptqs_solution_is_improved_on() -> None:
    block = mixing_block(width=64, inner=192, batches=16, tokens=256)
    notes = signround(block, bits=2, group_size=64, steps=100, evaluations=2)["up"].notes
    assert notes["loss"] < 0.95 * notes["loss_before"]


def test_without_tokens_it_stays_at_the_start() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    result = signround(linear_block(weight, torch.zeros(0, 32)), bits=3, group_size=GROUP, steps=5)["w"]
    codes, _, _ = compensated(weight, torch.zeros(32, 32), 3, GROUP, symmetric=True)
    assert torch.equal(result.weight.base.codes, codes)
    assert str(result.notes["fallback"]).startswith("rtn")


def test_an_expert_without_tokens_keeps_its_start() -> None:
    """Its gradient is zero and not missing, and it stays finite."""
    weights = {name: torch.randn(8, 32, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("ab")}
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))
    block = SmallBlock(
        weights, [rows[None]], lambda hidden, w, _: hidden @ w["a"].T, lambda site, batch: batch[0][: 64 * (site == "a")]
    )
    found = signround(block, bits=2, group_size=GROUP, steps=8)
    begun = signround(block, bits=2, group_size=GROUP, steps=0)
    assert torch.equal(found["b"].weight.dequantize(), begun["b"].weight.dequantize())
    assert "fallback" in found["b"].notes
    assert "fallback" not in found["a"].notes


def test_steps_are_drawn_alike_on_any_number_of_ranks() -> None:
    """What two ranks draw together is what one draws, step by step; every round has every batch once."""
    whole = mixing_block(batches=5)
    steps = list(itertools.islice(drawn(whole, 2), 9))
    assert all(sorted(itertools.chain(*steps[k : k + 3])) == list(range(5)) for k in (0, 3, 6))
    assert steps[:3] != steps[3:6]
    parts = []
    for first, count in ((0, 3), (3, 2)):
        part = mixing_block(batches=5)
        part.first, part.batches = first, count
        parts.append([[number + first for number in step] for step in itertools.islice(drawn(part, 2), 9)])
    for mine, one, other in zip(steps, *parts, strict=True):
        assert sorted(mine) == sorted(one + other)


def test_loss_and_gradients_are_means_over_all_outputs_of_all_batches() -> None:
    block = mixing_block(batches=3)
    block._batches[2] = block._batches[2][:1]  # a last batch that is smaller counts less
    block._targets[2] = block._targets[2][:1]
    weights = {site: block.weight(site) * 1.05 for site in block.sites}
    errors = torch.cat([(block.run(b, weights) - t).flatten() for b, t in zip(block._batches, block._targets, strict=True)])
    assert loss(block, weights) == pytest.approx(float(errors.square().mean()), rel=1e-6)
    lost, found, _ = gradients(block, [0, 1, 2], weights)
    assert lost == pytest.approx(loss(block, weights), rel=1e-6)
    nudged = {**weights, "up": weights["up"] + 1e-3 * found["up"]}
    expected = float((found["up"].square().sum() * 1e-3).double())
    assert loss(block, nudged) - loss(block, weights) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_as_announced(symmetric: bool) -> None:
    made = METHOD(bits=3, group_size=GROUP, symmetric=symmetric, steps=2)
    for site, result in made(mixing_block()).items():
        assert isinstance(result.weight.base, Uniform)
        assert bits_known(made, mixing_block().sites[site]) == result.weight.stored_bits
