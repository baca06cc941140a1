"""Training of scales, offsets and norms: gradients, what moves and what stays, and that it never makes things worse."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from blocks import SmallBlock, dequantized, mixing_block
from options import function_of
from pydantic import ValidationError
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.methods.solvers.block_loss import loss
from compress.methods.tune.grid import METHOD, Master, Weight
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

decoupleq = function_of("quant/decoupleq")
gptq = function_of("quant/gptq")
grid = function_of("tune/grid")

GROUP = 16


def compressed(block: SmallBlock, bits: int = 2, offsets: bool = False) -> dict[str, CompressedWeight]:
    found = {}
    for site, stats in block.observe((Hessian,)).items():
        method = decoupleq if offsets else gptq
        found[site] = method(block.weight(site), stats[Hessian].matrix(), bits=bits, group_size=GROUP).weight
    return found


@pytest.mark.parametrize(("bits", "offsets"), [(2, False), (2, True), (3, False), (3, True)])
def test_training_lowers_the_loss_and_keeps_codes_and_sizes(bits: int, offsets: bool) -> None:
    block = mixing_block()
    before = compressed(block, bits, offsets)
    tuned = grid(block, before, epochs=4)
    assert set(tuned.weights) == set(before)
    assert set(tuned.others) == {"norm.weight", "down.bias"}
    for site, weight in tuned.weights.items():
        mine, theirs = weight.base, before[site].base
        assert torch.equal(mine.codes, theirs.codes)
        assert weight.stored_bits == before[site].stored_bits
        assert mine.scale.dtype == torch.bfloat16
        assert not torch.equal(mine.scale, theirs.scale)
        assert (mine.offset is None) == (not offsets)
        assert not offsets or (mine.offset.dtype == torch.bfloat16 and not torch.equal(mine.offset, theirs.offset))
    start, end = loss(block, dequantized(before)), loss(block, dequantized(tuned.weights), tuned.others)
    assert tuned.notes["loss_before"] == pytest.approx(start, rel=1e-6)
    assert tuned.notes["loss"] == pytest.approx(end, rel=1e-6)
    assert end < 0.9 * start
    assert block.said[-1] == 1.0


def test_it_never_makes_things_worse() -> None:
    """Steps that are far too large leave everything as it came."""
    block = mixing_block()
    tuned = grid(block, compressed(block), epochs=2, rate=1.0)
    assert tuned.notes["best_epoch"] == 0
    assert tuned.notes["loss"] == tuned.notes["loss_before"]
    assert not tuned.weights
    assert not tuned.others


def test_others_are_judged_as_they_are_stored() -> None:
    """Norms are stored coarsely here: what is returned are values that this dtype holds, and the loss is that of them."""
    block = mixing_block()
    block._stored_as = torch.float8_e4m3fn
    tuned = grid(block, compressed(block), epochs=4)
    for value in tuned.others.values():
        assert torch.equal(value, value.to(torch.float8_e4m3fn).float())
    assert tuned.notes["loss"] == pytest.approx(loss(block, dequantized(tuned.weights), tuned.others), rel=1e-6)
    assert tuned.notes["loss"] <= tuned.notes["loss_before"]


@pytest.mark.parametrize(
    ("norms", "biases", "names"), [(True, False, {"norm.weight"}), (False, True, {"down.bias"}), (False, False, set())]
)
def test_norms_and_biases_move_where_they_are_wanted(norms: bool, biases: bool, names: set[str]) -> None:
    block = mixing_block()
    assert set(grid(block, compressed(block), epochs=1, norms=norms, biases=biases).others) == names


@pytest.mark.parametrize("offsets", [False, True])
def test_a_step_is_that_of_the_equations(offsets: bool) -> None:
    """The gradient by a scale is the sum over its group of (code - zero) times that by the weight, an offset's the plain sum."""
    weight = compressed(mixing_block(), 3, offsets)["up"]
    moving, base = Weight(weight), weight.base
    assert isinstance(base, Uniform)
    given = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    moving.step(given, 0.01)
    for row in range(0, weight.shape[0], 9):
        for group in range(weight.shape[1] // GROUP):
            unit = abs(float(base.scale[row, group]))
            by_scale = by_offset = 0.0
            for j in range(group * GROUP, (group + 1) * GROUP):
                zero = 4 if base.zero is None else int(base.zero[row, group])
                by_scale += float(given[row, j]) * (int(base.codes[row, j]) - zero)
                by_offset += float(given[row, j])
            # Adam's first step is the sign of the gradient.
            scale = float(base.scale[row, group]) - 0.01 * unit * (1 if by_scale > 0 else -1)
            assert float(moving.masters["scale"].value()[row, group]) == pytest.approx(scale, rel=1e-6)
            if offsets:
                assert base.offset is not None
                offset = float(base.offset[row, group]) - 0.01 * unit * (1 if by_offset > 0 else -1)
                assert float(moving.masters["offset"].value()[row, group]) == pytest.approx(offset, rel=1e-5, abs=1e-9)
    stored = moving.stored().base
    assert torch.equal(stored.scale, moving.masters["scale"].value().bfloat16())


@dataclass(frozen=True, eq=False)
class Steps:
    """A part whose values cannot be differentiated by its scale."""

    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], self.scale.shape[1]

    @property
    def stored_bits(self) -> int:
        return self.scale.numel() * 16

    def dequantize(self) -> Tensor:
        return self.scale.float().sign()

    def rows(self, start: int, stop: int) -> Steps:
        return Steps(self.scale[start:stop])


@dataclass(frozen=True, eq=False)
class Doubled(Steps):
    """A part of another kind whose values are linear in its scale."""

    def dequantize(self) -> Tensor:
        return self.scale.float() * 2


def test_parts_that_cannot_be_trained_stay_and_are_named() -> None:
    block = mixing_block()
    before = compressed(block)
    weight = before["up"]
    before["up"] = CompressedWeight(Doubled((block.weight("up") / 2).bfloat16()))
    assert set(grid(block, before, epochs=1).weights) == {"up", "down"}
    for base in (Steps(block.weight("up").bfloat16()), Doubled(torch.ones(64, 32, dtype=torch.int8))):
        tuned = grid(block, before | {"up": CompressedWeight(base)}, epochs=1)
        assert set(tuned.weights) <= {"down"}
        assert tuned.notes["fixed"] == ["up"]
    assert "fixed" not in grid(block, before | {"up": weight}, epochs=1).notes


def test_outliers_stay_and_count() -> None:
    block = mixing_block()
    before = compressed(block)
    extra = Uniform(torch.full((64, 32), 2, dtype=torch.uint8), torch.full((64, 1), 0.01).bfloat16(), 2, 32)
    extra.codes[3, 4] = 3
    before["up"] = CompressedWeight(before["up"].base, extra)
    tuned = grid(block, before, epochs=2)
    assert tuned.weights["up"].outliers is extra
    assert tuned.notes["loss_before"] == pytest.approx(loss(block, dequantized(before)), rel=1e-6)


def test_without_tokens_nothing_moves() -> None:
    block = mixing_block(batches=0)
    weights = compressed(mixing_block())
    tuned = grid(block, weights)
    assert (tuned.weights, tuned.others, tuned.notes) == ({}, {}, {})


def test_a_master_that_does_not_move_is_what_it_was() -> None:
    value = torch.randn(4, 3).bfloat16()
    assert torch.equal(Master(value, value.abs()).value().bfloat16(), value)
    before = compressed(mixing_block())["up"]
    assert torch.equal(Weight(before).values(), before.dequantize())
    assert torch.equal(Weight(before).stored().dequantize(), before.dequantize())
    scattered = replace(before.base, group=torch.arange(32).remainder(2).to(torch.uint8))
    assert set(Weight(CompressedWeight(scattered)).masters) == {"scale"}


def test_options_are_checked() -> None:
    assert METHOD().path == "tune/grid"
    assert METHOD().compares
    for wrong in ({"epochs": 0}, {"rate": 0}, {"nonsense": 1}):
        with pytest.raises(ValidationError):
            METHOD(**wrong)
