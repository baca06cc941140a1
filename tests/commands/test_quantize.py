"""`compress quantize`: the checkpoint, the table on the terminal, JSON, a dry run, and a job that is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import Run, header, specs, summary, tree
from runs import ids_file
from transformers import AutoModelForCausalLM

import compress.checkpoint.source


def test_quantize_gives_a_checkpoint_and_a_table(quantize: Run, model: Path, tmp_path: Path) -> None:
    done = quantize()
    out = tmp_path / "out"
    assert done.code == 0
    assert all(text in done.out for text in ("size", "bits per weight", str(out / "report.html"), "import compress"))
    assert "block 1/1" in done.err
    assert {spec["base"]["bits"] for spec in specs(out)} == {4}
    assert not (tmp_path / "out.job").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 96
    before, after = summary(out)["bytes_before"], summary(out)["bytes_after"]
    assert before == (model / "model.safetensors").stat().st_size - header(model / "model.safetensors")
    assert after == (out / "model.safetensors").stat().st_size - header(out / "model.safetensors")


def test_a_finished_job_is_not_done_again(quantize: Run, tmp_path: Path) -> None:
    quantize()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    done = quantize()
    assert done.code == 0
    assert "is there already, made by the same job" in done.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_dry_run_writes_nothing(quantize: Run, model: Path, tmp_path: Path) -> None:
    before = tree(model)
    text, plain = quantize("--dry-run"), quantize("--dry-run", "--json")
    assert (text.code, plain.code) == (0, 0)
    assert not list(tmp_path.iterdir())
    assert tree(model) == before
    assert "self_attn.q_proj" in text.out
    assert "12 windows of 16 tokens" in text.out
    found = plain.json
    assert found["calibration"] == {"samples": 12, "length": 16}
    assert found["bytes_after_exact"]
    quantize()
    assert summary(tmp_path / "out")["bytes_after"] == found["bytes_after"]
    assert summary(tmp_path / "out")["bytes_before"] == found["bytes_before"]


def test_json_is_all_that_goes_to_standard_output(quantize: Run, tmp_path: Path) -> None:
    done = quantize("--json")
    assert done.code == 0
    assert done.err == ""
    found = done.json
    assert found["output"] == str(tmp_path / "out")
    assert found["files"] == summary(tmp_path / "out")["files"]
    assert found["bytes_after"] < found["bytes_before"]
    assert found["evaluation"] is None


def test_masks_are_refused_by_other_layouts_before_the_run(run: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{match: '*.*', method: prune/magnitude, options: {bits: 4, group_size: 16}}]\n")
    out = tmp_path / "out"
    done = run("run", recipe, model, "-o", out, "--data", ids, "--device", "cpu", "--format", "gptq")
    assert (done.code, out.exists(), out.with_name("out.job").exists()) == (2, False, False)
    assert "keep" in done.err


def test_a_revision_reaches_the_hub_and_the_model_card(
    quantize: Run, run: Run, model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, revision: str | None) -> tuple[Path, str]:
        asked.append((name, revision))
        return model, "c0ffee"

    monkeypatch.setattr(compress.checkpoint.source, "_fetch", fetch)
    text = ids_file(tmp_path / "text.npy", samples=2)
    common = ["--device", "cpu", "--data", ids, "--group-size", 16]
    done = run("quantize", "some/model", "-o", tmp_path / "out", *common, "--revision", "v2", "--evaluate", text, "--json")
    assert done.code == 0, done.err
    assert asked == [("some/model", "v2")], "and the evaluation compares with the same revision"
    assert done.json["base_revision"] == "c0ffee"
    assert done.json["evaluation"]["original"] == "some/model"
    assert "some/model" in (tmp_path / "out" / "README.md").read_text()


def test_tables_keep_a_row_on_a_line_when_piped(quantize: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a user's own width is kept
    rows = [line for line in quantize("--dry-run").out.splitlines() if "quant/gptq" in line]
    assert len(rows) == 7
    assert all("group_size=16" in row and "…" not in row for row in rows)


def test_group_sizes_are_chosen_and_said_once(run: Run, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A width that 128 does not divide, next to one that it does."""
    folder = tiny("llama", hidden_size=96, intermediate_size=128)
    common = ("quantize", folder, "-o", tmp_path / "out", "--method", "rtn", "--device", "cpu", "--no-reload")
    note = "group_size: 32 columns for 18 weights whose number of columns 128 does not divide"
    dry = run(*common, "--dry-run", "--json")
    assert dry.json["notes"] == [note]
    done = run(*common)
    assert done.code == 0, done.err
    assert done.out.count(note) == 1
    assert {spec["base"]["group_size"] for spec in specs(tmp_path / "out")} == {32, 128}
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"][0]["options"]["group_size"] == "auto"
    given = run(*common, "--group-size", "24", "--dry-run", "--json")
    assert given.code == 2
    assert "is not a multiple of group_size=24; use" in given.err
    wrong = run(*common, "--group-size", "much", "--dry-run")
    assert "group_size: expected a number of columns, -1 for the whole row, or auto (got 'much')" in wrong.err
