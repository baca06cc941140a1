"""Statistics are sums: over batches, passes and ranks they add up to what one look at everything gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.calibration import statistics
from compress.calibration.observe import Tap, batches, observe, passes
from compress.calibration.statistics import Hessian, Magnitude, MeanSquare

CPU = torch.device("cpu")


def accumulate(rows: torch.Tensor, cuts: list[int]) -> Hessian:
    hessian = Hessian(rows.shape[1], CPU)
    for part in rows.tensor_split(cuts):
        hessian.add(part)
    return hessian


def test_the_hessian_is_the_mean_of_outer_products() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    expected = (rows.double().T @ rows.double() / 50).float()
    torch.testing.assert_close(accumulate(rows, []).matrix(), expected)


def test_blocks_of_columns_give_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 13, generator=torch.Generator().manual_seed(0))
    whole = accumulate(rows, []).matrix()
    monkeypatch.setattr(statistics, "_BLOCK", 4)
    cut = accumulate(rows, []).matrix()
    torch.testing.assert_close(cut, whole)
    assert torch.equal(cut, cut.T)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 40), max_size=4), st.integers(0, 2**31))
def test_merging_equals_adding(cuts: list[int], seed: int) -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(seed))
    whole = accumulate(rows, sorted(cuts))
    parts = [accumulate(part, []) for part in rows.tensor_split(sorted(cuts))]
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].tokens == whole.tokens == 40
    assert torch.equal(parts[0].total, whole.total)


def test_no_token_gives_zeros() -> None:
    hessian = Hessian(4, CPU)
    hessian.add(torch.empty(0, 4))
    assert hessian.tokens == 0
    assert torch.equal(hessian.matrix(), torch.zeros(4, 4))


def test_half_precision_products_are_exact() -> None:
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(accumulate(rows, []).total, rows.double().T @ rows.double(), rtol=1e-6, atol=0)


def test_shrinking_goes_from_the_pooled_mean_to_ones_own() -> None:
    generator = torch.Generator().manual_seed(0)
    own, pooled = (
        accumulate(torch.randn(30, 4, generator=generator), []),
        accumulate(torch.randn(500, 4, generator=generator), []),
    )
    torch.testing.assert_close(Hessian(4, CPU).shrunk(pooled, 4.0).matrix(), pooled.matrix())
    torch.testing.assert_close(own.shrunk(pooled, 0.0).matrix(), own.matrix())
    expected = (own.matrix() * 30 + pooled.matrix() * 10) / 40
    torch.testing.assert_close(own.shrunk(pooled, 10.0).matrix(), expected)


def test_passes_keep_the_order_and_the_budget() -> None:
    taps = [Tap(str(n), (), columns, (Hessian,)) for n, columns in enumerate((10, 20, 5, 40, 5))]
    budget = Hessian.nbytes(25)
    result = passes(taps, budget)
    assert [tap.name for group in result for tap in group] == ["0", "1", "2", "3", "4"]
    assert all(sum(tap.nbytes for tap in group) <= budget for group in result if len(group) > 1)
    assert len(passes(taps, 10**9)) == 1


def test_a_pooled_tap_sees_the_rows_of_all_its_modules() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    a, b = torch.randn(4, 3), torch.randn(2, 5, 3)
    taps = [Tap("both", (first, second), 3, (Hessian,)), Tap("one", (first,), 3, (Hessian,))]

    def forward() -> None:
        first(a)
        second(b)

    found = observe(taps, forward, CPU)
    assert (found["both"][Hessian].tokens, found["one"][Hessian].tokens) == (14, 4)
    first(a)
    assert found["one"][Hessian].tokens == 4, "hooks must be gone"


def test_batches_cover_all_samples_once() -> None:
    assert [len(b) for b in batches(10, 16, 64)] == [4, 4, 2]
    assert [len(b) for b in batches(3, 100, 64)] == [1, 1, 1]


def test_the_magnitude_is_the_mean_of_absolute_values_however_tokens_are_split() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    whole, parts = Magnitude(7, CPU), [Magnitude(7, CPU) for _ in range(3)]
    whole.add(rows)
    for part, some in zip(parts, rows.tensor_split([11, 11]), strict=True):
        part.add(some)
    expected = [sum(abs(float(v)) for v in column) / 50 for column in rows.T]
    assert whole.mean().tolist() == pytest.approx(expected, rel=1e-6)
    assert whole.mean().dtype == torch.float32
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].tokens == whole.tokens == 50
    torch.testing.assert_close(parts[0].total, whole.total, rtol=1e-14, atol=0)
    assert [t.data_ptr() for t in whole.tensors()] == [whole.total.data_ptr()]
    assert Magnitude.nbytes(7) == whole.total.numel() * 8
    assert torch.equal(Magnitude(7, CPU).mean(), torch.zeros(7))


def test_magnitudes_of_half_precision_do_not_overflow() -> None:
    found = Magnitude(2, CPU)
    found.add(torch.full((1000, 2), -60000.0, dtype=torch.float16))
    assert found.mean().tolist() == [60000.0, 60000.0]


def test_mean_squares_are_the_diagonal_of_the_hessian() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    found, other = MeanSquare(7, CPU), MeanSquare(7, CPU)
    found.add(rows[:20].bfloat16().float())
    other.add(rows[20:].bfloat16())
    found.merge(other)
    whole = Hessian(7, CPU)
    whole.add(rows.bfloat16())
    assert found.tokens == 50
    assert found.tensors()[0] is found.total
    torch.testing.assert_close(found.mean(), whole.matrix().diagonal())
    assert torch.equal(MeanSquare(7, CPU).mean(), torch.zeros(7))


def test_short_rows_are_summed_in_float32_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, products of bfloat16 go to tensor cores as they are, with sums in float32 of some tokens at a time."""
    seen = []

    def mm(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        assert out_dtype == torch.float32
        seen.append(left.shape[1])
        return left.float() @ right.float()

    rows = torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    plain, short = Hessian(6, torch.device("cpu")), Hessian(6, torch.device("cpu"))
    plain.add(rows)
    monkeypatch.setattr(statistics, "_short", lambda rows: True)
    monkeypatch.setattr(statistics, "_TOKENS", 4)
    monkeypatch.setattr(statistics.torch, "mm", mm)
    short.add(rows)
    assert seen == [4, 4, 3]
    assert short.tokens == 11
    torch.testing.assert_close(short.matrix(), plain.matrix(), rtol=1e-6, atol=1e-7)
