"""Low rank alone: the least error of its rank, in the bits that it says, within a bound if there is one, through files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import inputs, observed, weights
from options import bits_known
from roundtrip import assert_round_trip
from runs import steps
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.checkpoint import packing
from compress.methods.prune.svd import METHOD, distance
from compress.methods.solvers.low_rank import DAMP

Tiny = Callable[..., Path]


def made(weight: Tensor, rows: Tensor, **options: Any) -> Any:
    return METHOD(**options)(weight, observed(rows, (Hessian,)))


def error(weight: Tensor, other: Tensor, rows: Tensor) -> float:
    """tr((W - L) H (W - L)^T) with the damping, float64."""
    full = rows.double().T @ rows.double() / len(rows)
    full += DAMP * full.diagonal().mean() * torch.eye(len(full), dtype=torch.float64)
    delta = (weight - other).double()
    return float(((delta @ full) * delta).sum())


@pytest.mark.parametrize(("sparsity", "rank"), [(0.5, 12), (0.75, 6), (0.1, 21)])
def test_the_error_is_what_the_singular_values_say(sparsity: float, rank: int) -> None:
    """Of a symmetric square root instead of the Cholesky factor, in float64; storing in bfloat16 adds little."""
    weight, rows = weights(48, 48), inputs(500, 48)
    result = made(weight, rows, sparsity=sparsity)
    full = rows.double().T @ rows.double() / len(rows)
    full += DAMP * full.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(full)
    singular = torch.linalg.svdvals(weight.double() @ (vectors * values.sqrt()) @ vectors.T)
    assert result.notes["rank"] == rank
    assert error(weight, result.weight.dequantize(), rows) == pytest.approx(float(singular[rank:].square().sum()), rel=2e-3)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert error(weight, result.weight.dequantize(), rows) < 0.9 * error(weight, plain, rows)


@pytest.mark.parametrize("shape", [(48, 64), (31, 96)])
def test_bits_are_those_that_were_announced_and_no_value_of_the_base_is_stored(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    result = made(weight, inputs(200, shape[1]), sparsity=0.4)
    tensors, spec = packing.pack(result.weight)
    rank = int(0.6 * shape[0] * shape[1] / sum(shape))
    bits = 32 * -(-shape[0] // 32) + 16 * rank * sum(shape)
    assert result.weight.stored_bits == bits_known(METHOD(sparsity=0.4), shape) == bits
    assert sum(t.numel() * t.element_size() for t in tensors.values()) * 8 == bits
    assert torch.equal(packing.unpack(spec, tensors).dequantize(), result.weight.dequantize())


def test_a_bound_on_the_perturbation_holds_at_the_least_cost() -> None:
    weight, rows = weights(32, 48), inputs(500, 48)
    free = made(weight, rows, rank=12)
    far = distance(weight, free.weight.low_rank)
    values = torch.linalg.svdvals(weight.double())
    least = float(values[12:].norm() / values.norm())
    assert least < far
    errors = [error(weight, free.weight.dequantize(), rows)]
    for share in (0.9, 0.5, 0.1):
        bound = least + share * (far - least)
        result = made(weight, rows, rank=12, perturbation=bound)
        assert "fallback" not in result.notes
        assert distance(weight, result.weight.low_rank) == pytest.approx(result.notes["perturbation"])
        assert bound - 0.05 * (far - least) < result.notes["perturbation"] <= bound
        errors.append(error(weight, result.weight.dequantize(), rows))
    assert errors == sorted(errors)
    lost = made(weight, rows, rank=12, perturbation=0.9 * least)
    assert "plain SVD" in lost.notes["fallback"]
    assert lost.notes["perturbation"] == pytest.approx(least, rel=1e-2)
    assert made(weight, rows, rank=12, perturbation=2 * far).weight.dequantize().equal(free.weight.dequantize())


def test_without_tokens_it_is_plain() -> None:
    weight = weights(24, 32)
    result = made(weight, torch.zeros(0, 32), rank=8)
    left, values, right = torch.linalg.svd(weight)
    torch.testing.assert_close(result.weight.dequantize(), (left[:, :8] * values[:8]) @ right[:8], rtol=0.05, atol=0.02)
    assert result.notes["fallback"] == "no tokens: plain SVD"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_goes_through_files(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    assert_round_trip(tiny(family), tmp_path, ids, steps("prune/svd", sparsity=0.5))


def test_ranks_are_checked() -> None:
    assert (
        METHOD(sparsity=0.99).check((32, 32)) == "rank=0, by sparsity=0.99, is not from 1 to 31; give another sparsity, or rank"
    )
    assert METHOD(rank=32).check((32, 64)) is not None
    assert METHOD(rank=31).check((32, 64)) is None
