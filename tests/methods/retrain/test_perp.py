"""PERP: factors as in the equations, zeros that stay zeros, a loss that falls, and runs that can be stopped and shared."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blocks import SmallBlock, dequantized, mixing_block
from options import function_of
from pydantic import ValidationError
from ranks import two_ranks
from runs import compress as run
from runs import digests, steps
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.checkpoint.packed_source import PackedSource
from compress.methods.prune.magnitude import METHOD as Magnitude
from compress.methods.retrain.perp import METHOD
from compress.methods.solvers.block_loss import loss
from compress.methods.solvers.block_training import advance, optimizer, pace
from compress.methods.solvers.trainable_weight import Bound, DenseBase, Factors, LowRankAdapter, factors
from compress.report.rows import read_rows
from compress.weights.dense import Dense
from compress.weights.low_rank import LowRank
from compress.weights.mask import Bitmask
from compress.weights.weight import CompressedWeight

gptq = function_of("quant/gptq")

Tiny = Callable[..., Path]
MERGED = ("mask_lora", "scale_lora", "lora_prune", "full")


def pruned(block: SmallBlock, **options: Any) -> dict[str, CompressedWeight]:
    made = Magnitude(**(options or {"sparsity": 0.6}))
    return {site: made(block.weight(site), {}).weight for site in block.sites}


def kept(variant: Any, seed: int = 0) -> tuple[DenseBase, Tensor, Tensor]:
    """A moving weight in float32, and what float64 references are made of: values and mask."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12, 20, generator=generator)
    keep = torch.rand(12, 20, generator=generator) > 0.5
    weight = CompressedWeight.pruned(Dense(values), Bitmask(keep))
    return DenseBase(weight, variant, 4, 8.0, generator), values.double() * keep, keep.double()


def reference(variant: str, values: Tensor, keep: Tensor, up: Tensor, down: Tensor, stored: bool) -> Tensor:
    """W + c M (BA), W (1 + c BA) and W + c BA, element by element in float64."""
    found = torch.zeros_like(values)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            product = 2.0 * sum(float(up[i, k]) * float(down[k, j]) for k in range(up.shape[1]))
            if variant == "scale_lora":
                found[i, j] = values[i, j] * (1 + product)
            else:
                masked = variant == "mask_lora" or stored
                found[i, j] = values[i, j] + product * (float(keep[i, j]) if masked else 1.0)
    return found


@pytest.mark.parametrize("variant", ["mask_lora", "scale_lora", "lora_prune"])
def test_weights_and_gradients_are_those_of_the_equations(variant: str) -> None:
    moving, values, keep = kept(variant)
    assert torch.equal(moving.values().double(), values)
    up, down = moving.leaves["up"], moving.leaves["down"]
    with torch.no_grad():
        up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(1)))
    fixed = up.detach(), down.detach()
    expected = reference(variant, values, keep, *fixed, stored=False)
    torch.testing.assert_close(moving.values().double(), expected, rtol=1e-5, atol=1e-5)
    merged = reference(variant, values, keep, *fixed, stored=True)
    torch.testing.assert_close(moving.stored().dequantize().double(), merged, rtol=1e-5, atol=1e-5)
    given = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    moving.values().backward(given)
    through = {"mask_lora": given.double() * keep, "scale_lora": given.double() * values, "lora_prune": given.double()}[variant]
    torch.testing.assert_close(up.grad.double(), 2 * through @ down.double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(down.grad.double(), 2 * up.double().T @ through, rtol=1e-5, atol=1e-5)


def test_all_kept_weights_move_and_no_other() -> None:
    moving, values, keep = kept("full")
    assert torch.equal(moving.values().double(), values)
    with torch.no_grad():
        moving.leaves["p"].fill_(1.0)
    unit = (values.square().sum() / keep.sum()).sqrt()
    torch.testing.assert_close(moving.values().double(), (values + unit) * keep, rtol=1e-5, atol=1e-6)
    moving.values().sum().backward()
    assert torch.equal(moving.leaves["p"].grad != 0, keep.bool())


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.5, "group": 8}], ids=str)
@pytest.mark.parametrize("variant", MERGED)
def test_zeros_stay_zeros_in_the_same_bits_and_the_loss_falls(variant: str, target: dict[str, Any]) -> None:
    block = mixing_block()
    before = pruned(block, **target)
    tuned = METHOD(weights=variant, rank=4, alpha=8, rate=2e-2, relative_rate=2e-2)(block, before)
    assert set(tuned.weights) == set(before)
    assert set(tuned.others) == {"norm.weight", "down.bias"}
    for site, weight in tuned.weights.items():
        mask = before[site].keep.mask()
        assert weight.keep is before[site].keep
        assert weight.stored_bits == before[site].stored_bits
        assert weight.base.values.dtype == before[site].base.values.dtype
        decoded = weight.dequantize()
        assert not decoded[~mask].view(torch.int32).any()
        assert (decoded - before[site].dequantize())[mask].abs().max() > 0
    start, end = loss(block, dequantized(before)), loss(block, dequantized(tuned.weights), tuned.others)
    assert tuned.notes["loss_before"] == pytest.approx(start, rel=1e-6)
    assert tuned.notes["loss"] == pytest.approx(end, rel=1e-6)
    assert end < 0.8 * start
    assert block.said[-1] == 1.0


def test_factors_beside_a_weight_are_stored_and_counted() -> None:
    block = mixing_block()
    before = pruned(block)
    method = METHOD(weights="lora", rank=4, alpha=8, rate=2e-2, norms=False, biases=False)
    tuned = method(block, before)
    for site, weight in tuned.weights.items():
        assert isinstance(weight.low_rank, LowRank)
        assert weight.low_rank.left.dtype == torch.bfloat16
        assert torch.equal(weight.base.values, before[site].base.values)
        assert weight.stored_bits == before[site].stored_bits + method.added_bits(weight.shape)
    assert tuned.notes["loss"] < 0.8 * tuned.notes["loss_before"]
    again = method(block, tuned.weights)  # factors that are there already move on
    assert all(again.weights[s].stored_bits == w.stored_bits for s, w in tuned.weights.items())
    assert again.notes["loss"] < tuned.notes["loss"]


def test_of_codes_only_scales_move() -> None:
    block = mixing_block()
    found = block.observe((Hessian,))
    before = {s: gptq(block.weight(s), stats[Hessian].matrix(), bits=2, group_size=16).weight for s, stats in found.items()}
    tuned = METHOD(relative_rate=1e-2)(block, before)
    for site, weight in tuned.weights.items():
        assert torch.equal(weight.base.codes, before[site].base.codes)
        assert not torch.equal(weight.base.scale, before[site].base.scale)
    assert tuned.notes["loss"] < 0.9 * tuned.notes["loss_before"]
    still = METHOD(scales=False)(block, before)
    assert not still.weights
    assert still.notes["fixed"] == ["down", "up"]


def test_the_target_can_be_what_the_original_block_gives_for_the_same_inputs() -> None:
    """Then a block that was not compressed has nothing to learn, whatever enters it."""
    block = mixing_block()
    block._targets = [target + 1 for target in block._targets]
    dense = {site: CompressedWeight(Dense(block.weight(site))) for site in block.sites}
    assert METHOD(original=0.0)(block, dense).notes["loss_before"] == 0.0
    assert METHOD(original=1.0, epochs=1)(block, dense).notes["loss_before"] == pytest.approx(1.0)
    assert METHOD(original=0.5, epochs=1)(block, dense).notes["loss_before"] == pytest.approx(0.25)


def test_it_never_makes_things_worse() -> None:
    block = mixing_block()
    tuned = METHOD(rate=1.0, relative_rate=1.0, epochs=1)(block, pruned(block))
    assert tuned.notes["best_epoch"] == 0
    assert (tuned.weights, tuned.others) == ({}, {})


def test_without_tokens_nothing_moves() -> None:
    tuned = METHOD()(mixing_block(batches=0), pruned(mixing_block()))
    assert (tuned.weights, tuned.others, tuned.notes) == ({}, {}, {})


def test_the_pace_rises_and_falls() -> None:
    rates = [pace(step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(1 / 18)


def test_factors_and_vectors_have_rates_of_their_own() -> None:
    moving, _, _ = kept("mask_lora")
    full, _, _ = kept("full")
    adam = optimizer([moving, full], 1e-3, 1e-2)
    for m in (moving, full):
        for value in m.leaves.values():
            value.grad = torch.ones_like(value)
    before = moving.state(), full.state()
    advance(adam, [moving, full], 1, 20)
    assert float((before[0]["down"] - moving.leaves["down"]).mean()) == pytest.approx(1e-3, rel=1e-3)
    assert float((before[1]["p"] - full.leaves["p"]).mean()) == pytest.approx(1e-2, rel=1e-3)
    moving.restore(before[0])
    assert torch.equal(moving.leaves["down"], before[0]["down"])


def test_factors_start_as_those_of_lora() -> None:
    found = factors(torch.zeros(8, 64), 4, torch.Generator().manual_seed(0))
    assert not found["up"].any()
    assert 0.1 < float(found["down"].detach().abs().max()) <= 64**-0.5
    beside = LowRankAdapter(CompressedWeight(Dense(torch.ones(8, 64))), 4, 8.0, torch.Generator().manual_seed(0))
    assert torch.equal(beside.values(), torch.ones(8, 64))


RECIPE: dict[str, Any] = {"tuning": [{"method": "retrain/perp", "options": {"epochs": 2, "rank": 4, "rate": 1e-2}}]}
STEPS = steps("prune/magnitude", sparsity=0.6)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_run_keeps_masks_and_lowers_losses(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    run(tiny(family), tmp_path / "plain", ids, STEPS)
    run(tiny(family), tmp_path / "out", ids, STEPS, **RECIPE, reload=True)
    plain, source = (PackedSource.open_packed(tmp_path / name) for name in ("plain", "out"))
    for row in read_rows(tmp_path / "out" / "report.jsonl"):
        before, after = plain.compressed(row.site), source.compressed(row.site)
        assert torch.equal(before.keep.mask(), after.keep.mask())
        assert not after.dequantize()[~after.keep.mask()].any()
        assert row.notes["retrain/perp"]["loss"] < row.notes["retrain/perp"]["loss_before"]
        assert row.stored_bits == after.stored_bits == before.stored_bits


def test_a_run_with_factors_beside_counts_their_bits(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    tuning = [{"method": "retrain/perp", "options": {"epochs": 2, "rank": 2, "rate": 1e-2, "weights": "lora"}}]
    summary = run(tiny("llama"), tmp_path / "out", ids, steps(bits=2, group_size=16), tuning=tuning, reload=True).values
    source = PackedSource.open_packed(tmp_path / "out")
    stored = 8 * sum(entry.nbytes for entry in source.packed.values())
    rows = read_rows(tmp_path / "out" / "report.jsonl")
    assert sum(row.stored_bits for row in rows) == stored
    assert summary["bits_per_compressed_weight"] == stored / sum(row.shape[0] * row.shape[1] for row in rows)
    assert all(source.compressed(row.site).low_rank.rank == 2 for row in rows)


def test_a_stopped_run_gives_the_same_bytes(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2:
            raise Stop

    run(tiny("llama"), tmp_path / "whole", ids, STEPS, **RECIPE)
    with pytest.raises(Stop):
        run(tiny("llama"), tmp_path / "stopped", ids, STEPS, progress=progress, **RECIPE)
    run(tiny("llama"), tmp_path / "stopped", ids, STEPS, **RECIPE)
    assert digests(tmp_path / "whole") == digests(tmp_path / "stopped")


def test_two_processes_give_the_bytes_of_one(forks: Any, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """A step looks at one batch, which one rank has: gradients of the others are zeros."""
    values = {"data": {"name": str(ids)}, "dtype": "float32", "batch_tokens": 64, "steps": STEPS, **RECIPE}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    two_ranks(forks, tmp_path, "run", tmp_path / "recipe.yaml", tiny("llama"), "-o", tmp_path / "two", "--no-reload")
    torch.set_num_threads(1)
    run(tiny("llama"), tmp_path / "one", ids, STEPS, **RECIPE)
    assert digests(tmp_path / "two")["model.safetensors"] == digests(tmp_path / "one")["model.safetensors"]


def test_options_are_checked() -> None:
    assert METHOD().path == "retrain/perp"
    assert METHOD().compares
    for wrong in ({"epochs": 0}, {"rate": 0}, {"weights": "dora"}, {"rank": 0}, {"original": 2}):
        with pytest.raises(ValidationError):
            METHOD(**wrong)


def far(weight: CompressedWeight, dense: Tensor) -> float:
    """|V - W| / |W|."""
    return float((weight.dequantize() - dense).norm() / dense.norm())


@pytest.mark.parametrize("kind", ["factors", "beside"])
def test_a_bound_holds_through_training(kind: str) -> None:
    """Of a low-rank part that was there, and of one that is added to codes; without the bound they go further."""
    from compress.methods.prune.svd import METHOD as Svd
    from compress.methods.quant.rtn import METHOD as Rtn

    block = mixing_block()
    before = {}
    for site in block.sites:
        seen = block.observe((Hessian,))[site]
        method: Any = Svd(sparsity=0.5) if kind == "factors" else Rtn(bits=2, group_size=16)
        before[site] = method(block.weight(site), seen).weight
    dense = {site: block.weight(site) for site in block.sites}
    start = {site: far(before[site], dense[site]) for site in before}
    options: dict[str, Any] = {"weights": "lora", "rank": 4, "rate": 5e-2, "relative_rate": 5e-2, "norms": False}
    free = METHOD(**options)(block, before)
    away = {site: far(weight, dense[site]) for site, weight in free.weights.items()}
    most = max(away, key=lambda site: away[site] - start[site])
    assert away[most] > start[most] * 1.02
    limit = (away[most] + start[most]) / 2
    held = METHOD(**options, perturbation=limit)(block, before)
    for site, weight in held.weights.items():
        assert far(weight, dense[site]) <= max(limit, start[site]) * 1.002  # factors are stored in bfloat16
    assert far(held.weights[most], dense[most]) > start[most]
    assert held.notes["loss"] < held.notes["loss_before"]
    still = METHOD(**options, perturbation=1e-6)(block, before)  # where it came from is allowed
    for site, weight in still.weights.items():
        assert far(weight, dense[site]) <= start[site] * 1.002


def test_what_of_a_step_is_within_a_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, start, step, curve = (torch.randn(6, 8, generator=generator) for _ in range(4))
    for most in (1.5, 2.0, 4.0, 1e3):
        for second in (None, curve):
            t = Bound(dense, most).share(start, step, second)
            limit = max(most * float(dense.norm()), float((start - dense).norm()))

            def distance(t: float, second: Tensor | None = second) -> float:
                return float((start + t * step + (0 if second is None else t * t * second) - dense).norm())

            assert distance(t) <= limit * (1 + 1e-6)
            assert t == 1.0 or distance(t + 1e-4) > limit
    assert Bound(dense, 1e3).share(start, step) == 1.0
    assert Bound(dense, 0.0).share(dense, step) == 0.0


def test_a_bound_is_for_factors_that_are_stored() -> None:
    with pytest.raises(ValidationError, match="leave it out"):
        METHOD(perturbation=0.1)


@pytest.mark.parametrize("kind", ["factors", "beside"])
def test_leaves_that_went_too_far_are_brought_back(kind: str) -> None:
    """What training sees is the bound's weight before and after, and after it the leaves themselves say so."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(12, 20, generator=generator)
    part = LowRank(torch.randn(12, 3, generator=generator).bfloat16(), torch.randn(3, 20, generator=generator).bfloat16())
    base = CompressedWeight(Dense(dense - part.dequantize()))
    bound = Bound(dense, 0.5)
    moving: Any = (
        Factors(replace(base, low_rank=part), bound)
        if kind == "factors"
        else LowRankAdapter(CompressedWeight(Dense(dense)), 3, 3.0, generator, bound)
    )
    with torch.no_grad():
        for value in moving.leaves.values():
            value.copy_(torch.randn(value.shape, generator=generator))
    before = moving.values().detach()
    assert float((before - dense).norm()) == pytest.approx(0.5 * float(dense.norm()), rel=1e-4)
    moving.before_step(0.5)
    torch.testing.assert_close(moving.values().detach(), before, rtol=1e-4, atol=1e-4)
    moving.bound = None
    torch.testing.assert_close(moving.values().detach(), before, rtol=1e-4, atol=1e-4)
