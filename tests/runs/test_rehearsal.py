"""A rehearsal finds before a run what a run would fail of, in every family, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from places import ROOT
from runs import steps
from thorough import some
from tiny import TINY

from compress.errors import CalibrationError
from compress.recipe import reading as recipe_reading
from compress.runs import rehearsal

Tiny = Callable[..., Path]


def rehearse(
    model: Path, folder: Path, wanted: list[dict[str, Any]], formats: Sequence[str] = (), **more: Any
) -> rehearsal.Rehearsal:
    made = recipe_reading.parse({"steps": wanted, "data": {"name": "c4"}, "dtype": "float32", **more})
    return rehearsal.rehearse(str(model), made, folder / "rehearsal", "cpu", lambda *_: None, formats=formats)


@pytest.mark.parametrize("family", some(TINY, "llama", "gpt2", "gpt_oss"))
def test_every_family_passes(family: str, tiny: Tiny, tmp_path: Path) -> None:
    found = rehearse(tiny(family), tmp_path, steps(bits=4, group_size=-1))
    assert found.problem is None
    assert [stage.name for stage in found.stages][-1] == "sizes as predicted"
    assert found.reload["mean_difference_nats"] < 1e-3
    assert list(tmp_path.iterdir()) == []


def test_the_copy_is_small_and_random(tiny: Tiny, tmp_path: Path) -> None:
    from compress.checkpoint.source import Source

    model = tiny("qwen3_moe", num_hidden_layers=6, num_experts=12, vocab_size=1000, mlp_only_layers=[1, 4])
    source = Source.open(model)
    changed = rehearsal.write_copy(source, tmp_path / "copy")
    copy = Source.open(tmp_path / "copy")
    assert {key: changed[key] for key in ("num_hidden_layers", "vocab_size")} == {
        "num_hidden_layers": [6, 2],
        "vocab_size": [1000, 512],
    }
    assert next(new for key, (_, new) in changed.items() if key.endswith("experts")) == 8
    assert copy.config["mlp_only_layers"] == [1]
    assert copy.entries["model.embed_tokens.weight"].shape == (512, 32)
    assert copy.entries["model.layers.0.mlp.gate.weight"].shape == (8, 32)
    assert not [name for name in copy.entries if ".layers.2." in name or ".experts.8." in name]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert copy.entries[name].shape == source.entries[name].shape
    assert not copy.tensor(name).equal(source.tensor(name))


def test_what_would_fail_is_said(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indivisible = rehearse(tiny("llama"), tmp_path, steps(bits=4, group_size=24))
    assert "group_size=24" in (indivisible.problem or "")
    assert [stage.name for stage in indivisible.stages] == ["recipe on the real model"]

    def fails(*_: Any, **__: Any) -> None:
        raise CalibrationError("model.layers.0: the method gives up")

    monkeypatch.setattr("compress.methods.quant.gptq.GPTQ.__call__", fails)
    broken = rehearse(tiny("llama"), tmp_path, steps(bits=4, group_size=16))
    assert broken.problem == "model.layers.0: the method gives up"
    monkeypatch.setattr("compress.methods.quant.gptq.GPTQ.__call__", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in (rehearse(tiny("llama"), tmp_path, steps(bits=4, group_size=16)).problem or "")
    assert list(tmp_path.iterdir()) == []


def test_steps_for_blocks_that_the_copy_lacks_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    wanted = steps("quant/rtn", match="model.layers.2.*", bits=2, group_size=16) + steps(bits=4, group_size=16)
    assert rehearse(tiny("llama"), tmp_path, wanted).problem is None


@pytest.mark.parametrize("method", ["awq", "signround", "tuned"])
def test_methods_that_see_blocks(method: str, tiny: Tiny, tmp_path: Path) -> None:
    more: dict[str, Any] = {}
    wanted = steps(bits=3, group_size=16)
    if method == "awq":
        more["transforms"] = [{"method": "transform/awq"}]
    elif method == "tuned":
        more["tuning"] = [{"method": "tune/grid", "options": {"epochs": 1}}]
    else:
        wanted = steps("quant/signround", bits=3, group_size=16, steps=2)
    assert rehearse(tiny("llama"), tmp_path, wanted, **more).problem is None


def test_the_command(tiny: Tiny, run: Run) -> None:
    small = ("--set", "steps.0.options.group_size=16", "--device", "cpu", "--quiet")
    done = run("rehearse", tiny("llama"), "gptq-3bit", *small)
    assert (done.code, "loads the result" in done.out) == (0, True)
    done = run("rehearse", tiny("llama"), "gptq-3bit", "--set", "steps.0.options.group_size=24", "--json", "--device", "cpu")
    assert done.code == 2
    assert done.json["ok"] is False


def test_exports_are_rehearsed_too(tmp_path: Path) -> None:
    demo, formats = ROOT / "examples" / "demo", ["gptq", "compressed-tensors", "gguf"]
    found = rehearse(demo, tmp_path / "one", steps("quant/rtn", bits=4, group_size=32), formats=formats)
    assert found.problem is None
    assert [stage.name for stage in found.stages][-3:] == [f"export to {name}" for name in formats]
    found = rehearse(demo, tmp_path / "two", steps("quant/floating", datatype="nf4", compensate=False), formats=["gptq"])
    assert found.stages[-1].name == "export to gptq"
    assert "nf4" in (found.problem or "")


def test_a_small_tokenizer_has_no_token_that_is_gone() -> None:
    values = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 9}, "merges": ["a b", ["ab", "c"]]},
        "added_tokens": [{"id": 3, "content": "c"}, {"id": 9, "content": "abc"}],
    }
    found = rehearsal.small_tokenizer(values, 4)
    assert found["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2, "c": 3}
    assert found["model"]["merges"] == ["a b"]
    assert [token["id"] for token in found["added_tokens"]] == [3]
