"""The bytes of a result, known before a weight is read, are those of its files: over methods, families and shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import compress, steps
from tiny import TINY

from compress import prepare, recipe, sizes

Tiny = Callable[..., Path]
STEPS: dict[str, list[dict[str, Any]]] = {
    "gptq": steps(bits=4, group_size=16),
    "gptq asymmetric": steps(bits=3, group_size=16, symmetric=False),
    "gptq desc_act": steps(bits=2, group_size=8, order="desc_act"),
    "gptq rows": steps(bits=5, group_size=-1),
    "rtn, head too": steps("quant/rtn", match="*", bits=8, group_size=32),
    "some of it": steps("quant/rtn", match="*.1.*", bits=4, group_size=16),
    "two steps": steps(match="*.mlp.*", bits=2, group_size=16) + steps("quant/hqq", bits=4, group_size=16),
    "bipolar": steps("quant/bipolar", bits=2, group_size=16),
    "bitmod": steps("quant/bitmod", datatype="fp3", group_size=16),
    "bitmod 4": steps("quant/bitmod", datatype="fp4", group_size=16),
    "nvfp4": steps("quant/floating", datatype="nvfp4"),
    "mxfp4": steps("quant/floating", datatype="mxfp4"),
    "nf4": steps("quant/floating", datatype="nf4", group_size=16),
    "fp3": steps("quant/floating", datatype="fp3", group_size=16),
    "spqr without outliers": steps("quant/spqr", bits=3, outlier_threshold=None),
    "signround": steps("quant/signround", bits=3, group_size=16, steps=1),
    "decoupleq": steps("quant/decoupleq", bits=3, group_size=16, symmetric=False),
}


def predicted(model: Path, data: Path, wanted: list[dict[str, Any]], **more: Any) -> sizes.Sizes:
    values = {"steps": wanted, "data": {"name": str(data)}, **more}
    plan = prepare.prepare(str(model), recipe.parse(values), "cpu")
    limit = recipe.parse_size(plan.recipe.max_shard_size)
    return sizes.sizes(plan.source, plan.claims, plan.assignments, limit)


def on_disk(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name.startswith("model")}


@pytest.mark.parametrize("name", STEPS)
def test_files_have_the_size_that_was_said(name: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    found = predicted(model, ids, STEPS[name])
    summary = compress(model, tmp_path / "out", ids, STEPS[name])
    assert found.exact
    assert found.files == on_disk(tmp_path / "out")
    assert found.tensors == summary.values["bytes_after"]


@pytest.mark.parametrize("family", TINY)
def test_in_every_family_and_in_shards(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted = steps("quant/rtn", bits=3, group_size=-1)
    found = predicted(tiny(family), ids, wanted, max_shard_size="10KB")
    compress(tiny(family), tmp_path / "out", ids, wanted, max_shard_size="10KB")
    assert found.exact
    assert found.files == on_disk(tmp_path / "out")
    assert len(found.files) > 2


@pytest.mark.parametrize(
    "wanted", [steps("quant/slim", bits=3, group_size=16), steps("quant/spqr", bits=3, target_bits=5)], ids=["slim", "spqr"]
)
def test_what_depends_on_values_is_called_so_and_is_near(
    wanted: list[dict[str, Any]], tiny: Tiny, ids: Path, tmp_path: Path
) -> None:
    found = predicted(tiny("llama"), ids, wanted)
    summary = compress(tiny("llama"), tmp_path / "out", ids, wanted)
    assert not found.exact
    assert abs(found.tensors / summary.values["bytes_after"] - 1) < 0.1
    assert json.dumps(found.files)
