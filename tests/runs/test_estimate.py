"""What is said before a run: memory, time, disk and bytes, for a folder and for a model on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import hub
from places import ROOT
from runs import steps

from compress import registry
from compress.recipe import reading as recipe_reading
from compress.runs import estimate, timing
from compress.runs import prepare as run_prepare
from compress.system import memory

Tiny = Callable[..., Path]
CPU = torch.device("cpu")


def planned(model: Path, data: Path, wanted: list[dict[str, Any]], **more: Any) -> run_prepare.RunPlan:
    return run_prepare.prepare(str(model), recipe_reading.parse({"steps": wanted, "data": {"name": str(data)}, **more}), "cpu")


def test_a_dry_run_of_a_model_on_the_hub_downloads_no_weights(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Shards with headers; what a dry run says of them is what it says of the folder."""
    model = tiny("qwen3_moe", max_shard_size="40KB")
    with hub() as there:
        there.files["org/tiny"] = {path.name: path.read_bytes() for path in model.iterdir()}
        there.private["org/tiny"] = False
        common = ("-o", tmp_path / "out", "--group-size", 16, "--data", ids, "--device", "cpu", "--dry-run", "--json")
        remote = there.run(tmp_path / "cache", "quantize", "org/tiny", *common)
        local = there.run(tmp_path / "cache", "quantize", model, *common)
        missing = there.run(tmp_path / "cache", "quantize", "org/nothing", *common)
        fetched = {path.partition("/resolve/main/")[2] for method, path, size in there.asked if method == "GET" and size > 8}
    assert (remote.returncode, local.returncode) == (0, 0), remote.stderr
    mine, theirs = json.loads(local.stdout), json.loads(remote.stdout)
    for key in ("bytes_before", "bytes_after", "files_after", "bytes_after_exact", "statistics", "disk", "sites", "calibration"):
        assert mine[key] == theirs[key], key
    assert mine["files_after"] > mine["bytes_after"] > 0
    assert {name for name in fetched if name.endswith(".safetensors")} == {p.name for p in model.glob("*.safetensors")}
    cached = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [name for name in cached if name.endswith(".safetensors")]
    assert (missing.returncode, "org/nothing" in missing.stderr) == (3, True)


def test_ranges_are_asked_for_not_files(tmp_path: Path, ids: Path) -> None:
    """Of a file of 11 MB, the part that holds the header."""
    with hub() as there:
        there.files["org/demo"] = {path.name: path.read_bytes() for path in (ROOT / "examples" / "demo").iterdir()}
        there.private["org/demo"] = False
        done = there.run(
            tmp_path / "cache", "run", "demo", "org/demo", "-o", tmp_path / "out", "--device", "cpu", "--dry-run", "--json"
        )
        assert done.returncode == 0, done.stderr
        weights = sum(size for _, path, size in there.asked if path.endswith("model.safetensors"))
    assert weights < 300_000
    assert json.loads(done.stdout)["calibration"] == {"samples": 128, "length": 256}


def test_memory_is_predicted_within_15_percent_on_the_demo(tmp_path: Path) -> None:
    """In a process of its own; time within a factor of eight, as other work may be going on."""
    with hub() as there:
        done = there.run(
            tmp_path,
            "run",
            "demo",
            ROOT / "examples" / "demo",
            "-o",
            tmp_path / "out",
            "--device",
            "cpu",
            "--no-reload",
            "--json",
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said = found["predicted"]
    assert abs(said["memory"] / found["peak_memory"] - 1) < 0.15
    assert 0.125 < said["seconds"] / found["seconds"] < 8
    assert said["files_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said["bytes_after"] == found["bytes_after"]


def test_more_data_wider_batches_and_more_room_take_more_memory(tiny: Tiny, ids: Path) -> None:
    plan = planned(tiny("llama"), ids, steps(bits=3, group_size=16))
    small = estimate.estimate(plan, 8, 16, 4 << 30, False)
    assert estimate.estimate(plan, 800, 16, 4 << 30, False).memory > small.memory
    assert estimate.estimate(plan, 800, 16, 4 << 30, True).memory < estimate.estimate(plan, 800, 16, 4 << 30, False).memory
    assert estimate.estimate(plan, 8, 16, 10_000, False).passes_memory < small.passes_memory
    assert estimate.estimate(plan, 8, 16, 10_000, False).passes > small.passes
    other = planned(tiny("llama"), ids, steps(bits=3, group_size=16), batch_tokens=4)
    assert estimate.estimate(other, 8, 16, 4 << 30, False).activations < small.activations


class Known:
    """A method that takes a known time of a clock of its own."""

    needs = ()

    def __init__(self, costs: list[float]) -> None:
        self.costs, self.now = costs, 0.0

    def check(self, shape: tuple[int, int]) -> str | None:
        return None

    def __call__(self, weight: torch.Tensor, stats: object) -> None:
        rows, columns = weight.shape
        terms = (rows * columns, columns, rows * columns**2, columns**3)
        self.now += sum(cost * term for cost, term in zip(self.costs, terms, strict=True))


@pytest.mark.parametrize("costs", [[2e-9, 3e-6, 4e-12, 5e-11], [1e-8, 0.0, 0.0, 0.0], [1e-9, 0.0, 0.0, 7e-11]])
def test_costs_have_the_cubic_terms(monkeypatch: pytest.MonkeyPatch, costs: list[float]) -> None:
    """A method of a known cost: what is fitted gives it back at sizes that were not probed."""
    known = Known(costs)
    monkeypatch.setattr("compress.runs.timing.time.perf_counter", lambda: known.now)
    found = timing.method_cost(known, [], CPU)
    assert found == pytest.approx(costs, rel=1e-6, abs=1e-18)


def test_a_solver_costs_more_than_rounding() -> None:
    rtn, gptq = (registry.method(f"quant/{name}")(bits=4, group_size=128) for name in ("rtn", "gptq"))
    plain, compensated = (timing.method_cost(method, [], CPU) for method in (rtn, gptq))
    assert plain is not None and compensated is not None
    at = timing._terms(1024, 4096)
    seconds = [sum(a * b for a, b in zip(cost, at, strict=True)) for cost in (plain, compensated)]
    assert 0 < seconds[0] < seconds[1]


def test_the_probe_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = timing.probe(CPU, torch.float32, 256)
    assert all(1e7 < rate < 1e15 for rate in (rates.matmul, rates.single, rates.cholesky))


def test_what_does_not_fit_is_said(tiny: Tiny, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tiny("llama"), ids, steps(bits=3, group_size=16))
    expected = estimate.estimate(plan, 12, 16, 4 << 30, False)
    monkeypatch.setattr(memory, "available", lambda: 1 << 40)
    assert estimate.shortfall(expected, []) == []
    monkeypatch.setattr(memory, "available", lambda: 1 << 10)
    assert "--offload" in estimate.shortfall(expected, [])[0]
