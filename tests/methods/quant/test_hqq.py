"""HQQ against a slow reference in terms of zero points, against a loop with one stop for all, and the laws of its results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import bits_known, function_of
from pydantic import ValidationError
from roundtrip import assert_round_trip
from runs import steps
from thorough import times
from torch import Tensor

from compress.methods.quant.hqq import METHOD
from compress.weights.uniform import Uniform

hqq = function_of("quant/hqq")

law = settings(max_examples=times(15, 60), deadline=None, derandomize=True)
BITS = range(1, 9)


def random(rows: int, columns: int, seed: int = 0, tail: float = 0.5) -> Tensor:
    """Weights with some far from the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight * torch.exp(tail * torch.randn(rows, columns, generator=generator, dtype=torch.float64)) * 0.05


def bfloat16(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item()


# ---------------------------------------------------------------------------------------------------- the slow reference


def rounded(group: Tensor, scale: float, zero: float, bits: int) -> Tensor:
    """The codes nearest to w / s + z."""
    return (group / scale + zero).round().clamp(0, 2**bits - 1)


def norm(group: Tensor, scale: float, zero: float, bits: int, p: float) -> float:
    """sum |(w - q) / s|^p with codes from w / s + z."""
    left = group / scale + zero - rounded(group, scale, zero, bits)
    return float(left.abs().pow(p).sum())


def shrunk(error: float, p: float, beta: float) -> float:
    """The generalised soft threshold of one error."""
    if error == 0:
        return 0.0
    size = max(abs(error) - abs(error) ** (p - 1) / beta, 0.0)
    return size if error > 0 else -size


def first_grid(group: Tensor, bits: int) -> tuple[float, float]:
    """Scale and zero point that reach from the lowest weight to the highest, where (middle - z) s is a bfloat16."""
    low, high, top = group.min().item(), group.max().item(), 2**bits - 1
    middle = 2 ** (bits - 1) if bits > 1 else 0.5
    offset = bfloat16(low + middle * (high - low) / top)
    scale = bfloat16(max((offset - low) / middle, (high - offset) / (top - middle), 2.0**-60))
    return scale, middle - offset / scale


def as_stored(zero: float, scale: float, bits: int) -> float:
    """A zero point whose offset (middle - z) s is a bfloat16."""
    middle = 2 ** (bits - 1) if bits > 1 else 0.5
    return middle - bfloat16((middle - zero) * scale) / scale


def next_zero(group: Tensor, scale: float, zero: float, bits: int, p: float, beta: float) -> float:
    """z = mean( q - (w - e) / s ), all in steps."""
    codes, total = rounded(group, scale, zero, bits), 0.0
    for weight, code in zip(group.tolist(), codes.tolist(), strict=True):
        kept = shrunk(weight / scale - (code - zero), p, beta)
        total += code - (weight / scale - kept)
    return total / len(group)


def reference(
    weight: Tensor, *, bits: int, group_size: int, p: float, beta: float, kappa: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (out, in), scale and zero (out, groups)."""
    size = weight.shape[1] if group_size == -1 else group_size
    codes, groups = torch.empty_like(weight), weight.shape[1] // size
    scales, zeros = weight.new_empty(len(weight), groups), weight.new_empty(len(weight), groups)
    for row, g in itertools.product(range(len(weight)), range(groups)):
        group = weight[row, g * size : (g + 1) * size]
        scale, zero = first_grid(group, bits)
        best, least = zero, norm(group, scale, zero, bits, p)
        for step in range(iterations):
            zero = as_stored(next_zero(group, scale, zero, bits, p, beta * kappa**step), scale, bits)
            if norm(group, scale, zero, bits, p) < least:
                best, least = zero, norm(group, scale, zero, bits, p)
        codes[row, g * size : (g + 1) * size] = rounded(group, scale, best, bits)
        scales[row, g], zeros[row, g] = scale, best
    return codes, scales, zeros


def part(weight: Tensor, **options: Any) -> Uniform:
    base = hqq(weight, **options).weight.base
    assert isinstance(base, Uniform)
    return base


def zero_of(base: Uniform) -> Tensor:
    """The zero points (out, groups) in float64."""
    assert base.offset is not None
    return (2 ** (base.bits - 1) if base.bits > 1 else 0.5) - base.offset.double() / base.scale.double()


def losses(weight: Tensor, base: Uniform, p: float = 0.7) -> Tensor:
    """sum |(w - q) / s|^p of each group, (out, groups), from what is stored."""
    scale = base.scale.double().unsqueeze(2)
    codes = base.codes.double().unflatten(1, (-1, base.group_size))
    left = weight.double().unflatten(1, (-1, base.group_size)) / scale - (codes - zero_of(base).unsqueeze(2))
    return left.abs().pow(p).sum(2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, -1])
def test_equals_the_reference_code_for_code(bits: int, group_size: int) -> None:
    weight = random(5, 48, seed=bits)
    for p, beta, kappa, iterations in ((0.7, 10.0, 1.01, 20), (0.5, 3.0, 1.2, 7), (0.9, 5.0, 1.0, 10), (0.7, 10.0, 1.01, 0)):
        options: dict[str, Any] = {"p": p, "beta": beta, "kappa": kappa, "iterations": iterations}
        codes, scale, zero = reference(weight, bits=bits, group_size=group_size, **options)
        base = part(weight, bits=bits, group_size=group_size, **options)
        assert torch.equal(base.scale.double(), scale), options
        torch.testing.assert_close(zero_of(base), zero, rtol=1e-12, atol=1e-12)
        assert torch.equal(base.codes.double(), codes), options
        assert base.zero is None
        assert not base.bipolar


def test_equals_the_reference_under_the_sum_of_absolute_errors() -> None:
    """p = 1, in groups of odd size: in others the sum may be flat between two weights, and the offset is one of many."""
    weight = random(5, 45, seed=1)
    for bits in BITS:
        options: dict[str, Any] = {"bits": bits, "group_size": 5, "p": 1.0, "beta": 5.0, "kappa": 1.05, "iterations": 10}
        codes, _, zero = reference(weight, **options)
        base = part(weight, **options)
        torch.testing.assert_close(zero_of(base), zero, rtol=1e-12, atol=1e-12)
        assert torch.equal(base.codes.double(), codes)


def test_what_is_decoded_is_the_nearest_of_the_stored_grid() -> None:
    weight = random(20, 64).float()
    for bits in BITS:
        base = part(weight, bits=bits, group_size=16)
        assert base.offset is not None
        points = torch.arange(2**bits) - (2 ** (bits - 1) if bits > 1 else 0.5)
        points = points * base.scale.float().unsqueeze(2) + base.offset.float().unsqueeze(2)  # (out, groups, codes)
        distance = (weight.unflatten(1, (-1, 16)).unsqueeze(3) - points.unsqueeze(2)).abs().amin(3).flatten(1)
        torch.testing.assert_close((weight - base.dequantize()).abs(), distance, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------------- the loop done without


def loop_with_one_stop(weight: Tensor, bits: int, size: int, *, iterations: int = 20, p: float = 0.7) -> Tensor:
    """The zero points (out, groups) of the public implementation's loop, around the same steps.

    It stops for all groups when the mean error over the whole matrix rises, returns the zero points of the last update, which is
    two after the best one, and leaves beta as it is.
    """
    groups = list(weight.reshape(-1, size))
    grids = [first_grid(group, bits) for group in groups]
    scales, zeros = [scale for scale, _ in grids], [zero for _, zero in grids]
    least = float("inf")
    for _ in range(iterations):
        left = [
            scale * (group / scale + zero - rounded(group, scale, zero, bits)).abs()
            for group, scale, zero in zip(groups, scales, zeros, strict=True)
        ]
        zeros = [next_zero(g, s, z, bits, p, 10.0) for g, s, z in zip(groups, scales, zeros, strict=True)]
        error = float(torch.cat(left).mean())
        if error >= least:
            break
        least = error
    return torch.tensor(zeros, dtype=torch.float64).view(len(weight), -1)


def test_every_group_keeps_its_best_where_one_stop_for_all_does_not() -> None:
    weight = random(40, 64)
    for bits in (2, 3, 4):
        ours = part(weight, bits=bits, group_size=16)
        zeros = loop_with_one_stop(weight, bits, 16)
        theirs = torch.tensor(
            [
                [norm(weight[r, g * 16 : g * 16 + 16], float(ours.scale[r, g]), float(zeros[r, g]), bits, 0.7) for g in range(4)]
                for r in range(40)
            ],
            dtype=torch.float64,
        )
        first = losses(weight, part(weight, bits=bits, group_size=16, iterations=0))
        assert (losses(weight, ours) <= first).all()
        assert (theirs > first).any()  # there, some groups end worse than they began
        assert (losses(weight, ours) < theirs - 1e-9).double().mean() > 0.3
        # A zero point that is no bfloat16 is what little is better there.
        assert losses(weight, ours).mean() < theirs.mean()


def test_a_group_does_not_depend_on_the_others() -> None:
    """With one stop for the whole matrix it does."""
    weight = random(12, 64, seed=2)
    weight[2:] *= 40
    together, alone = part(weight, bits=3, group_size=16), part(weight[:2], bits=3, group_size=16)
    assert together.offset is not None
    assert alone.offset is not None
    assert torch.equal(together.offset[:2], alone.offset)
    assert torch.equal(together.codes[:2], alone.codes)
    assert not torch.equal(loop_with_one_stop(weight, 3, 16)[:2], loop_with_one_stop(weight[:2], 3, 16))


def test_kappa_counts() -> None:
    weight = random(40, 64)
    found = [part(weight, bits=3, group_size=16, kappa=kappa).offset for kappa in (1.0, 1.01, 1.3)]
    assert all(x is not None and y is not None and not torch.equal(x, y) for x, y in itertools.pairwise(found))


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**-6, 2.0**12])
def test_codes_do_not_depend_on_the_unit_of_the_weights(factor: float) -> None:
    """The penalty is in steps of the grid; and no range is too narrow, where the public implementation takes 1e-4 for none."""
    weight = random(10, 64)
    for bits in (1, 3, 8):
        base, other = part(weight, bits=bits, group_size=16), part(weight * factor, bits=bits, group_size=16)
        assert torch.equal(base.codes, other.codes)
        assert torch.equal(base.scale * factor, other.scale)


@law
@given(
    bits=st.integers(1, 8),
    size=st.sampled_from([1, 4, 16, 48]),
    p=st.sampled_from([0.3, 0.7, 1.0]),
    beta=st.sampled_from([0.01, 1.0, 10.0, 1000.0]),
    tail=st.sampled_from([0.0, 0.5, 1.5]),
    single=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_the_first_grid(
    bits: int, size: int, p: float, beta: float, tail: float, single: bool, seed: int
) -> None:
    weight = random(4, 48, seed, tail)
    weight = weight.float() if single else weight
    first = part(weight, bits=bits, group_size=size, p=p, beta=beta, iterations=0)
    last = part(weight, bits=bits, group_size=size, p=p, beta=beta)
    assert torch.equal(first.scale, last.scale)
    slack = 1e-4 if single else 1e-9
    assert (losses(weight, last, p) <= losses(weight, first, p) * (1 + slack) + slack * size).all()


def test_more_iterations_are_never_worse_and_the_error_falls() -> None:
    weight = random(64, 128)
    found = [losses(weight, part(weight, bits=3, group_size=32, iterations=n)) for n in (0, 1, 5, 20, 60)]
    assert all((after <= before).all() for before, after in itertools.pairwise(found))
    assert found[3].mean() < 0.97 * found[0].mean()


# ---------------------------------------------------------------------------------------------------- offsets in bfloat16


def exact(weight: Tensor, bits: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The losses (out, groups) with zero points that are not rounded."""
    found = []
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "as_stored", lambda zero, scale, bits: zero)
        _, scales, zeros = reference(weight, bits=bits, group_size=size, p=0.7, beta=10.0, kappa=1.01, iterations=20)
    for row, g in itertools.product(range(len(weight)), range(weight.shape[1] // size)):
        group = weight[row, g * size : (g + 1) * size]
        found.append(norm(group, float(scales[row, g]), float(zeros[row, g]), bits, 0.7))
    return torch.tensor(found, dtype=torch.float64).view(len(weight), -1)


@pytest.mark.parametrize(("bits", "lost"), [(1, 0.002), (2, 0.002), (3, 0.003), (4, 0.005), (8, 0.05)])
def test_offsets_in_bfloat16_lose_little(bits: int, lost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to speak of up to four bits; at eight, a bfloat16 is as coarse as the steps, and the search has little to find."""
    weight = random(24, 256)
    stored, free = losses(weight, part(weight, bits=bits, group_size=64)), exact(weight, bits, 64, monkeypatch)
    assert abs(float(stored.mean() / free.mean()) - 1) < lost


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("centre", [1.0, -0.7, 300.0])
def test_a_narrow_group_far_from_zero_keeps_its_steps(bits: int, centre: float) -> None:
    """The scale reaches both ends from where the rounded offset lies: at most twice its steps, at worst by a bfloat16's 2^-9."""
    spread = random(8, 64, tail=0.0)
    for width in (1.0, 0.01, 1e-4):
        weight = centre + width * spread
        base = part(weight, bits=bits, group_size=64)
        reach = (weight.amax(1) - weight.amin(1)) / (2**bits - 1) / 2 + 2.0**-8 * abs(centre) / (2**bits - 1)
        values = base.codes.double() - zero_of(base)
        decoded = values * base.scale.double()
        first = part(weight, bits=bits, group_size=64, iterations=0)
        covered = ((first.codes.double() - zero_of(first)) * first.scale.double() - weight).abs().amax(1)
        assert (covered <= reach * 1.02 + 2.0**-9 * (2**bits) * reach).all()
        assert (decoded - weight).abs().mean() < reach.mean()


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, -3.0, 1e12])
def test_constant_groups(bits: int, value: float) -> None:
    for dtype in (torch.float32, torch.float64):
        weight = torch.full((2, 8), value, dtype=dtype)
        decoded = part(weight, bits=bits, group_size=4).dequantize().to(dtype)
        assert torch.isfinite(decoded).all()
        # Twice the bits of a bfloat16: what the offset misses is a step, but for the middle of an odd number of steps.
        assert (decoded - weight).abs().max() <= max(abs(value) * 2.0**-16, 1e-17)


def test_a_group_of_zeros_stays_exactly_zero_from_two_bits_on() -> None:
    weight = random(4, 32)
    weight[:, 8:16] = 0
    for bits in range(2, 9):
        assert (part(weight, bits=bits, group_size=8).dequantize()[:, 8:16] == 0).all()


# ---------------------------------------------------------------------------------------------------- options and the whole


def test_weights_of_other_dtypes_round_like_their_values() -> None:
    weight = random(4, 32).to(torch.bfloat16)
    assert torch.equal(part(weight, group_size=16).codes, part(weight.float(), group_size=16).codes)


def test_rows_are_worked_on_in_pieces_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(33, 64).float()
    whole = part(weight, bits=3, group_size=16)
    monkeypatch.setattr("compress.methods.quant.hqq._CHUNK", 5 * 64)
    pieces = part(weight, bits=3, group_size=16)
    assert torch.equal(whole.codes, pieces.codes)
    assert whole.offset is not None
    assert pieces.offset is not None
    assert torch.equal(whole.offset, pieces.offset)


def test_options() -> None:
    assert METHOD().model_dump() == {"bits": 4, "group_size": 64, "p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20}
    refused: list[dict[str, Any]] = [
        {"bits": 0},
        {"bits": 9},
        {"group_size": -2},
        {"p": 0.0},
        {"p": 1.1},
        {"beta": 0.0},
        {"kappa": 0.9},
        {"iterations": -1},
        {"axis": 0},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    assert METHOD.may_need == ()
    assert METHOD(group_size=48).check((8, 96)) is None
    assert "group_size=40" in (METHOD(group_size=40).check((8, 96)) or "")


@pytest.mark.parametrize("options", [{}, {"group_size": -1}, {"bits": 3, "group_size": 4}])
def test_stored_bits_are_known_beforehand(options: dict[str, Any]) -> None:
    method, weight = METHOD(**options), random(12, 256)
    size = options.get("group_size", 64)
    bits = 12 * (256 * method.bits + 32 * (1 if size == -1 else 256 // size))
    assert bits_known(method, (12, 256)) == method(weight, {}).weight.stored_bits == bits


def test_from_recipe_to_logits(tiny: Callable[..., Path], tmp_path: Path) -> None:
    summary = assert_round_trip(tiny("llama"), tmp_path, None, steps("quant/hqq", bits=3, group_size=16))
    assert summary["bits_per_compressed_weight"] == 5.0
