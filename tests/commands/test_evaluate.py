"""`compress eval`: scores, against what, and its options."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Run
from transformers import AutoModelForCausalLM

Tiny = Callable[..., Path]


def perplexity(folder: Path, ids: np.ndarray[Any, Any]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = torch.from_numpy(ids).long()
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    return math.exp(float(loss))


@pytest.mark.parametrize("which", ["model", "packed"])
def test_eval_equals_transformers(which: str, run: Run, ids: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    found = run("eval", folder, "--data", ids, "--no-speed", "--json", "--device", "cpu").json
    assert found["perplexity"] == pytest.approx(perplexity(folder, np.load(ids)), rel=1e-6)
    assert (found["windows"], found["length"]) == (12, 16)
    assert found["tokens_per_second"] is None


def test_a_model_agrees_with_itself(run: Run, model: Path, ids: Path) -> None:
    found = run("eval", model, "--data", ids, "--original", model, "--no-speed", "--json", "--device", "cpu").json
    assert (found["kl"], found["agreement"], found["kl_standard_error"]) == (0, 1, 0)
    assert found["perplexity"] == found["perplexity_before"]


def test_the_memory_of_measuring_is_not_that_of_the_run(
    run: Run, model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.screen.results.memory", SimpleNamespace(peak=lambda: 10**15))
    arguments = ("quantize", model, "--method", "rtn", "--group-size", 16, "--device", "cpu", "--no-reload", "-q")
    measured = run(*arguments, "-o", tmp_path / "out", "--evaluate", ids)
    assert (measured.out.count("1000.00 TB peak memory"), "measuring  took more" in measured.out) == (1, True)
    assert "took more" not in run(*arguments, "-o", tmp_path / "other").out


def test_eval_finds_the_original_and_measures_the_divergence(run: Run, model: Path, packed: Path, ids: Path) -> None:
    found = run("eval", packed, "--data", ids, "--no-speed", "--json", "--device", "cpu").json
    assert found["original"] == str(model)
    windows = torch.from_numpy(np.load(ids)).long()
    logs = []
    for folder in (model, packed):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows, use_cache=False).logits
        logs.append(logits[:, :-1].double().log_softmax(-1))
    p, q = logs
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    text = run("eval", packed, "--data", ids, "--no-speed", "--device", "cpu").out
    assert f"{found['kl']:.5f}" in text
    assert f"{found['perplexity']:.3f}" in text


def test_options_of_eval(run: Run, packed: Path, model: Path, ids: Path, tmp_path: Path) -> None:
    common = ("--data", ids, "--device", "cpu", "--json")
    few = run("eval", packed, *common, "--no-speed", "--samples", 2, "--length", 5).json
    assert (few["windows"], few["length"]) == (2, 5)
    other = run("eval", packed, *common, "--no-speed", "--samples", 2, "--length", 5, "--seed", 3).json
    assert other["ids_sha256"] != few["ids_sha256"]
    half = run("eval", packed, *common, "--no-speed", "--dtype", "bfloat16").json
    assert half["dtype"] == "bfloat16"
    assert half["perplexity"] != run("eval", packed, *common, "--no-speed").json["perplexity"]
    done = run("eval", packed, *common, "--dtype", "float7")
    assert (done.code, "--dtype float7: expected one of float32" in done.err) == (2, True)
    fast = run("eval", model, *common).json
    assert fast["tokens_per_second"] > 0
    copied = shutil.copytree(packed, tmp_path / "copy")
    saved = run("eval", copied, *common, "--no-speed", "--save").json
    assert json.loads((copied / "evaluation.json").read_text())["perplexity"] == saved["perplexity"]
    assert not (packed / "evaluation.json").exists()
    done = run("eval", model, *common, "--no-speed", "--save")
    assert (done.code, "not a checkpoint that compress wrote" in done.err) == (6, True)
    quiet, loud = (run("eval", packed, *common[:-1], "--no-speed", *more) for more in (("--quiet",), ()))
    assert (quiet.err, quiet.out) == ("", loud.out)
    assert loud.err


def test_eval_against_a_model_of_another_vocabulary(run: Run, packed: Path, tiny: Tiny, ids: Path) -> None:
    done = run("eval", packed, "--data", ids, "--original", tiny("llama", vocab_size=97), "--no-speed", "--device", "cpu")
    assert (done.code, "has another vocabulary" in done.err) == (3, True)
