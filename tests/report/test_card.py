"""The model card and the report, from files made by hand: no model, no torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from pages import EVIL, SECRET, checkpoint, dense, measure, moe, site

from compress.report import card, charts, notices
from compress.report import summary as facts
from compress.system.files import duration

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in the order in which they were opened, and collects what was seen."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, spaces folded."""
        return " ".join("".join(self.texts).split())

    def count(self, tag: str) -> int:
        """How many elements of a name there are."""
        return sum(name == tag for name, _ in self.seen)


def made(folder: Path) -> tuple[str, str]:
    """Write both files and return them."""
    card.write(folder)
    return (folder / "README.md").read_text(), (folder / "report.html").read_text()


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_front_matter_of_a_hub_model(tmp_path: Path) -> None:
    data = {"name": "c4", "samples": 32, "length": 128, "seed": 0}
    folder = checkpoint(
        tmp_path / "out", dense(), data, base_model="org/tiny-llama", base_revision="abc123", card={"license": "apache-2.0"}
    )
    text, page = made(folder)
    values = ModelCard.load(folder / "README.md").data.to_dict()
    assert values == {
        "base_model": "org/tiny-llama",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["allenai/c4"],
        "tags": ["compress", "quantized", "4-bit"],
    }
    assert "compress run recipe.yaml org/tiny-llama --revision abc123 -o OUT --device cpu" in text
    assert "https://huggingface.co/org/tiny-llama" in page


def test_front_matter_of_a_local_model(tmp_path: Path) -> None:
    made(checkpoint(tmp_path / "out", dense()))
    values = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert set(values) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    "base", [f"{SECRET}/tiny-llama", "models/tiny-llama", "~/tiny-llama", "C:\\Users\\jane\\secret\\tiny-llama"]
)
def test_no_local_path_is_published(tmp_path: Path, base: str) -> None:
    folder = checkpoint(tmp_path / "out", dense(), base_model=base, description=f"as in {SECRET}/notes, from jane/text")
    measure(folder)
    for text in made(folder):
        assert "tiny-llama" in text and "text.jsonl" in text and "heldout.npy" in text
        assert all(word not in text for word in ("secret", "/home", "Users", "models/", str(tmp_path)))
        assert "base_model:" not in text
        assert "as in notes, from jane/text" in text


def test_the_cache_of_the_hub_is_no_local_model(tmp_path: Path) -> None:
    base = f"{SECRET}/hub/models--org--tiny-llama/snapshots/0123abcd"
    text, _ = made(checkpoint(tmp_path / "out", dense(), base_model=base))
    assert "base_model: org/tiny-llama\n" in text and "--revision 0123abcd" in text and "secret" not in text


def test_every_figure_is_shown(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", dense())
    measure(folder)
    text, page = made(folder)
    shared = [
        "3.00 MB",
        "1.00 MB",
        "4.125",
        "5.333",
        "12.331",
        "12.418",
        "0.00861",
        "0.00011",
        "95.83%",
        "214.3",
        "231.9",
        "2.1 min",
        "1.0 min",
    ]
    shared += [
        "c" * 64,
        "d" * 64,
        "e" * 64,
        "f" * 64,
        "2.13.0",
        "import compress",
        "compress verify .",
        "group_size: 128",
        "seed 7",
    ]
    shared += ["--data heldout.npy --samples 16 --length 128", "--original tiny-llama", "model.safetensors"]
    for value in shared:
        assert value in text, value
        assert value in page, value
    assert text.split("```python\n")[1].startswith("import compress")
    assert "-0.7" not in page and "+0.71%" in Page(page).text


def test_both_are_well_formed_and_fetch_nothing(tmp_path: Path) -> None:
    rows = [*dense(), site("lm_head", None, "lm_head"), *moe(2, 4)]
    page = Page(made(checkpoint(tmp_path / "out", rows))[1])
    assert page.count("svg") == 5 + 2  # five kinds in blocks, two maps
    assert sum(values.get("class") == "tree" for _, values in page.seen) == 1
    for _, attributes in page.seen:
        assert not {"src", "srcset", "data"} & set(attributes)
    assert "url(" not in (tmp_path / "out" / "report.html").read_text()


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    rows = [replace(row, site=EVIL, kind=EVIL, method=EVIL, fallback=EVIL, notes={EVIL: EVIL}) for row in moe(1, 2)]
    folder = checkpoint(
        tmp_path / "out", rows, description=f"{EVIL}\n```\n# loud\n````\n</pre>", base_model=EVIL, files={EVIL: EVIL}
    )
    measure(folder, data=EVIL, device=EVIL, dtype=EVIL, original=EVIL)
    change_config(folder, model_type=EVIL, architectures=[EVIL])
    text, html = made(folder)
    page = Page(html)
    assert page.count("script") == 2  # the data of the maps, and the page's own
    assert "alert(1)" in page.text
    assert not any(name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert [a["href"] for tag, a in page.seen if tag == "a"] == []
    front, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["library_name"] == "transformers"
    # What a renderer of Markdown makes of it, one that lets HTML through.
    rendered = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    assert not {"script", "a"} & {tag for tag, _ in rendered.seen}
    assert "alert(1)" in rendered.text and rendered.text.count("# loud") == 1  # in the recipe, which its fence holds together
    assert [tag for tag, _ in rendered.seen if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 7
    assert rendered.count("table") == 5


def test_a_measurement_refreshes_both(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", dense())
    before = made(folder)
    assert all("Quality was not measured" in text and "compress eval . --data TEXT" in text for text in before)
    measure(folder)
    after = made(folder)
    assert all("Quality was not measured" not in text and "12.418" in text for text in after)
    (folder / "evaluation.json").unlink()
    assert made(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", "config.json", "recipe.yaml", "report.html", "report.jsonl", "summary.json"]
    )


def test_a_measurement_without_an_original(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", dense())
    missing = (
        "original",
        "perplexity_before",
        "kl",
        "kl_standard_error",
        "agreement",
        "tokens_per_second",
        "tokens_per_second_before",
    )
    measure(folder, **dict.fromkeys(missing))
    for text in made(folder):
        assert "12.418" in text and "--original" not in text and "None" not in text


def test_notices(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "out", [*dense(), *moe(3, 8), site("model.layers.0.bad", 0, "bad", 1.5)])
    measure(folder, ids_sha256="c" * 64)
    change_config(folder, tie_word_embeddings=False)
    text = " ".join(notice.text for notice in notices.notices(facts.Checkpoint.read(folder)))
    cold = sum(row.fallback is not None for row in moe(3, 8))
    for sentence in (
        "measured on the calibration data itself",
        f"{cold} of 77 matrices were compressed by a fallback",
        "No calibration token reached 1 expert in 1 block.",
        "The output head (3.07k weights), not tied to the embeddings",
        "The largest error is that of model.layers.0.bad: 1.5",
        "1 matrix has an error of 1 or more",
        "2 matrices had input columns that were zero",
    ):
        assert sentence in text, sentence


def test_without_calibration(tmp_path: Path) -> None:
    rows = [replace(row, tokens=None, method="quant/rtn") for row in dense()]
    text, page = made(checkpoint(tmp_path / "out", rows, {"name": "c4", "samples": 1, "length": 32, "seed": 0}))
    assert "No calibration data was used" in text and "No calibration data was used" in page
    assert "datasets" not in text and "c" * 64 not in text


@pytest.mark.parametrize("error", [0.0, float("nan"), float("inf"), 1e-30])
def test_any_error_can_be_drawn(tmp_path: Path, error: float) -> None:
    rows = [*dense(), site("model.layers.1.x", 1, "self_attn.q_proj", error)]
    page = Page(made(checkpoint(tmp_path / "out", rows))[1])
    drawn = " ".join(str(a.get("d", "")) for _, a in page.seen)
    assert drawn.strip() and not re.search(r"nan|inf|-\d", drawn), "every point is within the drawing"


def test_nothing_compressed(tmp_path: Path) -> None:
    text, page = made(checkpoint(tmp_path / "out", []))
    assert "nothing compressed" in text
    assert "0-bit" not in text and Page(page).count("svg") == 0 and 'class="tree"' in page


def test_a_large_mixture_stays_a_small_file(tmp_path: Path) -> None:
    rows = moe(60, 256)
    folder = checkpoint(tmp_path / "out", rows)
    text, html = made(folder)
    page = Page(html)
    assert len(html.encode()) < 1_000_000 and len(text) < 50_000
    assert "The 200 matrices with the largest errors, of 46,080" in page.text
    table = [index for index, (tag, a) in enumerate(page.seen) if a.get("class") == "sortable"]
    assert sum(tag == "tr" for tag, _ in page.seen[table[0] :]) == 1 + card.SHOWN
    outlines = [str(a["d"]) for tag, a in page.seen if tag == "path" and "stroke: var(--accent)" in str(a.get("style"))]
    cold = {(row.block, row.expert) for row in rows if row.fallback is not None}
    assert [line.count("M") for line in outlines] == [len(cold)]


def test_one_block(tmp_path: Path) -> None:
    page = Page(made(checkpoint(tmp_path / "out", dense(1)))[1])
    assert sum(values.get("class") == "hit" for _, values in page.seen) == 2


def test_bits_have_one_scale() -> None:
    same = charts.bits_map(dense())
    assert same is not None and len(same.legend) == 1 and "All compressed matrices take 4.125" in same.caption
    many = [site(f"m.{b}", b, "k") for b in range(20)]
    many = [replace(row, stored_bits=row.numel * (2 + b) // 4) for b, row in enumerate(many)]
    spread = charts.bits_map(many)
    assert spread is not None
    assert {0: 1, 19: charts.LEVELS - 1}.items() <= {c: cell.level for (_, c), cell in spread.cells.items()}.items()


def test_a_block_may_lack_the_kind() -> None:
    rows = [site(f"m.{b}", b, "k") for b in (0, 1, 3)] + [site("m.2", 2, "other")]
    panel = charts.error_panels(rows)[0]
    assert [spread is None for spread in panel.spreads] == [False, False, True, False]


def test_axis_holds_all_errors() -> None:
    panel = charts.error_panels([site("a", 0, "k", 0.0003), site("b", 1, "k", 0.04), site("c", 1, "k", float("nan"))])[0]
    assert panel.axis == pytest.approx((0.0002, 0.05))
    assert panel.several and panel.spreads[1] is not None and panel.spreads[1].high == float("inf")
    assert charts.axis_over([]) == pytest.approx((1, 2)) and charts.axis_over([0.5, 0.5]) == pytest.approx((0.5, 1))


def test_small_words() -> None:
    assert charts.ranges([5, 0, 1, 2]) == "0-2, 5"
    assert [charts.compact(n) for n in (0, 999, 1000, 61_000, 999_600, 3.2e9)] == ["0", "999", "1k", "61k", "1M", "3.2G"]
    assert [duration(s) for s in (9.96, 125, 7200)] == ["10.0 s", "2.1 min", "2.0 h"]


def test_needs_no_torch() -> None:
    code = "import sys, compress.report.card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
