"""Tasks through lm-eval, from local files and offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from places import ROOT
from runs import compress, steps
from tasks import write_tasks

from compress.errors import RecipeError
from compress.evaluation import tasks
from compress.evaluation.quality import measure, save
from compress.recipe.data import Data

DEMO = ROOT / "examples" / "demo"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four tasks, made of the demo's text."""
    lines = (DEMO / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    return write_tasks(tmp_path_factory.mktemp("tasks"), DEMO, [json.loads(line)["text"] for line in lines])


def test_the_original_knows_copies_and_agrees_with_itself(folder: Path) -> None:
    found = tasks.scores(str(DEMO), [str(folder)], CPU)
    assert set(found) == {"agreement", "cloze", "copying", "retrieval"}
    # Batches are padded, so that a token may change where two are as likely.
    assert found["agreement"]["metric"] == "exact_match" and found["agreement"]["value"] > 0.8
    assert 0 <= found["agreement"]["standard_error"] < 0.2
    assert found["cloze"]["value"] >= 0.75
    assert found["copying"]["value"] >= 0.5  # a model of 5.8 M parameters copies little
    assert 0 <= found["retrieval"]["value"] <= 1


def test_a_ruined_model_fails_what_the_original_passes(folder: Path, tmp_path: Path) -> None:
    """One bit without calibration: and the scores stand beside those of the original, on screen, in the report and the card."""
    out = tmp_path / "out"
    compress(DEMO, out, None, steps("quant/rtn", bits=1, group_size=-1))
    data = Data(name=str(DEMO / "evaluation.jsonl"), samples=4, length=64)
    found = measure(str(out), str(DEMO), data, "cpu", "float32", False, lambda *_: None, [str(folder)], limit=8)
    assert found.tasks is not None
    assert found.tasks["agreement"]["before"] > 0.8
    assert found.tasks["agreement"]["model"] < 0.5
    score = found.tasks["cloze"]
    assert score["chance"] == 0.5, "one of two endings"
    assert score["retained"] == pytest.approx((score["model"] - 0.5) / (score["before"] - 0.5))
    assert found.tasks["agreement"]["chance"] == 0
    save(out, found)
    assert "| agreement, exact\\_match | " in (out / "README.md").read_text()
    assert "agreement" in (out / "report.html").read_text()


def test_what_is_kept_is_counted_from_guessing() -> None:
    assert tasks.retained(0.625, 0.75, 0.25) == 0.75
    assert tasks.retained(0.2, 0.75, 0.25) == pytest.approx(-0.1), "worse than guessing"
    assert tasks.retained(0.5, 0.25, 0.25) is None
    assert tasks.retained(0.5, None, 0.25) is None


def test_what_is_not_a_task(folder: Path, tmp_path: Path) -> None:
    assert tasks.split([str(folder / "cloze.yaml"), "hellaswag"]) == ([str(folder)], ["cloze", "hellaswag"])
    with pytest.raises(RecipeError, match="no such file or folder"):
        tasks.split(["nowhere/tasks.yaml"])
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(RecipeError, match="holds no task"):
        tasks.split([str(tmp_path)])
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(RecipeError, match="cannot be read"):
        tasks.split([str(tmp_path / "broken.yaml")])
