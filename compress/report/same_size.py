"""Plain quantization that fits into the size of a pruned model, to expose sparsity that saves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.report.rows import SiteRow, bits_per_weight
from compress.weights.uniform import uniform_bits

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Pruned:
    """The pruned weights of a result, and the plain quantization that is no larger."""

    sites: int
    weights: int
    sparsity: float  # pruned share of these weights
    bits_per_weight: float  # of these weights, masks included
    plain_bits: int | None  # None: not even 2 bits fit
    plain_group_size: int | None
    plain_bits_per_weight: float | None

    def plain(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return asdict(self)

    @property
    def sentences(self) -> list[str]:
        """The comparison in words."""
        found = [
            f"{self.sparsity:.1%} of {self.weights:,} weights in {self.sites} matrices are removed; they take "
            f"{self.bits_per_weight:.3f} bits per weight, masks and all"
        ]
        if self.plain_bits is not None:
            found.append(
                f"no larger without pruning: {self.plain_bits} bits, group {self.plain_group_size} "
                f"({self.plain_bits_per_weight:.3f} bits per weight, `compress quantize --bits {self.plain_bits} "
                f"--group-size {self.plain_group_size}`); measure both before choosing"
            )
        return found


def compare(rows: Sequence[SiteRow]) -> Pruned | None:
    """Sum up the pruned weights of a report; None where there are none."""
    mine = [row for row in rows if "sparsity" in row.notes]
    if not mine:
        return None
    weights = sum(row.numel for row in mine)
    bits = bits_per_weight(mine)
    found: list[tuple[int, float, int]] = []
    for width in range(2, 9):
        for group in GROUPS:
            sizes = [group if row.shape[1] % group == 0 else row.shape[1] for row in mine]
            stored = sum(uniform_bits(row.shape, width, size, False) for row, size in zip(mine, sizes, strict=True))
            if stored / weights <= bits:
                found.append((width, stored / weights, group))
    best = max(found) if found else (None, None, None)
    share = sum(row.notes["sparsity"] * row.numel for row in mine) / weights
    return Pruned(len(mine), weights, share, bits, best[0], best[2], best[1])
