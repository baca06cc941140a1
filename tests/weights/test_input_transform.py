"""Transforms of inputs against dense matrices in float64, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from examples.input import KINDS, transform
from scipy.linalg import hadamard
from torch import Tensor
from weights import random_weight

from compress.errors import FormatError
from compress.weights.activation import Activation
from compress.weights.input_transform import Diagonal, Hadamard, Kronecker, apply_to_hessian, butterfly
from compress.weights.low_rank import LowRank
from compress.weights.site_input import SiteInput
from compress.weights.sparse import Sparse
from compress.weights.weight import ROLES, CompressedWeight

# Sums of at most 128 products in float64, and the inverses of matrices whose condition is below 10.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [(8, 1), (8, 8), (24, 8), (256, 128), (384, 128), (96, 32)]


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(of: Any) -> Tensor:
    """P as a dense matrix, from the definition of each kind."""
    if isinstance(of, Diagonal):
        return torch.diag(of.factors.double())
    if isinstance(of, Kronecker):
        return torch.kron(of.left.double(), of.right.double())
    block = torch.from_numpy(hadamard(of.block)).double() / of.block**0.5
    signs = torch.where(of.negative, -1.0, 1.0).double()
    return torch.diag(signs) @ torch.block_diag(*[block] * (of.columns // of.block))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "size"), SIZES)
def test_it_is_the_product_with_its_matrix(kind: str, columns: int, size: int) -> None:
    made, x, weight = transform(kind, columns, size, torch.float32), random(5, 2, columns), random(7, columns)
    p = matrix(made)
    torch.testing.assert_close(made.apply(x), x @ p, **EXACT)
    torch.testing.assert_close(made.inverse(x), x @ torch.linalg.inv(p), **EXACT)
    torch.testing.assert_close(made.inverse(made.apply(x)), x, **EXACT)
    torch.testing.assert_close(made.multiply_out(weight), weight @ p.T, **EXACT)
    torch.testing.assert_close(made.apply_to_weight(weight), weight @ torch.linalg.inv(p).T, **EXACT)
    torch.testing.assert_close(SiteInput(columns, made).dequantize().double(), p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_stays_and_statistics_follow(kind: str) -> None:
    made, x, weight = transform(kind, 256, 128, torch.float16, 5), random(300, 256), random(9, 256)
    seen, other = made.apply(x), made.apply_to_weight(weight)
    torch.testing.assert_close(seen @ other.T, x @ weight.T, **EXACT)
    torch.testing.assert_close(made.multiply_out(other), weight, **EXACT)
    torch.testing.assert_close(apply_to_hessian(made, x.T @ x), seen.T @ seen, rtol=1e-11, atol=1e-10)
    single = apply_to_hessian(made, (x.T @ x).float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), seen.T @ seen, rtol=1e-4, atol=1e-3)  # the sums came in float32


def test_a_hadamard_matrix_keeps_lengths_and_spreads_one_column() -> None:
    made = Hadamard.random(256, 128, torch.Generator().manual_seed(0))
    assert 64 < int(made.negative.sum()) < 192
    alone = torch.zeros(1, 256, dtype=torch.float64)
    alone[0, 200] = 3.0
    seen = made.apply(alone)
    assert torch.equal(seen[0, :128], torch.zeros(128).double())
    torch.testing.assert_close(seen[0, 128:].abs(), torch.full((128,), 3 / 128**0.5, dtype=torch.float64), **EXACT)
    x = random(4, 256)
    torch.testing.assert_close(made.apply(x).norm(dim=1), x.norm(dim=1), **EXACT)


def test_whole_numbers_are_exact() -> None:
    """Sums of whole numbers in float32, by a power of four."""
    x = torch.randint(-9, 10, (6, 64), generator=torch.Generator().manual_seed(1)).float()
    for block in (4, 16, 64):
        wanted = x.double() @ torch.block_diag(*[torch.from_numpy(hadamard(block)).double()] * (64 // block)) / block**0.5
        assert torch.equal(butterfly(x, block).double(), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    made, x = transform(kind, 96, 32, torch.float32), random(4, 96).to(dtype)
    seen = made.apply(x)
    assert seen.dtype == dtype
    assert torch.equal(seen, made.apply(x.float()).to(dtype))


@pytest.mark.parametrize("block", [0, -2, 3, 64, 2.0, True, None])
def test_blocks_that_do_not_fit_are_refused(block: Any) -> None:
    with pytest.raises(FormatError, match="a power of two that divides in=96"):
        Hadamard(torch.zeros(96).bool(), block)


def test_pieces_are_for_as_many_columns() -> None:
    with pytest.raises(FormatError, match="Hadamard is for in=8; expected in=16"):
        SiteInput(16, Hadamard(torch.zeros(8).bool(), 8))
    with pytest.raises(FormatError, match="Activation is for in=8; expected in=16"):
        SiteInput(16, activation=Activation(8, "int8"))


# ---------------------------------------------------------------------------------------------------- in a weight


def of_every_role(kind: str, activation: Activation | None = None) -> CompressedWeight:
    """A weight (40, 96) with all roles but a mask."""
    where = random(40, 96) > 2
    factors = random(40, 3, seed=4).bfloat16() / 8, random(3, 96, seed=5).bfloat16() / 8
    part = SiteInput(96, transform(kind, 96, 32, torch.float32), activation)
    plain = random_weight(40, 96, 4, 32)
    return replace(plain, outliers=Sparse.of(random(40, 96), where), low_rank=LowRank(*factors), input=part)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_decodes_to_that_of_the_original_input(kind: str) -> None:
    weight = of_every_role(kind)
    inner = replace(weight, input=None)
    assert weight.input is not None
    p = matrix(weight.input.transform)
    torch.testing.assert_close(weight.dequantize().double(), inner.dequantize().double() @ p.T, rtol=1e-5, atol=1e-6)
    x = random(5, 96)
    torch.testing.assert_close(
        weight.input.seen(x) @ inner.dequantize().double().T, x @ weight.dequantize().double().T, rtol=1e-5, atol=1e-5
    )
    assert weight.stored_bits == inner.stored_bits + weight.input.stored_bits
    assert weight.bits_per_weight == weight.stored_bits / (40 * 96)
    assert weight.transformed
    assert not inner.transformed


@pytest.mark.parametrize("kind", KINDS)
def test_rows_share_what_is_done_to_the_input(kind: str) -> None:
    weight = of_every_role(kind)
    some = weight.rows(32, 40)
    assert some.input is weight.input
    torch.testing.assert_close(some.dequantize(), weight.dequantize()[32:], rtol=1e-6, atol=1e-6)


def test_stored_bits_of_each_kind() -> None:
    assert transform("hadamard", 96, 32, torch.float32).stored_bits == 96
    assert transform("hadamard", 40, 8, torch.float32).stored_bits == 64  # whole words
    assert transform("diagonal", 96, 32, torch.bfloat16).stored_bits == 96 * 16
    assert transform("kronecker", 96, 32, torch.float32).stored_bits == (32 * 32 + 3 * 3) * 32
    static = Activation(96, "int8", "group", 32, False, torch.ones(3), torch.zeros(3, dtype=torch.uint8))
    assert SiteInput(96, transform("hadamard", 96, 32, torch.float32), static).stored_bits == 96 + 3 * (32 + 8)


def test_roles_are_the_fields_of_a_weight() -> None:
    import dataclasses

    assert {field.name for field in dataclasses.fields(CompressedWeight)} == set(ROLES)
    assert tuple(of_every_role("diagonal").parts) == ("base", "outliers", "low_rank", "input")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_rounded_inputs_of_the_original_weight_give_the_product_of_what_is_seen(kind: str | None) -> None:
    made = None if kind is None else transform(kind, 64, 16, torch.float32)
    part = SiteInput(64, made, Activation(64, "int4"))
    x, stored = random(7, 64).requires_grad_(), random(5, 64)
    found = part.rounded(x)
    torch.testing.assert_close(found @ part.multiply_out(stored).T, part.seen(x) @ stored.T, rtol=1e-5, atol=1e-5)
    assert (found - x).abs().max() > 0.05
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, torch.ones(7, 64, dtype=torch.float64))  # as if nothing were rounded
    assert SiteInput(64, made or transform("diagonal", 64, 16, torch.float32)).rounded(x) is x
