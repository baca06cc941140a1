"""`compress diff`: every kind of difference is found, and none where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from runs import compress as run
from safetensors.torch import load_file, save_file

from compress.inspection.diff import Difference, difference, grouped
from compress.interop import exporter as exporting

Tiny = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj"


def rtn(match: str = "*.*", bits: int = 4, **options: Any) -> list[dict[str, Any]]:
    return [{"match": match, "method": "quant/rtn", "options": {"bits": bits, "group_size": 32, **options}}]


def compare(a: Path, b: Path) -> Difference:
    return difference(str(a), str(b), lambda *_: None)


def verdicts(found: Difference) -> dict[str, str]:
    return {row.name: row.verdict for row in found.rows if row.verdict != "same"}


@pytest.fixture(scope="module")
def dense(tiny: Tiny) -> Path:
    return tiny("llama", hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def four(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four") / "out"
    run(dense, out, None, rtn())
    return out


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_checkpoint_is_itself(dense: Path, four: Path) -> None:
    for folder in (dense, four):
        found = compare(folder, folder)
        assert found.same
        assert (verdicts(found), found.config) == ({}, {})


def test_the_same_values_in_another_layout(four: Path, tmp_path: Path) -> None:
    for name in ("awq", "compressed-tensors"):
        exporting.export(exporting.prepare(str(four), name), tmp_path / name, lambda *_: None)
        found = compare(four, tmp_path / name)
        assert found.same
        assert {row.codes for row in found.rows if row.codes is not None} == {0.0}
    assert verdicts(found) == {}


def test_a_wider_code_of_the_same_value(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "three", None, rtn(bits=3))
    exporting.export(exporting.prepare(str(tmp_path / "three"), "awq"), tmp_path / "awq", lambda *_: None)
    found = compare(tmp_path / "three", tmp_path / "awq")
    assert found.same
    assert verdicts(found).keys() == {f"{site}.weight" for site in exporting.open_packed(str(tmp_path / "awq")).table}
    assert set(verdicts(found).values()) == {"stored differently"}


def test_compressed_against_dense(dense: Path, four: Path) -> None:
    found = compare(dense, four)
    assert not found.same
    row = next(row for row in found.rows if row.name == f"{UP}.weight")
    weight = load_file(dense / "model.safetensors")[f"{UP}.weight"].double()
    decoded = exporting.open_packed(str(four)).tensor(f"{UP}.weight").double()
    assert (row.verdict, row.first, row.second) == ("values", "F32", "4-bit g32")
    assert row.largest == pytest.approx(float((weight - decoded).abs().max()))
    assert row.relative == pytest.approx(float((weight - decoded).norm() / weight.norm()))
    assert verdicts(found).keys() == {f"{site}.weight" for site in exporting.open_packed(str(four)).table}


def test_one_code_is_found(four: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.codes"][7] ^= 1

    found = compare(four, edited(four, tmp_path / "b", change))
    assert verdicts(found) == {f"{UP}.weight": "values"}
    row = next(row for row in found.rows if row.verdict == "values")
    assert row.codes == 1 / (64 * 96)
    scale = exporting.open_packed(str(four)).compressed(UP).base.scale.double()
    assert min(abs(row.largest - float(value)) for value in scale.abs().flatten()) < 1e-12


def test_missing_and_other_shapes(dense: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["mtp.extra.weight"] = torch.ones(2)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:50].clone()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float().bfloat16()

    other = edited(dense, tmp_path / "b", change)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    found = compare(dense, other)
    assert verdicts(found) == {
        "model.norm.weight": "only in A",
        "mtp.extra.weight": "only in B",
        "lm_head.weight": "shape",
        "model.embed_tokens.weight": "values",
    }
    assert next(row for row in found.rows if row.name == "lm_head.weight").second == "F32 50 x 64"
    assert found.config == {"rope_theta": (None, 7.0)}


def test_fused_experts_against_single_ones(tiny: Tiny, tmp_path: Path) -> None:
    """gpt_oss has experts as one tensor, and we one by one; a transposed weight is compared as what it means."""
    for family in ("gpt_oss", "gpt2"):
        run(tiny(family), tmp_path / family, None, [{**rtn()[0], "options": {"bits": 8, "group_size": 16}}])
        found = compare(tiny(family), tmp_path / family)
        assert {row.verdict for row in found.rows} == {"same", "values"}
        assert all(row.relative < 0.02 for row in found.rows if row.relative is not None)


def test_the_table_adds_blocks_up(dense: Path, four: Path) -> None:
    rows = {row["name"]: row for row in grouped(compare(dense, four))}
    assert rows["model.layers.*.mlp.up_proj.weight"]["count"] == 3
    assert rows["model.norm.weight"]["verdict"] == "same"


def test_exit_codes(dense: Path, four: Path, tmp_path: Path, run: Run) -> None:
    done = run("diff", four, four, "-q")
    assert done.code == 0
    assert "the checkpoints are the same" in done.out
    done = run("diff", dense, four, "--json")
    assert done.code == 9
    found = done.json
    assert found["same"] is False
    assert len(found["rows"]) == 30
    done = run("diff", dense, four)
    assert done.code == 9
    assert "model.layers.*.mlp.up_proj.weight" in done.out
    assert "9 of 30 tensors have the same values" in done.out
    assert "comparing" in done.err
    assert run("diff", dense, tmp_path / "nothing").code == 3
