"""Biases that are added: refused where the config has no place, zeros at first, trained, stored, loaded, trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress as run
from runs import steps

from compress.architecture.added_biases import with_biases
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.evaluation.quality import measure
from compress.model.detect import find_family
from compress.recipe import reading as recipe_reading
from compress.recipe.data import Data
from compress.runs import prepare as run_prepare
from compress.runs.pipeline import Settings
from compress.verify.verify import verify

Tiny = Callable[..., Path]
PRUNED = steps("prune/magnitude", sparsity=0.6)
PROBE = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(5))


def trained(**options: Any) -> dict[str, Any]:
    return {"tuning": [{"method": "retrain/perp", "options": {"epochs": 2, "add_biases": True, **options}}]}


def biases_of(folder: Path) -> dict[str, torch.Tensor]:
    source = Source.open(folder)
    return {name: source.tensor(name) for name in source.entries if name.endswith("_proj.bias")}


@pytest.mark.parametrize(("family", "each"), [("llama", 7), ("qwen3", 4)])
def test_biases_are_added_trained_stored_and_loaded(family: str, each: int, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, out = tiny(family), tmp_path / "out"
    summary = run(model, out, ids, PRUNED, **trained(weights="none", norms=False))
    found = biases_of(out)
    assert len(found) == 3 * each
    assert all(bool(value.any()) for value in found.values())
    assert summary.values["bytes_after"] == sum(entry.nbytes for entry in Source.open(out).entries.values())
    assert summary.values["bytes_before"] == Source.open(model).nbytes
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.config.attention_bias is True
    changed = loaded.eval()(PROBE, use_cache=False).logits
    for name, value in found.items():
        torch.testing.assert_close(loaded.get_submodule(name.removesuffix(".bias")).bias.detach(), value)
    for name in found:
        loaded.get_submodule(name.removesuffix(".bias")).bias.data.zero_()
    assert not torch.equal(changed, loaded(PROBE, use_cache=False).logits)
    verify(out, "cpu", lambda *_: None)
    data = Data(name=str(ids))
    without = run(model, tmp_path / "plain", ids, PRUNED)
    kl = [measure(str(o), str(model), data, "cpu", "float32", False, lambda *_: None).kl for o in (out, without.out)]
    assert kl[0] < kl[1]


def test_what_is_not_trained_is_stored_as_zeros(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """The stage sees one block; linears of the others have biases by the config, which hold for all."""
    stage = trained(weights="none")
    stage["tuning"][0]["match"] = "model.layers.1.*"
    run(tiny("llama"), tmp_path / "out", ids, PRUNED, **stage)
    for name, value in biases_of(tmp_path / "out").items():
        assert bool(value.any()) == name.startswith("model.layers.1.")


def test_only_when_asked_and_only_where_there_is_a_place(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    run(tiny("llama"), tmp_path / "out", ids, PRUNED, **trained(add_biases=False))
    assert biases_of(tmp_path / "out") == {}
    with pytest.raises(RecipeError, match="mistral has no place for biases"):
        run(tiny("mistral"), tmp_path / "other", ids, PRUNED, **trained())
    source = Source.open(tiny("llama", attention_bias=True, mlp_bias=True))
    assert with_biases(source, find_family(source)) is source


@pytest.mark.parametrize("before", [True, False])
def test_a_whole_model_is_trained_with_its_new_biases(before: bool, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """By `compress retrain`, on a result that has them and on one that has not."""
    from compress.checkpoint.packed_source import PackedSource
    from compress.runs import run as run_module

    model, first = tiny("llama"), tmp_path / "first"
    run(model, first, ids, PRUNED, **(trained(weights="none") if before else {}))
    start = PackedSource.open_packed(first)
    values = recipe_reading.read(str(first / "recipe.yaml"))
    values["data"] = {"name": str(ids)}
    options = {"weights": "none", "add_biases": True, "relative_rate": 0.01}
    values["retraining"] = [{"method": "retrain/perp", "steps": 4, "batch": 2, "options": options}]
    plan = run_prepare.prepare(str(model), recipe_reading.parse(values), "cpu")
    run_module.retrain(plan, run_prepare.calibration(plan), start, tmp_path / "out", lambda *_: None, anew=False)
    old, new = biases_of(first), biases_of(tmp_path / "out")
    assert len(new) == 21
    assert any(bool((value != old.get(name, torch.zeros_like(value))).any()) for name, value in new.items())
    verify(tmp_path / "out", "cpu", lambda *_: None)


def test_a_stopped_run_goes_on(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    from runs import digests

    model = tiny("llama")
    run(model, tmp_path / "whole", ids, PRUNED, **trained())

    def stop(block: int, total: int, step: str, share: float) -> None:
        if block == 2 and step == "tuning":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", ids, PRUNED, progress=stop, settings=Settings(), **trained())
    run(model, tmp_path / "out", ids, PRUNED, **trained())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
