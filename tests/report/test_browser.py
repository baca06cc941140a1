"""Reports and comparisons as a user sees them: opened in a headless Chromium at desktop and phone width.

What needs no browser (well-formed, nothing fetched, every figure there) is in test_card.py and test_front.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from browser import EXECUTABLES, Browser, browser, executable
from matplotlib.image import imread
from pages import EVIL, checkpoint, dense, measure, moe, site
from runs import compress, steps

from compress.report import card
from compress.report import comparison as front

Tiny = Callable[..., Path]
pytestmark = pytest.mark.skipif(executable() is None, reason=f"needs a Chromium in PATH, one of {', '.join(EXECUTABLES)}")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


class Case(NamedTuple):
    """A page and what must be on it."""

    page: Path
    drawings: int  # at least
    words: tuple[str, ...]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, ids: Path) -> dict[str, Case]:
    """A real run on experts, a large report with names as hostile and as long as they come, and a comparison."""
    root = tmp_path_factory.mktemp("pages")
    compress(tiny("mixtral"), root / "real", ids, steps(bits=3, group_size=16))
    many = [*dense(48), *moe(6, 64), site(f"model.{'very_' * 30}long.weight", 1, f"{'very_' * 30}long"), site(EVIL, 2, EVIL)]
    large = checkpoint(
        root / "large",
        many,
        base_model="org/" + "long-name-" * 12,
        description=EVIL,
        bytes_before=24_000_000,
        bytes_after=8_000_000,
    )
    measure(large, perplexity_interval=[12.3, 12.5], kl_interval=[0.0084, 0.0088], agreement_interval=[0.957, 0.959])
    card.write(large)
    small = checkpoint(root / f"a-{'longer-' * 12}name", dense(), bytes_after=400_000)
    measure(small, kl=0.2, kl_interval=[0.1, 0.3])
    card.write_comparison(front.entries([large, small, root / "real"]), root / "page.html")
    return {
        "real": Case(
            root / "real" / "report.html", 10, ("Calibration tokens by expert", "Error by block", "Predicted and measured")
        ),
        "large": Case(large / "report.html", 10, ("Worth knowing", "0.00861", "1,250 compressed matrices")),
        "comparison": Case(root / "page.html", 2, ("Divergence against size", "0.20000", "8.00 MB")),
    }


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["real", "large", "comparison"])
def test_pages_at_both_widths(name: str, width: int, chromium: Browser, cases: dict[str, Case]) -> None:
    case = cases[name]
    seen = chromium.look(case.page, width, opened=True)
    assert seen.said == []
    assert seen.asked == []
    assert seen.wide == width, "the page must be as wide as the screen, not scaled"
    assert seen.scrolled <= width, "nothing may make the page scroll sideways"
    assert seen.out == []
    assert len(seen.drawings) >= case.drawings
    assert all(high >= 1 and wide >= 1 for wide, high in seen.drawings)
    assert min(seen.small, default=1.0) > 0.35
    for word in case.words:
        assert word in seen.text
    picture = imread(io.BytesIO(seen.picture))
    assert picture.shape[1] == width and picture.shape[0] == seen.high
    painted = (abs(picture[..., :3] - picture[0, 0, :3]).max(-1) > 0.1).mean()
    assert 0.02 < painted < 0.9, "a page with text and drawings is neither blank nor full"


def test_tables_are_sorted_by_a_click(chromium: Browser, cases: dict[str, Case]) -> None:
    first = "document.querySelector('table.sortable tbody tr').cells[4].dataset.v"
    with chromium.opened(cases["real"].page, 1280) as session:
        worst = float(chromium.evaluate(session, first))
        chromium.evaluate(session, "document.querySelectorAll('table.sortable button')[4].click()")
        least = float(chromium.evaluate(session, first))
    assert least < worst


def test_a_map_says_what_is_under_the_pointer(chromium: Browser, cases: dict[str, Case]) -> None:
    point = """((map, row, column) => {
      const svg = document.querySelectorAll("svg.map")[map], box = svg.getBoundingClientRect();
      const hover = JSON.parse(document.getElementById("maps").textContent)[map];
      const x = box.left + hover.left + (column + 0.5) * hover.wide, y = box.top + (row + 0.5) * hover.high;
      svg.dispatchEvent(new MouseEvent("mousemove", { clientX: x, clientY: y }));
      const tip = document.getElementById("tip");
      return tip.hidden ? "" : tip.textContent;
    })"""
    with chromium.opened(cases["large"].page, 1280) as session:
        said = chromium.evaluate(session, f"{point}(0, 1, 3)")
        assert said == "mlp.down_proj, block 3: 4.125 bits per weight"
        said = chromium.evaluate(session, f"{point}(1, 2, 5)")
        assert said == "block 2, expert 5: 147 tokens, 0.32 of an even share"
        assert "; shrunk Hessian" in chromium.evaluate(session, f"{point}(1, 0, 1)")
        assert chromium.evaluate(session, f"{point}(0, 2, 40)") == "", "there is no such field"


def test_what_is_wrong_is_seen(chromium: Browser, tmp_path: Path) -> None:
    """The checks above find each thing that they look for."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><p style="width:900px">wide</p>'
        '<svg width=0 height=0></svg><img src="http://127.0.0.1:9/x.png">'
        '<script>console.error("said"); setTimeout(() => { throw new Error("thrown") })</script>'
    )
    seen = chromium.look(page, 390)
    assert any("said" in text for text in seen.said) and any("thrown" in text for text in seen.said)
    assert seen.asked == ["http://127.0.0.1:9/x.png"]
    assert seen.scrolled > 390 and seen.out and (0, 0) in map(tuple, seen.drawings)
