"""AST: masks that move and settle, gradients straight through, decay of what is pruned alone, factors beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import dequantized, mixing_block
from runs import compress as run
from runs import digests, steps
from torch import Tensor

from compress.checkpoint.packed_source import PackedSource
from compress.methods.prune.magnitude import METHOD as Magnitude
from compress.methods.retrain.ast import METHOD, Adapting, best_left, group_sums, reselected
from compress.methods.solvers.block_loss import loss
from compress.methods.solvers.mask_selection import Target, as_part, select
from compress.report.rows import read_rows
from compress.weights.dense import Dense
from compress.weights.mask import Bitmask, Pattern
from compress.weights.weight import CompressedWeight

Tiny = Callable[..., Path]
TARGETS = {
    "2:4": Target(0.5, (2, 4)),
    "1:8": Target(0.875, (1, 8)),
    "rows": Target(0.5),
    "matrix": Target(0.6, within="matrix"),
    "runs": Target(0.5, group=4),
    "9:16": Target(7 / 16, (9, 16)),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapting(target: Target = TARGETS["2:4"], square: Tensor | None = None, **options: Any) -> tuple[Adapting, Tensor, Tensor]:
    """A moving weight, the original (out, in) and the mask that came."""
    dense = normal(12, 32)
    keep = select(dense.abs(), target)
    weight = CompressedWeight.pruned(Dense(dense * 1.5), as_part(keep, target))
    return Adapting(weight, dense, square, METHOD(**options)), dense, keep


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_mask_is_found_anew_with_the_counts_that_it_had(target: Target) -> None:
    before = as_part(select(normal(12, 32).abs(), target), target)
    score = normal(12, 32, seed=1).abs()
    after = reselected(score, before)
    assert type(after) is type(before)
    if isinstance(before, Pattern) or target.within == "matrix":
        assert torch.equal(after.mask(), select(score, target))
    else:
        assert torch.equal(after.mask().sum(1), before.mask().sum(1))
    if target.group > 1 or target.pattern is None:
        assert torch.equal(after.mask(), select(score, target))
    assert torch.equal(reselected(before.mask().float(), before).mask(), before.mask())


def test_the_first_weight_is_the_one_that_came_and_gradients_reach_all_of_it() -> None:
    moving, dense, keep = adapting()
    torch.testing.assert_close(moving.values(), 1.5 * dense * keep)
    torch.testing.assert_close(moving.all_values(), torch.where(keep, 1.5 * dense, dense))
    given = normal(12, 32, seed=2)
    moving.values().backward(given)
    torch.testing.assert_close(moving.leaves["p"].grad, given * moving.unit)


@pytest.mark.parametrize(("share", "rate"), [(0.0, 0.0), (0.1, 0.12), (0.25, 0.3), (0.9, 0.3)])
def test_what_is_pruned_decays_and_what_is_kept_does_not(share: float, rate: float) -> None:
    """g + l min(1, t / T) u (1 - M) W, in float64 and element by element."""
    moving, _, keep = adapting(decay=0.3, anneal=0.25, interval=1000)
    moving.steps = 1  # the mask stays
    gradient = normal(12, 32, seed=3)
    moving.leaves["p"].grad = gradient.clone()
    moving.before_step(share)
    whole = moving.all_values().detach().double()
    size = gradient.double().square().mean().sqrt() / whole.square().mean().sqrt()
    expected = gradient.double().clone()
    for i in range(12):
        for j in range(32):
            if not keep[i, j]:
                expected[i, j] += rate * size * whole[i, j]
    torch.testing.assert_close(moving.leaves["p"].grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_masks_follow_weights_until_they_settle() -> None:
    moving, _, keep = adapting(interval=2, settle=0.5, score="magnitude")
    with torch.no_grad():
        moving.leaves["p"].copy_(normal(12, 32, seed=4) * 3)
    moving.steps = 1
    moving.before_step(0.2)  # not yet
    assert torch.equal(moving.mask, keep)
    moving.before_step(0.2)
    assert torch.equal(moving.mask, select(moving.all_values().detach().abs(), TARGETS["2:4"]))
    assert moving.flipped > 0.1
    settled = moving.mask
    with torch.no_grad():
        moving.leaves["p"].copy_(normal(12, 32, seed=5) * 3)
    moving.steps = 4
    moving.before_step(0.5)
    assert torch.equal(moving.mask, settled)
    stored = moving.stored()
    assert torch.equal(stored.keep.mask(), settled)
    assert not stored.dequantize()[~settled].view(torch.int32).any()
    torch.testing.assert_close(stored.dequantize(), moving.values().detach())


def test_masks_go_by_what_channels_say() -> None:
    square = torch.ones(32)
    square[::4] = 1e6
    moving, _, _ = adapting(square=square, score="activations")
    moving.before_step(0.1)
    assert bool(moving.mask[:, ::4].all())
    other, _, _ = adapting(square=square, score="magnitude")
    other.before_step(0.1)
    assert not bool(other.mask[:, ::4].all())


def test_a_state_brings_back_leaves_and_masks() -> None:
    moving, _, _ = adapting(group=8)
    with torch.no_grad():
        for number, value in enumerate(moving.leaves.values()):
            value.copy_(normal(*value.shape, seed=number))
    moving.before_step(0.1)
    other, _, _ = adapting(group=8)
    other.restore(moving.state())
    assert torch.equal(other.values(), moving.values())
    assert torch.equal(other.stored().dequantize(), moving.stored().dequantize())
    assert other.steps == moving.steps == 1


def test_factors_start_as_the_best_for_sums_of_groups() -> None:
    removed, square = normal(5, 16), normal(16, seed=1).square() + 0.1
    sums, diagonal = group_sums(16, 4).double(), torch.diag(square.double())
    expected = removed.double() @ diagonal @ sums.T @ torch.linalg.inv(sums @ diagonal @ sums.T)
    torch.testing.assert_close(best_left(removed, square, 4).double(), expected, rtol=1e-5, atol=1e-6)
    moving, dense, keep = adapting(group=8, square=torch.ones(32))
    assert moving.stored().low_rank.rank == 4
    plain = (dense - 1.5 * dense * keep - (dense - 1.5 * dense) * keep).square().sum()
    with_factors = (dense * ~keep - (moving.values().detach() - 1.5 * dense * keep)).square().sum()
    assert with_factors < plain


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": 0.6}, {"sparsity": 0.5, "group": 8}], ids=str)
def test_the_loss_falls_and_counts_stay(options: dict[str, Any]) -> None:
    block = mixing_block()
    made = Magnitude(**options)
    before = {site: made(block.weight(site), {}).weight for site in block.sites}
    tuned = METHOD(relative_rate=2e-2, interval=2)(block, before)
    moved = False
    for site, weight in tuned.weights.items():
        mask, was = weight.keep.mask(), before[site].keep.mask()
        assert int(mask.sum()) == int(was.sum())
        assert weight.stored_bits == before[site].stored_bits
        assert not weight.dequantize()[~mask].view(torch.int32).any()
        moved |= not torch.equal(mask, was)
    assert moved
    assert loss(block, dequantized(tuned.weights), tuned.others) < 0.7 * loss(block, dequantized(before))


def test_factors_beside_are_counted() -> None:
    block, made = mixing_block(), Magnitude(pattern="2:4")
    before = {site: made(block.weight(site), {}).weight for site in block.sites}
    method = METHOD(group=8, epochs=4, relative_rate=1e-2)
    for site, weight in method(block, before).weights.items():
        assert weight.stored_bits == before[site].stored_bits + method.added_bits(weight.shape)
    assert method.check((16, 20)) is not None
    assert method.check((16, 24)) is None


@pytest.mark.parametrize("place", ["tuning", "retraining"])
def test_runs(place: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(block: int, blocks: int, step: str, share: float) -> None:
        if block == 2 and (place == "tuning" or (step == "retraining" and share > 0.6)):
            raise Stop

    stage: dict[str, Any] = {"method": "retrain/ast", "options": {"interval": 2, "relative_rate": 2e-2}}
    stage |= {"steps": 12, "batch": 3} if place == "retraining" else {}
    made = steps("prune/magnitude", pattern="2:4")
    run(tiny("llama"), tmp_path / "out", ids, made, **{place: [stage]}, reload=True)
    if place == "tuning":
        with pytest.raises(Stop):
            run(tiny("llama"), tmp_path / "stopped", ids, made, **{place: [stage]}, progress=progress)
        run(tiny("llama"), tmp_path / "stopped", ids, made, **{place: [stage]})
        assert digests(tmp_path / "out") == digests(tmp_path / "stopped")
    source = PackedSource.open_packed(tmp_path / "out")
    for row in read_rows(tmp_path / "out" / "report.jsonl"):
        weight = source.compressed(row.site)
        assert isinstance(weight.keep, Pattern)
        assert bool((weight.keep.mask().unflatten(1, (-1, 4)).sum(2) == 2).all())
        (notes,) = [notes for name, notes in row.notes.items() if name.startswith("retrain")]
        assert notes.get("loss", notes.get("held_out")) < notes.get("loss_before", notes.get("held_out_before"))


def test_codes_train_their_scales() -> None:
    assert METHOD().path == "retrain/ast"
    assert isinstance(adapting(TARGETS["rows"])[0].keep, Bitmask)
