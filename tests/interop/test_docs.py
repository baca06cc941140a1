"""The table of docs/export.md is what the code does."""

from __future__ import annotations

import re
from typing import Any

import pytest
from places import ROOT

from compress import registry
from compress.errors import FormatError
from compress.methods.method import table_described, uniform_described

TEXT = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
SHAPE = (128, 128)
COLUMNS = ("compressed-tensors", "gptq", "awq", "gguf")
ROW = re.compile(r"^\| (symmetric|zero points), ([^|]*?) bits? \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)


def cases() -> list[tuple[str, int, list[str]]]:
    found = []
    for match in ROW.finditer(TEXT):
        numbers = [int(n) for n in re.findall(r"\d", match[2])]
        widths = range(numbers[0], numbers[-1] + 1) if " to " in match[2] else numbers
        found += [(match[1], bits, [cell.strip() for cell in match.groups()[2:]]) for bits in widths]
    return found


def held(name: str, spec: dict[str, Any]) -> str:
    """What a layout makes of a description, in the words of the table."""
    try:
        scheme = registry.lookup("export", name.replace("-", "_")).scheme(spec, "F16")
    except FormatError:
        return "-"
    if name == "gguf":
        return str(scheme.kind)
    return "=" if scheme.bits == spec["base"].get("bits") else str(scheme.bits)


@pytest.mark.parametrize(("grid", "bits", "cells"), cases())
def test_grids(grid: str, bits: int, cells: list[str]) -> None:
    spec = uniform_described(SHAPE, bits, 32, zero=grid == "zero points").spec
    assert [held(name, spec) for name in COLUMNS] == cells


def test_the_table_has_all_widths() -> None:
    assert [bits for grid, bits, _ in cases() if grid == "symmetric"] == list(range(1, 9))
    assert [bits for grid, bits, _ in cases() if grid == "zero points"] == list(range(2, 9))


@pytest.mark.parametrize(
    ("datatype", "scale", "cells"),
    [
        ("fp3", "bfloat16", ["4", "4", "4", "Q4_0"]),
        ("fp4", "bfloat16", ["5", "8", "-", "Q5_0"]),
        ("fp4", "e8m0", ["5", "8", "-", "MXFP4"]),
        ("nf4", "bfloat16", ["-", "-", "-", "-"]),
        ("bitmod-fp4", "uint8", ["-", "-", "-", "-"]),
    ],
)
def test_tables_of_values(datatype: str, scale: str, cells: list[str]) -> None:
    spec = table_described(SHAPE, datatype, 32, scale).spec
    assert [held(name, spec) for name in COLUMNS] == cells
