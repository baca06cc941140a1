"""`compress compare`: several checkpoints on one page, divergence against size, and which of them no other beats in both."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.charts import Label
from compress.errors import CheckpointError
from compress.files import human_bytes

WIDTH, HEIGHT = 960.0, 420.0
_MARGIN = (70.0, 24.0, 30.0, 40.0)  # left, top, right, bottom


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a comparison."""

    name: str
    folder: str
    base: str
    bytes: int
    bits_per_weight: float
    bits_per_compressed_weight: float
    methods: list[str]
    seconds: float
    perplexity: float | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    agreement: float | None = None
    ids_sha256: str | None = None
    best: bool = False  # no other is both smaller and nearer to the original

    def plain(self) -> dict[str, Any]:
        """The entry as JSON values."""
        return dict(self.__dict__)


def _read(folder: Path) -> Entry:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        lines = (folder / "report.jsonl").read_text(encoding="utf-8").splitlines()
        measured = folder / "evaluation.json"
        e = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
        methods = sorted({json.loads(line)["method"] for line in lines})
        interval = e.get("kl_interval")
        return Entry(
            folder.resolve().name,
            str(folder),
            str(summary["base_model"]),
            int(summary["bytes_after"]),
            float(summary["bits_per_weight"]),
            float(summary["bits_per_compressed_weight"]),
            methods,
            float(summary["seconds"]),
            e.get("perplexity"),
            e.get("kl"),
            (interval[0], interval[1]) if interval else None,
            e.get("agreement"),
            e.get("ids_sha256"),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); expected a checkpoint that compress wrote") from error


def entries(folders: list[Path]) -> list[Entry]:
    """Read checkpoints in order of size and mark those of the front. Raises CheckpointError."""
    found = sorted((_read(folder) for folder in folders), key=lambda entry: (entry.bytes, entry.name))
    measured = [entry for entry in found if entry.kl is not None]

    def beaten(entry: Entry) -> bool:
        assert entry.kl is not None
        return any(
            o.kl is not None and o.bytes <= entry.bytes and o.kl <= entry.kl and (o.bytes, o.kl) != (entry.bytes, entry.kl)
            for o in measured
        )

    return [Entry(**{**e.__dict__, "best": e.kl is not None and not beaten(e)}) for e in found]


def notices(found: list[Entry]) -> list[str]:
    """What makes a comparison unfair or incomplete, in sentences."""
    said = []
    if missing := [entry.name for entry in found if entry.kl is None]:
        said.append(
            f"No divergence was measured for {', '.join(missing)}: compress eval OUT --original MODEL --data TEXT --save."
        )
    if len({entry.base for entry in found}) > 1:
        said.append(f"They were made from different models: {', '.join(sorted({entry.base for entry in found}))}.")
    if len({entry.ids_sha256 for entry in found if entry.ids_sha256}) > 1:
        said.append("They were measured on different text, so that divergences cannot be compared.")
    return said


@dataclass(frozen=True)
class Point:
    """A checkpoint in the chart."""

    x: float
    y: float
    low: float
    high: float
    entry: Entry
    hover: str


@dataclass(frozen=True)
class Chart:
    """Divergence, logarithmic, against bytes."""

    points: list[Point]
    line: str  # through the front
    columns: list[Label]
    rows: list[Label]


def chart(found: list[Entry]) -> Chart | None:
    """Lay out the front; None where fewer than two checkpoints were measured."""
    measured = [entry for entry in found if entry.kl is not None and entry.kl > 0]
    if len(measured) < 2:
        return None
    left, top, right, bottom = _MARGIN
    smallest, largest = min(e.bytes for e in measured), max(e.bytes for e in measured)
    room = (largest - smallest) * 0.08 or largest * 0.05
    low_x, high_x = smallest - room, largest + room
    ends = [value for e in measured for value in (e.kl_interval or (e.kl, e.kl)) if value and value > 0]
    low_y, high_y = math.log10(min(ends)) - 0.1, math.log10(max(ends)) + 0.1

    def x(size: float) -> float:
        return left + (size - low_x) / (high_x - low_x) * (WIDTH - left - right)

    def y(kl: float) -> float:
        return top + (high_y - math.log10(max(kl, 10**low_y))) / (high_y - low_y) * (HEIGHT - top - bottom)

    points = []
    for e in measured:
        assert e.kl is not None
        within = e.kl_interval or (e.kl, e.kl)
        hover = f"{e.name}: {human_bytes(e.bytes)}, KL {e.kl:.5f}, {e.bits_per_compressed_weight:.3f} bits per compressed weight"
        points.append(Point(x(e.bytes), y(e.kl), y(within[0]), y(within[1]), e, hover))
    best = [point for point in points if point.entry.best]
    line = "M" + "L".join(f"{point.x:.1f} {point.y:.1f}" for point in best) if len(best) > 1 else ""
    steps = [s * 10.0**p for p in range(math.floor(low_y), math.ceil(high_y) + 1) for s in (1, 2, 5)]
    rows = [Label(left - 8, y(value), f"{value:g}") for value in steps if low_y <= math.log10(value) <= high_y]
    apart = next(s * 10.0**p for p in range(15) for s in (1, 2, 5) if (high_x - low_x) / (s * 10.0**p) <= 6)
    sizes = [apart * n for n in range(math.ceil(low_x / apart), math.floor(high_x / apart) + 1)]
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")) if high_x >= pair[0] or pair[0] == 1)
    digits = max(0, math.ceil(math.log10(unit / apart) - 1e-9))
    columns = [Label(x(size), HEIGHT - bottom + 28, f"{size / unit:.{digits}f} {name}") for size in sizes]
    return Chart(points, line, columns, rows)
