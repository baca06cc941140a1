"""What plain quantization fits into the size of a pruned model."""

from __future__ import annotations

from typing import Any

import pytest

from compress.report.rows import SiteRow
from compress.report.same_size import compare
from compress.weights.uniform import uniform_bits


def row(bits: float, shape: tuple[int, int] = (256, 1024), **notes: Any) -> SiteRow:
    return SiteRow("a", 0, "q", shape, "prune/alps", bits, round(bits * shape[0] * shape[1]), 0.1, notes=notes)


@pytest.mark.parametrize(
    ("bits", "width", "group"),
    [(8.75, 8, 32), (8.25, 8, 64), (9.06, 8, 32), (2.875, 2, 32), (3.2, 3, 128), (3.25, 3, 64), (2.125, 2, 128)],
)
def test_the_best_that_is_no_larger(bits: float, width: int, group: int) -> None:
    found = compare([row(bits, sparsity=0.5), row(16.0)])
    assert found is not None
    assert (found.plain_bits, found.plain_group_size) == (width, group)
    assert found.plain_bits_per_weight == uniform_bits((256, 1024), width, group, False) / (256 * 1024)
    assert found.plain_bits_per_weight <= bits == pytest.approx(found.bits_per_weight, rel=1e-6)
    assert found.sites == 1
    assert "--bits" in found.sentences[1]


def test_sizes_and_sparsities_are_those_of_all_pruned_weights_together() -> None:
    found = compare([row(9.0, sparsity=0.5), row(3.0, (256, 3072), sparsity=0.9)])
    assert found is not None
    assert found.bits_per_weight == pytest.approx(4.5)
    assert found.sparsity == pytest.approx(0.8)
    assert found.sentences[0].startswith("80.0% of 1,048,576 weights in 2 matrices")


def test_nothing_to_say() -> None:
    assert compare([row(4.0)]) is None
    tiny = compare([row(1.5, sparsity=0.95)])
    assert tiny is not None
    assert tiny.plain_bits is None
    assert len(tiny.sentences) == 1
    whole = compare([row(5.0, (64, 100), sparsity=0.5)])  # no group divides 100: whole rows
    assert whole is not None
    assert whole.plain_bits == 4
