"""Bootstrap intervals: against a loop, against the normal distribution, and what pairing gives."""

from __future__ import annotations

import math
import random

import pytest
import torch

from compress.evaluation import intervals
from compress.evaluation.quality import _summed_up


def test_means_are_those_of_drawn_windows() -> None:
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    means = intervals.resampled_means(values, 500)
    assert means.shape == (500, 2)
    possible = {round((a + b + c) / 3, 9) for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert {round(float(m), 9) for m in means[:, 0]} == possible
    assert torch.allclose(means[:, 1], 10 * means[:, 0]), "the same windows for both"


def test_the_interval_of_many_windows_is_the_normal_one() -> None:
    values = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1)).double() * 3 + 7
    low, high = intervals.interval(intervals.resampled_means(values)[:, 0])
    error = float(values.std()) / math.sqrt(4000)
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.2 * error)


def test_chunks_do_not_change_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(7, 1)
    whole = intervals.resampled_means(values, 100)
    monkeypatch.setattr(intervals, "_CHUNK", 7 * 100)
    assert torch.equal(intervals.resampled_means(values, 100), whole)


def test_the_true_mean_is_inside_as_often_as_is_said() -> None:
    """200 samples of 60 windows from a skewed distribution whose mean is 1."""
    draw = random.Random(0)
    inside = 0
    for _ in range(200):
        values = torch.tensor([[draw.expovariate(1.0)] for _ in range(60)])
        low, high = intervals.interval(intervals.resampled_means(values, 500)[:, 0])
        inside += low <= 1.0 <= high
    assert 0.88 < inside / 200 < 0.99


def test_pairing_makes_the_ratio_precise() -> None:
    """Windows differ much, models by a little: the ratio's interval is narrow although both perplexities' are wide."""
    hard = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() * 4
    found = _summed_up(torch.stack([hard + 0.01, hard, torch.full_like(hard, 0.02), torch.full_like(hard, 0.9)], 1))
    low, high = found["perplexity_ratio_interval"]
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.01))
    assert high - low < 1e-9
    wide = found["perplexity_interval"]
    assert wide[1] / wide[0] > 1.3
    assert found["kl_interval"] == pytest.approx((0.02, 0.02))


def test_one_window_has_no_interval() -> None:
    found = _summed_up(torch.tensor([[1.0, 1.0, 0.1, 0.5]], dtype=torch.float64))
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["kl_interval"] is None and found["kl_standard_error"] is None
