"""`compress inspect`, `methods` and `recipes`: what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import Run, header
from places import ROOT
from transformers import AutoModelForCausalLM

Tiny = Callable[..., Path]


@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_inspect_adds_up_to_the_files(shards: str, run: Run, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    source = tiny("llama", max_shard_size=shards)
    run(
        "quantize",
        source,
        "-o",
        tmp_path / "out",
        "--data",
        ids,
        "--group-size",
        16,
        "--device",
        "cpu",
        "--set",
        f"max_shard_size={shards}",
    )
    for folder, compressed in ((source, False), (tmp_path / "out", True)):
        found = run("inspect", folder, "--json").json
        stored = sum(path.stat().st_size - header(path) for path in folder.glob("*.safetensors"))
        assert found["bytes"] == stored
        assert found["compressed"] == compressed
        assert found["bytes"] == found["other_bytes"] + sum(kind["bytes"] for kind in found["kinds"])
        assert sum(size for _, _, size in found["by_block"]) == sum(kind["bytes"] for kind in found["kinds"])
        assert found["weights"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
        assert found["blocks"] == 3
        text = run("inspect", folder).out
        assert all(kind["name"] in text for kind in found["kinds"])
        assert f"{found['bytes'] * 8 / found['weights']:.3f} bits per weight" in text
    kinds = {kind["name"]: kind for kind in run("inspect", tmp_path / "out", "--json").json["kinds"]}
    assert kinds["mlp.up_proj"]["stored"] == "4-bit g16"
    assert kinds["mlp.up_proj"]["bytes"] * 8 / kinds["mlp.up_proj"]["weights"] == 5, "4 bits, and 16 bits of scale for 16 weights"
    assert kinds["lm_head"]["stored"] == "F32"


def test_methods(run: Run) -> None:
    found = run("methods", "--json").json
    assert set(found) >= {"quant/gptq", "quant/rtn"}
    assert found["quant/gptq"]["needs"] == ["Hessian"]
    assert found["quant/rtn"]["needs"] == []
    assert (found["prune/magnitude"]["needs"], found["prune/magnitude"]["needs_by_default"]) == (["Hessian"], [])
    assert found["quant/gptq"]["options"]["bits"]["default"] == 4
    assert all(method["about"] for method in found.values())
    text = run("methods").out
    for path, method in found.items():
        assert path in text
        assert all(f"    {name} = " in text for name in method["options"])


def test_recipes(run: Run, tmp_path: Path) -> None:
    listed = run("recipes", "--json").json
    assert listed["rtn-8bit"].startswith("Round to nearest")
    assert all(name in run("recipes").out for name in listed)
    for name in listed:
        text = run("recipes", name).out
        assert text == (ROOT / "recipes" / f"{name}.yaml").read_text()
        assert run("recipes", name, "--json").json == yaml.safe_load(text)
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: []\n")
    assert run("recipes", mine).out == "steps: []\n"
    done = run("recipes", "rtn-9bit")
    assert (done.code, "did you mean rtn-8bit?" in done.err) == (2, True)
