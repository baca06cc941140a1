"""What a run did, site by site: rows that go into the journal, the report and the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.system.files import write_text
from compress.system.side_files import read_json_lines


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
        """Read a row back from JSON values. Raises CheckpointError where they are not those of a row."""
        try:
            row = cls(**{**values, "shape": tuple(values["shape"])})
            whole = len(row.shape) == 2 and all(isinstance(n, int) and 0 <= n < 2**63 for n in (*row.shape, row.stored_bits))
            texts = all(isinstance(text, str) for text in (row.site, row.kind, row.method))
            numbers = all(isinstance(n, int | float) for n in (row.bits_per_weight, row.error, row.seconds))
            if whole and texts and numbers and isinstance(row.notes, dict):
                return row
        except (TypeError, KeyError):
            pass
        raise CheckpointError(f"a row of a report is not as compress writes it: {str(values)[:80]!r}; fetch the report again")

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
    """Read what `write_rows` wrote. Raises CheckpointError."""
    return [SiteRow.parse(values) for values in read_json_lines(path)]


def bits_per_weight(rows: Sequence[SiteRow]) -> float:
    """Stored bits over weights, of all sites together."""
    numel = sum(row.numel for row in rows)
    return sum(row.stored_bits for row in rows) / numel if numel else 0.0
