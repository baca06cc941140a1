"""Charts drawn by matplotlib: what is where, in colours of the page, and the same bytes every time."""

from __future__ import annotations

import re
import time
from xml.etree import ElementTree

import pytest
from pages import EVIL, dense, moe, site

from compress.report import charts
from compress.report import svg as drawing
from compress.report.comparison import Entry


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def points(path: str) -> list[list[tuple[float, float]]]:
    """The lines of a path."""
    path = re.sub(r"M(\S+) (\S+?)H(\d[\d.]*)", r"M\1 \2L\3 \2", path)
    lines = [line for line in path.split("M") if line]
    return [[(float(x), float(y)) for x, y in (pair.split() for pair in line.rstrip("z").split("L"))] for line in lines]


def strokes(svg: str, colour: str) -> list[list[list[tuple[float, float]]]]:
    """The lines of each path of a colour."""
    return [points(e.attrib["d"]) for e in parsed(svg).iter("path") if f"stroke: var(--{colour})" in e.attrib.get("style", "")]


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("title")]


def entry(name: str, size: int, kl: float | None, best: bool = False) -> Entry:
    interval = None if kl is None else (kl * 0.9, kl * 1.1)
    return Entry(name, name, "base", size, 6.0, 4.0, ["quant/rtn"], 9.0, 30.0, kl, interval, 0.9, "a", best)


def outlined(text: str) -> charts.HeatMap:
    """Two by three fields, of which one has a fallback and one is not there."""
    cells = {(r, c): charts.Cell(r + c, (f"{r}{c}",), f"{r}{c}") for r in range(2) for c in range(3) if (r, c) != (1, 2)}
    cells[0, 1] = charts.Cell(1, ("01", "; cold"), "01", True)
    names = [str(c) for c in range(3)]
    return charts.HeatMap("title", "caption", [text, "b"], names, cells, "{row}/{column}: {0}{1}", names, "unit", [])


def test_fields_are_where_the_script_looks_for_them() -> None:
    drawn = drawing.heat_map(outlined("a"))
    left, wide, high = (drawn.hover[key] for key in ("left", "wide", "high"))
    seen = {}
    for level in range(4):
        for line in [line for path in strokes(drawn.svg, f"s{level}") for line in path]:
            (x, y), (end, _) = line
            assert 0.8 * wide < end - x < wide
            seen[int(y // high), int(((x + end) / 2 - left) // wide)] = level
    assert seen == {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 1, (1, 1): 2}
    [[box]] = strokes(drawn.svg, "accent")
    assert box[0] == box[-1] and left + wide == pytest.approx(box[0][0], abs=0.02) and len(box) == 5
    assert drawn.hover["fields"] == [[["00"], ["01", "; cold"], ["02"]], [["10"], ["11"], 0]]
    texts = [e.text for e in parsed(drawn.svg).iter("text")]
    assert {"a", "b", "0", "1", "2", "00", "01", "02", "10", "11"} == set(texts)


def test_a_panel_shows_errors_upwards_and_breaks_where_there_are_none() -> None:
    rows = [site(f"m.{b}", b, "k", 0.001 * 4**b) for b in (0, 1, 3)] + [site("m.2", 2, "other", 0.02)]
    svg = drawing.panel(charts.error_panels(rows)[0])
    (joined,), dots, alone, dot = strokes(svg, "s6")
    assert len(joined) == 2 and dots == [[joined[0]] * 2, [joined[1]] * 2] and alone == dot
    (first, second), (last, _) = joined, alone[0]
    assert first[0] < second[0] < last[0] and first[1] > second[1] > last[1]
    # Logarithmic: from block 1 to 3 it is twice as far up as from 0 to 1.
    assert (second[1] - last[1]) / (first[1] - second[1]) == pytest.approx(2, abs=0.01)
    assert titles(svg) == [f"k, block {b}: error {0.001 * 4**b:.3g}" for b in (0, 1, 3)]
    assert "band" not in svg and not [e for e in parsed(svg).iter("path") if "var(--s3)" in e.attrib["style"]]
    several = charts.error_panels([*rows, site("n.0", 0, "k", 0.009), site("n.1", 1, "k", 0.02)])[0]
    [band, *_] = [e for e in parsed(drawing.panel(several)).iter("path") if "fill: var(--s3)" in e.attrib["style"]][:1]
    ends = [y for _, y in points(band.attrib["d"])[0]]
    assert max(ends) == pytest.approx(first[1], abs=0.02), "its lower edge is the least error"


def test_the_front_has_divergence_upwards_and_bytes_to_the_right() -> None:
    found = [entry("small", 100, 0.5, True), entry("worse", 500, 0.6), entry("middle", 500, 0.02, True), entry("none", 50, None)]
    for size in ((), (360.0, 340.0)):
        svg = drawing.front(found, *size)
        line, *best = strokes(svg, "best")
        (small,), (middle,) = ([run[0] for run in dot] for dot in best)
        assert line == [[small, middle]] and small[0] < middle[0] and small[1] < middle[1]
        [[(worse, _)]] = strokes(svg, "rest")
        assert worse[0] == middle[0] and worse[1] < small[1]
        (low, high), *_ = strokes(svg, "soft")[0]
        assert low[1] > small[1] > high[1]
        assert "small: 100 B, KL 0.50000, 4.000 bits per compressed weight" in titles(svg)
        assert {"small", "worse", "middle"} <= {e.text for e in parsed(svg).iter("text")}
    assert drawing.front(found[:1]) == ""


def every() -> list[str]:
    rows = [*dense(3), *moe(2, 4)]
    maps = [charts.bits_map(rows), charts.expert_map(rows)]
    return [
        *(drawing.heat_map(one).svg for one in maps if one is not None),
        *(drawing.panel(one) for one in charts.error_panels(rows)),
        drawing.front([entry("a", 100, 0.5, True), entry("b", 500, 0.6)]),
    ]


def test_same_input_same_bytes_in_colours_of_the_page() -> None:
    first = every()
    assert first == every()
    for svg in first:
        assert not re.search(r"#[0-9a-fA-F]{3,6}|url\(|href|<defs|<style|metadata|font|id=|xmlns", svg)
        assert not [e for e in parsed(svg).iter() if re.search(r"\d\.\d{3}", e.attrib.get("d", "") + e.attrib.get("x", ""))]
        assert parsed(svg).attrib["role"] == "img" and parsed(svg).attrib["aria-label"]
        assert parsed(svg).attrib["viewBox"].startswith("0 0 ")


def test_hostile_names_are_only_text() -> None:
    name = EVIL + "\n$\\frac{1}$ \x00\ud800 é漢"
    shown = " ".join(name.split()).replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    svg = drawing.heat_map(outlined(name)).svg
    assert "<script" not in svg and f"…{shown[-39:]}" in [e.text for e in parsed(svg).iter("text")]
    panel = charts.error_panels([site("m", 0, name)])[0]
    assert titles(drawing.panel(panel)) == [f"{shown}, block 0: error 0.01"]
    assert shown in parsed(drawing.panel(panel)).attrib["aria-label"]
    front = drawing.front([entry(name, 1, 0.5), entry("b", 2, 0.4)])
    assert shown in [e.text for e in parsed(front).iter("text")]


def test_a_large_map_is_small_and_quick() -> None:
    shown = charts.expert_map(moe(61, 256))
    assert shown is not None
    drawing.heat_map(outlined("a"))  # loads matplotlib
    start = time.process_time()
    drawn = drawing.heat_map(shown)
    assert time.process_time() - start < 1.5
    assert len(drawn.svg) < 400_000
    assert sum(len(path) for level in range(charts.LEVELS) for path in strokes(drawn.svg, f"s{level}")) == 61 * 256
