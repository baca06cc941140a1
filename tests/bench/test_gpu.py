"""`bench/gpu.py`: what it judges, that its benchmarks can be asked for, and what it says without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import ROOT
from typer.testing import CliRunner

from compress.cli import app
from compress.evaluation import bench

PATH = ROOT / "bench" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def row(bits: int, tokens: int, microseconds: float, out: int = 4096, columns: int = 14336) -> dict[str, Any]:
    return bench.Row(out, columns, f"{bits}-bit g128", tokens, "weight_only", "graph", microseconds, 6.0, 20.0, 0.0).plain()


def test_what_was_asked_is_compared(gpu: ModuleType) -> None:
    rows = [row(4, 1, 10), row(3, 1, 9), row(2, 1, 11), row(4, 64, 21), row(4, 256, 30), row(4, 2048, 20.5), row(8, 1, 1)]
    judged = {one.what: one.holds for one in gpu.asked(rows)}
    assert judged == {
        "4096 x 14336, 1 tokens: share of the floor, first milestone": True,
        "4096 x 14336, 1 tokens: share of the floor, goal": False,
        "4096 x 14336, 1 tokens: 2 bits faster than 4": False,
        "4096 x 14336, 1 tokens: 3 bits faster than 4": True,
        "4096 x 14336, 1 tokens: F.linear over 4 bits": True,
        "4096 x 14336, 64 tokens: F.linear over 4 bits": False,
        "4096 x 14336, 2048 tokens: F.linear over 4 bits": True,
    }
    assert not gpu.asked([row(4, 2048, 21.1)])[0].holds
    assert not any("floor" in one.what for one in gpu.asked([row(4, 1, 10, 4096, 4096)]))


def test_its_benchmarks_are_ones_that_compress_takes(gpu: ModuleType) -> None:
    """In full and quick; here each of the quick ones runs on the CPU, but for widths that only a GPU multiplies."""
    assert gpu.benches(False).keys() == gpu.benches(True).keys()
    for arguments in gpu.benches(True).values():
        small = ["128x512" if a == "1024x1024" else "16,8" if a == "16,8,6,4,2" else "1" if a == "1,16" else a for a in arguments]
        result = CliRunner().invoke(app, ["bench", *small, "--device", "cpu", "-q"], catch_exceptions=False)
        assert result.exit_code == 0


def test_parts_by_their_names(gpu: ModuleType) -> None:
    names = ["tests", *gpu.checks(PATH.parent, True), *gpu.benches(True)]
    assert gpu.chosen(None, names) == names
    assert gpu.chosen("tests, runs of 16", names) == ["tests", "runs of 16"]
    assert gpu._run(["no such program"]) == (127, "no such program is not installed")
    with pytest.raises(SystemExit, match="--only speed: expected some of tests, memcheck, racecheck, tune, weight_only"):
        gpu.chosen("speed", names)


def test_parts_of_one_day_meet_in_one_file(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the machine and for what is run."""

    def run(command: list[str]) -> tuple[int, str]:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text(json.dumps({"rows": [row(4, 1, 10)]}))
        return int("pytest" in command), "the end"

    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "A GPU", "driver": "1"})
    monkeypatch.setattr(gpu, "_run", run)
    for only, status in (("weight_only", 0), ("tests", 1), ("zeros", 0)):
        monkeypatch.setattr(sys, "argv", ["bench/gpu.py", "--out", str(tmp_path), "--only", only])
        assert gpu.main() == status
    (file,) = tmp_path.glob("gpu-A_GPU-*.json")
    report = json.loads(file.read_text())
    assert list(report["benches"]) == ["weight_only", "zeros"]
    assert report["tests"]["status"] == 1
    assert len(report["commands"]) == 3
    assert any("milestone" in one["what"] for one in report["asked"])
    assert "tests FAILED" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(PATH), "--quick"], cwd=PATH.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no GPU" in done.stderr
