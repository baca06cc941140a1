"""The bytes of a result, known before a weight is read, are those of its files: over methods, families and shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress, steps
from safetensors.torch import load_file
from thorough import some
from tiny import TINY

from compress.checkpoint import tensor_file as container
from compress.recipe import reading as recipe_reading
from compress.recipe import schema as recipe_schema
from compress.runs import estimate, sizes
from compress.runs import prepare as run_prepare

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
    "2:4": steps("prune/magnitude", pattern="2:4", dtype="bfloat16"),
    "3:16": steps("prune/magnitude", pattern="3:16", dtype="float32"),
    "rows": steps("prune/wanda", sparsity=0.6, dtype="float16"),
    "runs of rows": steps("prune/wanda", sparsity=0.5, group=8, dtype="bfloat16"),
    "2:4 and codes": steps("prune/magnitude", pattern="2:4", bits=4, group_size=16),
    "decoupleq": steps("quant/decoupleq", bits=3, group_size=16, symmetric=False),
}


def predicted(model: Path, data: Path, wanted: list[dict[str, Any]], **more: Any) -> sizes.Sizes:
    values = {"steps": wanted, "data": {"name": str(data)}, **more}
    plan = run_prepare.prepare(str(model), recipe_reading.parse(values), "cpu")
    limit = recipe_schema.parse_size(plan.recipe.max_shard_size)
    return sizes.sizes(plan.source, plan.inventory, plan.assignments, limit)


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


@pytest.mark.parametrize("family", some(TINY, "llama", "gpt2", "gpt_oss"))
def test_in_every_family_and_in_shards(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted = steps("quant/rtn", bits=3, group_size=-1)
    found = predicted(tiny(family), ids, wanted, max_shard_size="10KB")
    compress(tiny(family), tmp_path / "out", ids, wanted, max_shard_size="10KB")
    assert found.exact
    assert found.files == on_disk(tmp_path / "out")
    assert len(found.files) > 2


# What depends on values, and whether that is little enough to be within 1 % in any case.
INEXACT: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "slim, padded": (steps("quant/slim", bits=2.5, group_size=8, symmetric=False), True),
    "spqr, with room for outliers": (steps("quant/spqr", bits=3, target_bits=9), True),
    "spqr, outliers by a threshold": (steps("quant/spqr", bits=3, outlier_threshold=0.3), False),
    "finequant": (steps("quant/finequant", bits=3, g_min=8), False),
    "kept values in their own type": (steps("prune/magnitude", sparsity=0.5), True),
    "rows that differ": (steps("prune/alps", sparsity=0.7, within="matrix", dtype="bfloat16"), True),
    "rows that differ, rounded": (steps("prune/magnitude", sparsity=0.7, within="matrix", bits=4, group_size=16), False),
    "groups that may be empty": (steps("prune/wanda", sparsity=0.75, bits=4, group_size=8), False),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_depends_on_values_is_within_what_is_said(name: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted, near = INEXACT[name]
    model = tiny("llama", num_hidden_layers=2)
    found = predicted(model, ids, wanted)
    written = compress(model, tmp_path / "out", ids, wanted).values["bytes_after"]
    assert not found.exact
    assert found.least <= found.tensors <= found.most
    assert found.least <= written <= found.most
    assert not near or abs(found.tensors / written - 1) < 0.01
    assert json.dumps(found.files)


def test_a_low_rank_part_is_counted_to_the_byte(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    more = {"tuning": [{"method": "tune/svd", "options": {"rank": 2}}]}
    plan = run_prepare.prepare(
        str(tiny("llama")), recipe_reading.parse({"steps": steps(bits=3, group_size=16), "data": {"name": str(ids)}, **more})
    )
    said = estimate.estimate(plan, 12, 16, 1 << 30, False)
    written = compress(tiny("llama"), tmp_path / "out", ids, steps(bits=3, group_size=16), **more).values["bytes_after"]
    assert said.range_after == (said.bytes_after, said.bytes_after) == (written, written)


def test_a_method_for_few_tokens_widens_what_is_said(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted = [{**steps(bits=3, group_size=16)[0], "fallback": "quant/rtn"}]
    same = predicted(tiny("mixtral"), ids, wanted)
    assert same.exact and same.least == same.most == same.tensors
    wanted[0] |= {"fallback": "quant/finequant", "min_tokens": 10**6, "options": {"bits": 3, "group_size": 16}}
    other = predicted(tiny("mixtral"), ids, wanted)
    assert not other.exact
    written = compress(tiny("mixtral"), tmp_path / "out", ids, wanted).values["bytes_after"]
    assert other.least <= written <= other.most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_source_decides_what_kept_values_take(dtype: torch.dtype, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    tensors = load_file(model / "model.safetensors")
    container.save(model / "model.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()})
    wanted = steps("prune/magnitude", sparsity=0.5, within="row")
    found = predicted(model, ids, wanted)
    written = compress(model, tmp_path / "out", ids, wanted).values["bytes_after"]
    assert found.least == found.tensors == found.most == written
    assert found.exact and found.files == on_disk(tmp_path / "out")
