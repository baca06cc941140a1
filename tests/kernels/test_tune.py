"""`bench/tune.py`: every plan that it times gives the right product, and what is chosen comes first and stays chosen."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType

import host_cuda
import pytest
import torch
from kernel_parts import activations, close, uniform
from places import ROOT

from compress.kernels import _weights, weight_only

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    path = ROOT / "bench" / "tune.py"
    spec = importlib.util.spec_from_file_location("bench_tune", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_tune"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    sizes = [(tokens, wide) for tokens in weight_only.TOKENS for wide in weight_only.pieces(tokens)]
    decoded = weight_only.instance("dequantize", BF16, 4, "SYMMETRIC", False)
    return host_cuda.Host(
        decoded, *(weight_only.instance("wqmm", BF16, 4, "SYMMETRIC", False, n, tiles=wide) for n, wide in sizes)
    )


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    compiled.device = replace(host_cuda.DEVICE, shared=227 << 10)
    return compiled.install(monkeypatch)


@pytest.mark.parametrize("count", [1, 20])
def test_every_plan_gives_the_product(
    count: int, tune: ModuleType, host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = uniform(80, 1088, 4, 64)
    tiles, x = _weights.prepare(part), activations(count + 3, 1088, BF16)[3:]
    shape = weight_only.shape_of(tiles)
    found = list(tune.plans(count, tiles, host.device))
    assert found[0] == weight_only.plan(count, tiles, shape, host.device)
    assert len(set(found)) == len(found) > 10
    assert {(p.tokens, p.tiles) for p in found} >= {(8, 1), (8, 2), (64, 1)}
    assert len({p.splits for p in found}) > 2
    for one in found:
        monkeypatch.setattr(weight_only, "plan", lambda *_, one=one: one)
        close(weight_only.matmul_tiles(x, tiles), x, part)
    host.check_counters()


def test_times_name_the_chosen_plan(tune: ModuleType, host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plan = weight_only.plan
    monkeypatch.setattr(tune.bench, "median", lambda of, device: calls.append(len([call() for call in of])) or 1e-6 * len(calls))
    monkeypatch.setattr(tune.bench, "copies_of", lambda nbytes, device: 2)
    rows = list(tune.timed((32, 512), 4, 1, torch.device("cpu")))
    assert [row.chosen for row in rows] == [True] + [False] * (len(rows) - 1)
    assert [row.microseconds for row in rows] == pytest.approx(list(range(1, len(rows) + 1)))
    assert set(calls) == {2}
    assert weight_only.plan is plan
    assert "1.0 us (8 tokens, 1 blocks along the columns, pieces of 2 tiles" in tune.described(rows[0])
    assert [row.plan is None for row in rows] == [False] * (len(rows) - 1) + [True]
    assert tune.described(rows[-1]) == f"decoded {len(rows)}.0 us"


def test_nothing_that_does_not_fit(host: host_cuda.Host) -> None:
    """The system takes 1 kB of each block beside its own."""
    tiles = _weights.prepare(uniform(80, 1024, 4, 64))
    shape = weight_only.shape_of(tiles)
    found = weight_only.plan_of(64, tiles, shape, host.device, 64, 1, 4, 1)
    assert found is not None
    for resident in (1, 2):
        least = resident * (found.shared + 1024) - 1024
        for shared, fits in ((least, True), (least - 1, False)):
            device = replace(host.device, shared=shared)
            assert (weight_only.plan_of(64, tiles, shape, device, 64, 1, 4, resident) is not None) is fits
