"""`bench/real.py` and `bench/planted.py`: planted models compute the same, and rows are measured once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from places import ROOT
from tiny import tiny_config
from transformers import AutoModelForCausalLM


def loaded(name: str) -> ModuleType:
    """A script of bench/, with its neighbours, as `python bench/NAME.py` has them."""
    for needed in (*{"real": ("quality", "planted")}.get(name, ()), name):
        spec = importlib.util.spec_from_file_location(needed, ROOT / "bench" / f"{needed}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[needed] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    return loaded("planted")


@pytest.fixture(scope="module")
def real() -> ModuleType:
    return loaded("real")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.3, bos_token_id=1)).float()
    for name, value in made.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return made


WINDOWS = torch.randint(2, 96, (3, 24), generator=torch.Generator().manual_seed(1))
WINDOWS[:, 0] = 1


def logits(model: Any, **more: Any) -> Any:
    with torch.no_grad():
        return model(WINDOWS, **more)


def test_outliers_leave_the_function(planted: ModuleType, model: Any) -> None:
    before, norm = logits(model).logits, model.model.layers[0].input_layernorm.weight.clone()
    with torch.no_grad():
        planted.outliers(model, 40.0, torch.Generator().manual_seed(0))
    grown = model.model.layers[0].input_layernorm.weight / norm
    assert int((grown > 1.001).sum()) == planted.CHANNELS
    assert 20 <= grown.max().item() <= 60
    assert torch.allclose(logits(model).logits, before, atol=1e-4)


def test_a_sink_leaves_the_function(planted: ModuleType, model: Any) -> None:
    """The first token is massive between the first and the last block, and no other; every logit is the original's."""
    before = logits(model).logits
    with torch.no_grad():
        made = planted.sink(model, 1000.0, torch.Generator().manual_seed(0), 8)
    after = logits(made, output_hidden_states=True)
    assert torch.allclose(after.logits, before, atol=1e-3)
    inside = after.hidden_states[1]
    assert float(inside[:, 0].abs().max()) > 500 * float(inside.abs().median())
    assert float(inside[:, 1:].abs().max()) < 20 * float(inside.abs().median())
    assert int((inside[0, 0].abs() > 100 * inside.abs().median()).sum()) == 2


ROW: dict[str, Any] = {
    "kl": 0.1,
    "kl_standard_error": 0.01,
    "agreement": 0.9,
    "perplexity": 12.0,
    "perplexity_before": 10.0,
    "block_bits": 4.25,
    "file_bits": 6.0,
    "seconds": 3.0,
    "processor_seconds": 4.0,
    "peak_gigabytes": 1.0,
}


def task(real: ModuleType, method: str, bits: float = 4.0) -> Any:
    variant = real.Variant("m", "none", Path("m"), Path("c.npy"), Path("h.npy"), "abc")
    return real.Task(variant, method, bits, 64, 0, ("c.jsonl", "h.jsonl"))


def test_a_row_is_measured_once(real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a results file stay; another width is another row, and a row that fails leaves the others."""
    asked = []

    def measured(wanted: Any, arguments: Any) -> dict[str, Any]:
        asked.append(wanted.method)
        if wanted.method == "broken":
            raise real.RunError("no")
        return dict(zip(real.KEY, wanted.key(), strict=True)) | ROW

    monkeypatch.setattr(real, "measured", measured)
    arguments = SimpleNamespace(out=tmp_path / "real.json", again=False)
    result: dict[str, Any] = {"rows": []}
    assert real.add(task(real, "gptq"), result, arguments)
    assert real.add(task(real, "gptq"), result, arguments)
    assert not real.add(task(real, "broken"), result, arguments)
    assert real.add(task(real, "gptq", 3.0), result, arguments)
    assert asked == ["gptq", "broken", "gptq"]
    arguments.again = True
    assert real.add(task(real, "gptq"), result, arguments)
    assert len(result["rows"]) == 2
    assert "| gptq | 3 | 4.250 | 6.000 | 0.10000 |" in real.table(result["rows"])


def test_a_method_is_words_of_the_command(real: ModuleType) -> None:
    def words(method: str) -> list[str]:
        return list(real._ours(task(real, method), Path("out")))[3:]

    assert words("default") == ["quantize", "m", "-o", "out", "--bits", "4", "--group-size", "64", "--data", "c.npy", "--json"]
    assert words("awq+gptq")[-3:] == ["--method", "awq+gptq", "--json"]
    assert words("plan=--bpw {bits}.25")[4:] == ["--data", "c.npy", "--bpw", "4.25", "--json"]
