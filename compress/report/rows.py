"""What a run did, site by site: rows that go into the journal, the report and the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.system.files import write_text


@dataclass(frozen=True)
class SiteRow:
    """One compressed weight."""

    site: str
    block: int | None
    kind: str
    shape: tuple[int, int]  # (out, in)
    method: str
    bits_per_weight: float
    stored_bits: int
    error: float  # tr((W-Q) H (W-Q)^T) / tr(W H W^T); without a Hessian, |W-Q|^2 / |W|^2
    expert: int | None = None
    tokens: int | None = None  # calibration tokens that reached it; None without calibration
    fallback: str | None = None  # what was done instead of the step's method, and why
    seconds: float = 0.0  # of the call that compressed it, shared with the sites of the same call
    notes: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None  # of the values that the method gave: float32, little endian, row by row

    @classmethod
    def parse(cls, values: dict[str, Any]) -> SiteRow:
        """Read a row back from JSON values."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    def plain(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def write_rows(path: Path, rows: Iterable[SiteRow]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(row.plain(), ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[SiteRow]:
    """Read what `write_rows` wrote."""
    return [SiteRow.parse(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def bits_per_weight(rows: Sequence[SiteRow]) -> float:
    """Stored bits over weights, of all sites together."""
    numel = sum(row.numel for row in rows)
    return sum(row.stored_bits for row in rows) / numel if numel else 0.0
