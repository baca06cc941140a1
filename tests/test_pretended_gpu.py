"""Whole runs and whole models on a GPU that is not there: every tensor where a GPU would want it, every kernel launched.

What is found on such a device is what a first run on a real one would otherwise stumble over: tensors of two devices in one
operation, operators whose implementation for CUDA was never called, parts of a model that did not move.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_runs
import pretend_cuda
import pytest
import torch

from compress.checkpoint import packed_source

Worker = Callable[..., Any]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """Calls functions in a process of its own, one after another."""
    with multiprocessing.get_context("spawn").Pool(1, pretend_cuda.register) as pool:
        yield lambda function, *arguments: pool.apply(function, arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def test_two_devices_do_not_meet(worker: Worker) -> None:
    said = worker(gpu_runs.mixes_devices)
    assert all("same device" in one for one in said[:4])
    assert "numpy" in said[4]
    assert said[5:] == [""] * 4


def weights(folder: Path) -> dict[str, torch.Tensor]:
    source = packed_source.PackedSource.open_packed(folder)
    return {site: source.compressed(site).dequantize() for site in source.table}


FEW = [("gptq-3bit", "mixtral"), ("drift-gptq-3bit", "llama"), ("hqq-4bit", "llama"), ("nvfp4", "llama"), ("svd-50", "mixtral")]
FEW += [("permute-ria-2of4", "llama"), ("sparsegpt-2of4", "mixtral"), ("awq-gptq-3bit", "llama"), ("slim-3bit", "llama")]
FEW += [("alps-2of4-4bit", "llama"), ("moe-4bit-experts-3bit", "mixtral")]
MORE = [
    "gptq-3bit",
    "drift-gptq-3bit",
    "nvfp4",
    "permute-ria-2of4",
    "awq-gptq-3bit",
    "slim-3bit",
    "alps-2of4-4bit",
    "bitmod-3bit",
]
MORE += ["bitmod-3bit", "spqr-3.5bit", "awq-4bit", "wanda-50", "magnitude-50", "rtn-4bit", "bipolar-4bit"]


@pytest.mark.parametrize(("recipe", "family"), FEW)
def test_recipes(recipe: str, family: str, worker: Worker, folder: Path) -> None:
    """The result is that of the CPU but for what sums in another order make of it."""
    check(worker, folder, "cuda", family, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MORE)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_more_recipes(recipe: str, family: str, worker: Worker, folder: Path) -> None:
    check(worker, folder, "cuda", family, recipe)


@pytest.mark.parametrize("recipe", ["signround-4bit", "gptq-2bit-tuned", "perp-60", "ast-2of4", "gqsa-w4s50"])
def test_recipes_with_gradients(recipe: str, worker: Worker, folder: Path) -> None:
    check(worker, folder, "pretended", "llama", recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gaussnewton-4bit", "decoupleq-2bit", "signround-2bit"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_more_recipes_with_gradients(recipe: str, family: str, worker: Worker, folder: Path) -> None:
    check(worker, folder, "pretended", family, recipe)


def check(worker: Worker, folder: Path, device: str, family: str, recipe: str) -> None:
    here, none = worker(gpu_runs.compress_on, "cpu", family, recipe, folder)
    there, kernels = worker(gpu_runs.compress_on, device, family, recipe, folder)
    assert not none
    assert kernels in ([], ["round_columns"])
    assert bool(kernels) == (device == "cuda" and any(name in recipe for name in ("gptq", "slim", "moe", "bipolar")))
    expected, found = weights(here), weights(there)
    assert found.keys() == expected.keys()
    shares = torch.tensor([float((found[site] - weight).norm() / weight.norm()) for site, weight in expected.items()])
    # Copies lie at other addresses, and sums are formed in another order: single weights go to the next code, or out of a mask.
    assert float(shares.max()) < 0.4, shares
    assert float(shares.median()) < 0.05, shares


@pytest.mark.parametrize(
    ("family", "method", "options", "kernels"),
    [
        ("llama", "quant/gptq", {"bits": 4, "group_size": 16}, ["wqmm"]),
        ("mixtral", "quant/gptq", {"bits": 3, "group_size": 16}, ["wqmm"]),
        ("gpt2", "quant/rtn", {"bits": 8, "group_size": 16}, ["wqmm"]),
        ("llama", "quant/spqr", {"bits": 3, "group_size": 16}, ["sparse_rows", "wqmm"]),
        ("llama", "quant/slim", {"bits": 3, "group_size": 16}, ["wqmm"]),
        ("llama", "prune/wanda", {"pattern": "2:4"}, ["masked_products"]),
        ("llama", "prune/magnitude", {"sparsity": 0.5}, ["masked_products"]),
    ],
)
@pytest.mark.parametrize("tokens", [1, 12])
def test_models(
    family: str, method: str, options: dict[str, Any], kernels: list[str], tokens: int, worker: Worker, folder: Path
) -> None:
    """A compressed checkpoint on the GPU, through its kernels, gives what it gives on the CPU, and generates."""
    made = worker(gpu_runs.compress_rows, family, method, options, folder)
    expected, found, launched, new = worker(gpu_runs.logits_on_both, made, tokens)
    assert launched == kernels
    assert len(new) == 3
    share = (found - expected).norm(dim=1) / expected.norm(dim=1)
    # A router between two experts to the last bit may send a token elsewhere.
    assert float(share.median()) < 0.03, share


def test_benchmarks(worker: Worker, folder: Path) -> None:
    """They measure what they say they do: every product is right, and by the kernel that its row names."""
    rows = worker(gpu_runs.benchmarks, ["zeros", "two of four"], folder)
    assert {name: {row["path"] for row in of} for name, of in rows.items()} == {
        "zeros": {"weight_only"},
        "two of four": {"masked"},
    }
    assert {row["stored"] for row in rows["two of four"]} == {"BF16 + 2:4", "4-bit g128 + 2:4"}
    for row in (row for of in rows.values() for row in of):
        assert row["how"] == "graph"
        assert row["difference"] < 3e-3


def test_some_tests_of_a_gpu(worker: Worker) -> None:
    """What `pytest -m cuda` will ask of a GPU is itself tried here."""
    passes(worker, "test_experts_together or test_the_hessian or test_columns", 5)


@pytest.mark.slow
def test_all_tests_of_a_gpu(worker: Worker) -> None:
    """All but graphs, streams, compilation, speed, sparse matrices of torch and the largest shapes."""
    without = (
        "graph",
        "streams",
        "compile",
        "new_within",
        "sum_of_all",
        "speed",
        "(single_weights and 200)",
        "(any_shape and 41)",
    )
    passes(worker, " and ".join(f"not {one}" for one in without), 300)


def passes(worker: Worker, which: str, least: int) -> None:
    status, said = worker(gpu_runs.tests_of_kernels, which)
    counted = re.search(r"(\d+) passed", said)
    assert status == 0, said
    assert counted is not None, said
    assert int(counted[1]) >= least
    assert "skipped" not in said
