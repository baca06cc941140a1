"""Several checkpoints on one page: the front, what is unfair, and a page that fetches nothing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import Run

from compress.errors import CheckpointError
from compress.report import card, treemap
from compress.report import comparison as front


def checkpoint(root: Path, name: str, size: int, kl: float | None, base: str = "demo", ids: str = "a") -> Path:
    folder = root / name
    folder.mkdir()
    summary = {"base_model": base, "bytes_after": size, "bits_per_weight": 6.0, "bits_per_compressed_weight": 4.0, "seconds": 9.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "report.jsonl").write_text('{"method": "quant/rtn"}\n')
    if kl is not None:
        measured = {"perplexity": 30.0, "kl": kl, "kl_interval": [kl * 0.9, kl * 1.1], "agreement": 0.9, "ids_sha256": ids}
        (folder / "evaluation.json").write_text(json.dumps(measured))
    return folder


def test_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    folders = [
        checkpoint(tmp_path, "large", 900, 0.001),
        checkpoint(tmp_path, "small", 100, 0.5),
        checkpoint(tmp_path, "worse", 500, 0.6),
        checkpoint(tmp_path, "middle", 500, 0.02),
        checkpoint(tmp_path, "unmeasured", 50, None),
    ]
    found = front.entries(folders)
    assert [entry.name for entry in found] == ["unmeasured", "small", "middle", "worse", "large"]
    assert [entry.name for entry in found if entry.best] == ["small", "middle", "large"]
    assert any("unmeasured" in text for text in front.notices(found))


def test_equal_ones_are_both_best(tmp_path: Path) -> None:
    found = front.entries([checkpoint(tmp_path, name, 100, 0.5) for name in ("a", "b")])
    assert [entry.best for entry in found] == [True, True]


def test_what_is_unfair_is_said(tmp_path: Path) -> None:
    found = front.entries([checkpoint(tmp_path, "a", 1, 0.1), checkpoint(tmp_path, "b", 2, 0.1, "other", "b")])
    said = " ".join(front.notices(found))
    assert "different models: demo, other" in said and "different text" in said
    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        front.entries([tmp_path])


class Page(HTMLParser):
    """Tags in order, and that they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, "<b>&", 900, 0.001), checkpoint(tmp_path, "small", 100, 0.5)]
    card.write_comparison(front.entries(folders), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [attributes.get("class") for _, attributes in page.tags].count("point") == 4, "for screens and for phones"
    assert not [tag for tag, attributes in page.tags if {"src", "href", "data"} & set(attributes) or tag in ("script", "link")]
    assert "http" not in text and "url(" not in text and "<b>&" not in text
    card.write_comparison(front.entries(folders[:1]), tmp_path / "one.html")
    assert "<svg" not in (tmp_path / "one.html").read_text()


def test_the_command(tmp_path: Path, run: Run) -> None:
    folders = [checkpoint(tmp_path, "large", 900, 0.001), checkpoint(tmp_path, "small", 100, 0.5)]
    page = tmp_path / "page.html"
    done = run("compare", *folders, "-o", page)
    text = done.out
    assert done.code == 0
    assert "small *" in text and "0.00100 [0.00090, 0.00110]" in text
    assert page.exists()
    assert [entry["name"] for entry in run("compare", *folders, "--json").json["checkpoints"]] == ["small", "large"]


# --- the treemap


def test_boxes_fill_the_area_and_do_not_overlap() -> None:
    sizes = [(f"part{n}", (n * 37 % 101 + 1) ** 2, n % 2 == 0, "") for n in range(23)] + [("nothing", 0, True, "")]
    boxes = treemap.treemap(sizes)
    assert len(boxes) == 23
    total = sum(size for _, size, _, _ in sizes)
    by_label = {label: size for label, size, _, _ in sizes}
    for box in boxes:
        assert box.width * box.height == pytest.approx(by_label[box.label] / total * treemap.WIDTH * treemap.HEIGHT)
        assert box.x >= -1e-6 and box.x + box.width <= treemap.WIDTH + 1e-6
        assert box.y >= -1e-6 and box.y + box.height <= treemap.HEIGHT + 1e-6
    for first in boxes:
        for second in boxes:
            if first is not second:
                apart_x = first.x + first.width <= second.x + 1e-6 or second.x + second.width <= first.x + 1e-6
                apart_y = first.y + first.height <= second.y + 1e-6 or second.y + second.height <= first.y + 1e-6
                assert apart_x or apart_y
    assert treemap.treemap([]) == []
