"""A treemap of bytes: rectangles whose areas are sizes, as near to squares as can be, in the order of size.

M. Bruls, K. Huizing, J. J. van Wijk, Squarified Treemaps (2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.system.files import human_bytes

WIDTH, HEIGHT = 960.0, 300.0


@dataclass(frozen=True)
class Box:
    """One rectangle."""

    x: float
    y: float
    width: float
    height: float
    label: str
    size: str
    hover: str
    level: int  # shade

    @property
    def left(self) -> float:
        """Where it begins, in percent of the width."""
        return 100 * self.x / WIDTH

    @property
    def top(self) -> float:
        """Where it begins, in percent of the height."""
        return 100 * self.y / HEIGHT

    @property
    def across(self) -> float:
        """How wide it is, in percent."""
        return 100 * self.width / WIDTH

    @property
    def down(self) -> float:
        """How high it is, in percent."""
        return 100 * self.height / HEIGHT


def _worst(row: Sequence[float], side: float) -> float:
    """The largest ratio of sides in a row of areas laid along `side`."""
    total = sum(row)
    return max(max(side * side * area / total**2, total**2 / (side * side * area)) for area in row)


def layout(areas: Sequence[float], x: float, y: float, width: float, height: float) -> list[tuple[float, float, float, float]]:
    """Return x, y, width and height of rectangles for areas in falling order that fill a rectangle."""
    left = list(areas)
    result = []
    while left:
        side = min(width, height)
        row = [left[0]]
        while len(row) < len(left) and _worst([*row, left[len(row)]], side) <= _worst(row, side):
            row.append(left[len(row)])
        thick = sum(row) / side if side else 0.0
        along = 0.0
        for area in row:
            length = area / thick if thick else 0.0
            if width >= height:
                result.append((x, y + along, thick, length))
            else:
                result.append((x + along, y, length, thick))
            along += length
        if width >= height:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
        left = left[len(row) :]
    return result


def treemap(sizes: Sequence[tuple[str, int, bool, str]]) -> list[Box]:
    """Lay out (label, bytes, compressed, note); those without bytes are left out."""
    ordered = sorted((item for item in sizes if item[1] > 0), key=lambda item: (-item[1], item[0]))
    total = sum(item[1] for item in ordered)
    if not total:
        return []
    areas = [item[1] / total * WIDTH * HEIGHT for item in ordered]
    return [
        Box(
            *place,
            label,
            human_bytes(size),
            f"{label}{note}, {size / total:.1%}: {human_bytes(size)}",
            6 if compressed else 3,
        )
        for place, (label, size, compressed, note) in zip(layout(areas, 0.0, 0.0, WIDTH, HEIGHT), ordered, strict=True)
    ]
