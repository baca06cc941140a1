"""The low-rank part: the least error of its rank, by the singular values; solved anew as it is stored; counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import dequantized, mixing_block
from layers import hessian_of, inputs, weights
from options import function_of
from pydantic import ValidationError
from runs import compress as run
from runs import steps

from compress.calibration.statistics import Hessian
from compress.checkpoint.packed_source import PackedSource
from compress.methods.solvers.block_loss import loss
from compress.methods.solvers.low_rank import damped, factors, fitted
from compress.methods.tune.svd import METHOD, part
from compress.weights.weight import CompressedWeight

gptq = function_of("quant/gptq")

Tiny = Callable[..., Path]


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_error_is_the_sum_of_the_squares_that_were_cut_off(rank: int) -> None:
    rest, hessian = weights(12, 16).double(), hessian_of(inputs(300, 16))
    full = damped(hessian)
    left, right = factors(rest, hessian, rank)
    delta = rest - left @ right
    error = float(((delta @ full) * delta).sum())
    # By another way: the eigenvalues of R H R^T are the squares of the singular values of R S.
    squares = torch.linalg.eigvalsh(rest @ full @ rest.T).flip(0)
    assert error == pytest.approx(float(squares[rank:].sum()), rel=1e-9)
    assert left.shape == (12, rank)
    plain = torch.linalg.svd(rest, full_matrices=False)
    other = rest - (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]
    assert error < float(((other @ full) * other).sum())


def test_the_left_factor_is_the_best_for_a_right_one() -> None:
    rest, hessian = weights(12, 16), hessian_of(inputs(300, 16))
    right = weights(3, 16, seed=1)
    full, found = damped(hessian), fitted(rest, hessian, right)
    delta = (rest.double() - found @ right.double()) @ full @ right.double().T
    torch.testing.assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-8)


def test_a_block_gets_better_in_bits_that_are_counted() -> None:
    block = mixing_block()
    before = {
        s: gptq(block.weight(s), t[Hessian].matrix(), bits=2, group_size=16).weight for s, t in block.observe((Hessian,)).items()
    }
    block.observe_in_turn = lambda kinds: (((site,), stats) for site, stats in block.observe(kinds).items())  # type: ignore[attr-defined]
    method = METHOD(rank=4)
    tuned = method(block, before)
    for site, weight in tuned.weights.items():
        assert weight.base is before[site].base
        assert weight.stored_bits == before[site].stored_bits + method.added_bits(weight.shape)
    assert loss(block, dequantized(tuned.weights)) < 0.9 * loss(block, dequantized(before))
    again = method(block, tuned.weights)
    assert not again.weights
    assert sorted(again.notes["unchanged"]) == ["down", "up"]
    whole = part(block.weight("up"), before["up"].dequantize(), torch.eye(32), 31)
    assert replace(before["up"], low_rank=whole).dequantize().sub(block.weight("up")).abs().max() < 0.05


def test_a_run(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    tuning = [
        {"method": "tune/svd", "options": {"rank": 2}},
        {"method": "retrain/perp", "options": {"weights": "lora", "epochs": 2}},
    ]
    run(tiny("llama"), tmp_path / "out", ids, steps(bits=2, group_size=16), tuning=tuning, reload=True)
    source = PackedSource.open_packed(tmp_path / "out")
    assert all(isinstance(source.compressed(site), CompressedWeight) for site in source.table)
    assert all(source.compressed(site).low_rank.rank == 2 for site in source.table)


def test_options_are_checked() -> None:
    assert METHOD().path == "tune/svd"
    assert METHOD(rank=16).check((16, 64)) is not None
    assert METHOD(rank=15).check((16, 64)) is None
    with pytest.raises(ValidationError):
        METHOD(rank=0)
