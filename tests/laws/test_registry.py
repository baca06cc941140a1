"""A method is a file: one that is put into its folder is listed, planned, run and read back, and nothing else changes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from options import bits_known
from places import ROOT
from runs import compress, steps
from typer.testing import CliRunner

from compress import cli, registry
from compress.checkpoint.packed_source import PackedSource
from compress.errors import RecipeError

Tiny = Callable[..., Path]


def example() -> str:
    """The method that docs/adding-a-method.md shows."""
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def powers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example as the file of `quant/powers`, in a folder that the package looks into."""
    package = importlib.import_module("compress.methods.quant")
    folder = tmp_path / "quant"
    folder.mkdir()
    (folder / "powers.py").write_text(example(), encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    yield registry.method("quant/powers")
    sys.modules.pop("compress.methods.quant.powers")
    del package.powers  # type: ignore[attr-defined]


def test_a_method_is_there_by_its_file(powers: Any) -> None:
    assert "powers" in registry.names("quant")
    assert powers().path == "quant/powers"
    listed = CliRunner().invoke(cli.app, ["methods"])
    assert listed.exit_code == 0
    assert "quant/powers (needs no data)" in listed.stdout
    assert "To nearest, on a grid of powers of two" in listed.stdout
    told = json.loads(CliRunner().invoke(cli.app, ["methods", "--json"]).stdout)["quant/powers"]
    assert told["options"]["bits"] == {"default": 4, "choices": None, "about": "bits per code"}


def test_its_recipe_runs_from_end_to_end(powers: Any, tiny: Tiny, tmp_path: Path) -> None:
    """With its options checked, its size known before it runs, and a result that a fresh process loads without the method."""
    with pytest.raises(RecipeError, match="bits"):
        compress(tiny("llama"), tmp_path / "no", None, steps("quant/powers", bits=9))
    summary = compress(tiny("llama"), tmp_path / "out", None, steps("quant/powers", bits=3), reload=True)
    assert summary.values["predicted"]["exact"] is True
    assert summary.values["predicted"]["bytes_after"] == summary.values["bytes_after"]
    packed, method = PackedSource.open_packed(tmp_path / "out"), powers(bits=3)
    assert len(packed.table) > 7
    for name, spec in packed.table.items():
        weight = packed.compressed(name)
        assert spec == method.describe(weight.shape).spec
        assert weight.stored_bits == bits_known(method, weight.shape)
        assert bool((torch.frexp(weight.base.scale.float()).mantissa == 0.5).all())  # type: ignore[attr-defined]


def test_without_its_file_it_is_not_known() -> None:
    with pytest.raises(RecipeError, match="quant/powers: no such method"):
        registry.method("quant/powers")
