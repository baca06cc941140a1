"""`compress bench`: what it prints, what it writes, and that its figures hang together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import compress, steps
from typer.testing import CliRunner

from compress.cli import app
from compress.errors import RecipeError
from compress.evaluate import bench


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_random_weights(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    arguments = ("--shapes", "64x256, 48x64", "--bits", "4,3", "--group-size", "32", "--tokens", "1,5", "--device", "cpu")
    found = json.loads(run(*arguments, "--json", "-o", str(output)))
    assert json.loads(output.read_text())["rows"] == found["rows"]
    assert [(r["out"], r["columns"], r["stored"], r["tokens"]) for r in found["rows"]] == [
        (*shape, f"{bits}-bit g32", tokens) for shape in ((64, 256), (48, 64)) for bits in (4, 3) for tokens in (1, 5)
    ]
    assert {(r["path"], r["how"]) for r in found["rows"]} == {("int4_cpu", "cpu"), ("torch_reference", "cpu")}
    assert found["device"].startswith("CPU")
    for row in found["rows"]:
        assert row["microseconds"] > 0
        assert row["gain"] == pytest.approx(row["dense"] / row["microseconds"])
        assert row["share"] == pytest.approx(row["floor"] / row["microseconds"])
        assert 0 < row["difference"] < 1e-2  # bfloat16: the product that is timed is the right one
    four, three = (r["floor"] for r in found["rows"][:4:2])
    assert four > three  # fewer bytes


def test_zeros_and_whole_rows_and_float32() -> None:
    text = run(
        "--shapes", "32x96", "--group-size", "-1", "--zero", "--tokens", "2", "--dtype", "float32", "--device", "cpu", "-q"
    )
    assert "32 x 96" in text
    assert "with zeros" in " ".join(text.split())
    assert "torch_reference (cpu)" in text
    assert "kernels for a GPU did not run" in text


def test_activations_in_8_bits() -> None:
    """The difference to the exact product is that of rounding x."""
    arguments = ("--shapes", "64x128", "--tokens", "3", "--dtype", "float32", "--device", "cpu", "--json", "--activation-bits")
    differences = [json.loads(run(*arguments, bits))["rows"][0]["difference"] for bits in ("8", "16")]
    assert 1e-3 < differences[0] < 2e-2
    assert differences[1] < 1e-5


def test_a_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    compress(tiny("llama"), folder, None, steps("quant/rtn", group_size=16))
    found = json.loads(run(str(folder), "--tokens", "1", "--device", "cpu", "--json"))
    assert {(r["out"], r["columns"]) for r in found["rows"]} == {tuple(w.shape) for w in bench.of_model(str(folder))}
    assert found["tokens_per_second"] > 0
    assert found["tokens_per_second_before"] > 0
    assert (
        json.loads(run(str(folder), "--tokens", "1", "--device", "cpu", "--json", "--no-generate"))["tokens_per_second"] is None
    )


def test_what_is_wrong_is_said(tiny: Callable[..., Path]) -> None:
    for arguments, message in (
        ([], "expected a model"),
        (["somewhere", "--shapes", "1x1"], "expected a model, or --shapes"),
        (["--shapes", "64"], "'64' is no shape"),
        (["--shapes", "64x100"], "not a multiple of --group-size 128"),
        (["--shapes", "64x128", "--bits", "9"], "numbers from 1 to 8"),
        (["--shapes", "64x128", "--tokens", "0"], "--tokens 0"),
        (["--shapes", "64x128", "--dtype", "int8"], "--dtype int8"),
        (["--shapes", "64x128", "--activation-bits", "4"], "--activation-bits 4"),
        ([str(tiny("llama"))], "not compressed"),
    ):
        with pytest.raises(RecipeError, match=message):
            CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


def test_copies_leave_the_cache() -> None:
    cpu = torch.device("cpu")
    assert bench._copies(1 << 40, cpu) == 1
    assert bench._copies(1, cpu) == bench._COPIES
    assert bench._copies(16 << 20, cpu) == 8
