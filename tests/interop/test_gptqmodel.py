"""GPTQ and AWQ exports through GPTQModel's own kernels for the CPU, where that package is installed: logits bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from runs import compress as run
from transformers import AutoModelForCausalLM

from compress.interop import exporter as exporting

gptqmodel = pytest.importorskip("gptqmodel")
DEMO = ROOT / "examples" / "demo"
PROBE = torch.tensor([[5, 17, 30, 42, 7, 10, 33]])

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "3 bits": ("gptq", {"bits": 3, "group_size": 64}),
    "8 bits": ("gptq", {"bits": 8, "group_size": 128}),
    "zero points": ("gptq", {"bits": 4, "group_size": 128, "symmetric": False}),
    "act-order": ("gptq", {"bits": 3, "group_size": 64, "order": "desc_act"}),
    "awq": ("awq", {"bits": 4, "group_size": 128, "symmetric": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_computes_what_we_do(case: str, ids: Path, tmp_path: Path) -> None:
    name, options = CASES[case]
    method = "quant/gptq" if "order" in options else "quant/rtn"
    data = ids if "order" in options else None
    run(DEMO, tmp_path / "native", data, [{"match": "*.*", "method": method, "options": options}])
    exporting.export(exporting.prepare(str(tmp_path / "native"), name), tmp_path / "out", lambda *_: None)
    load: Callable[..., Any] = gptqmodel.GPTQModel.load
    loaded = load(str(tmp_path / "out"), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded.model(PROBE).logits, ours(PROBE).logits)
