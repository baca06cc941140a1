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
from compress.evaluation import bench


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "rates", lambda *_: (1e10, 1e15))  # so that bytes decide, on a busy machine too
    output = tmp_path / "bench.json"
    arguments = ("--shapes", "64x256, 48x64", "--bits", "5,4", "--group-size", "32", "--tokens", "1,5", "--device", "cpu")
    found = json.loads(run(*arguments, "--json", "-o", str(output)))
    assert json.loads(output.read_text())["rows"] == found["rows"]
    assert [(r["out"], r["columns"], r["stored"], r["tokens"]) for r in found["rows"]] == [
        (*shape, f"{bits}-bit g32", tokens) for shape in ((64, 256), (48, 64)) for bits in (5, 4) for tokens in (1, 5)
    ]
    assert {(r["path"], r["how"]) for r in found["rows"]} == {("int4_cpu", "cpu"), ("torch_reference", "cpu")}
    assert found["device"].startswith("CPU")
    for row in found["rows"]:
        assert row["microseconds"] > 0
        assert row["gain"] == pytest.approx(row["dense"] / row["microseconds"])
        assert row["share"] == pytest.approx(row["floor"] / row["microseconds"])
        assert 0 < row["difference"] < 1e-2  # bfloat16: the product that is timed is the right one
    five, four = (r["floor"] for r in found["rows"][:4:2])
    assert five > four  # fewer bytes


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


def test_several_widths_of_activations() -> None:
    """Beside products of integers stands torch's of int8 matrices."""
    arguments = ("--shapes", "64x128", "--tokens", "3", "--device", "cpu", "--json", "--activation-bits", "16,8")
    wide, narrow = json.loads(run(*arguments))["rows"]
    assert (wide["activation_bits"], narrow["activation_bits"]) == (16, 8)
    assert wide["int8"] is None
    assert narrow["int8"] > 0


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        (("--bits", "16,4", "--pattern", "2:4"), ["BF16 + 2:4", "4-bit g32 + 2:4"]),
        (("--bits", "16,3", "--sparsity", "0.7"), ["BF16 + mask", "3-bit g32 + mask"]),
        (("--bits", "4", "--sparsity", "0.5", "--run", "16"), ["4-bit g32 + mask of 16s"]),
    ],
)
def test_pruned_random_weights(options: tuple[str, ...], stored: list[str]) -> None:
    arguments = ("--shapes", "64x256", "--group-size", "32", "--tokens", "2", "--device", "cpu", "--json")
    rows = json.loads(run(*arguments, *options))["rows"]
    assert [row["stored"] for row in rows] == stored
    assert all(row["difference"] < 1e-2 for row in rows)
    # On a CPU, codes that are pruned have a kernel, values that are have none.
    assert [row["path"] for row in rows] == ["torch_reference" if "BF16" in name else "int4_cpu" for name in stored]


def row(path: str, microseconds: float, activation_bits: int = 8) -> bench.Row:
    return bench.Row(64, 128, "2-bit g128", 16, path, "graph", microseconds, 1.0, 8.0, 0.0, activation_bits, 6.0)


def test_where_single_bits_win_is_said() -> None:
    rows = [row("weight_only", 5.0, 16), row("int8", 4.0), row("bit_serial, 8 bits", 10.0), row("bit_serial, 2 bits", 2.0, 2)]
    loses, wins = bench.verdict(rows)
    assert loses == "64 x 128, 2-bit g128, 8-bit activations, 16 tokens: int8 wins, 2.50 times as fast"
    assert wins.endswith("2-bit activations, 16 tokens: bit-serial wins, 2.00 times as fast as int8")
    assert bench.verdict(rows[:2]) == []
    assert "dense int8 wins, 1.67" in bench.verdict([row("bit_serial, 8 bits", 10.0)])[0]


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
        (["--shapes", "64x128", "--activation-bits", "9"], "--activation-bits 9"),
        (["--shapes", "64x128", "--activation-bits", "4", "--device", "cpu"], "--activation-bits 4"),
        (["--shapes", "64x128", "--bits", "16"], "or 16 with --pattern"),
        (["--shapes", "64x128", "--pattern", "2:4", "--sparsity", "0.5"], "expected one of them"),
        (["somewhere", "--pattern", "2:4"], "with --shapes"),
        (["--shapes", "64x128", "--pattern", "4:2"], "--pattern 4:2"),
        (["--shapes", "64x128", "--sparsity", "0.5", "--run", "3"], "--run 3"),
        ([str(tiny("llama"))], "not compressed"),
    ):
        with pytest.raises(RecipeError) as caught:
            CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
        assert message in caught.value.message


def test_copies_leave_the_cache() -> None:
    cpu = torch.device("cpu")
    assert bench.copies_of(1 << 40, cpu) == 1
    assert bench.copies_of(1, cpu) == bench._COPIES
    assert bench.copies_of(16 << 20, cpu) == 8
