"""Plain numbers: any checkpoint of ours for any loader, the same values in the smallest type that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import loaded, logits
from runs import compress as run
from safetensors.torch import load_file
from tiny import VOCABULARY

from compress.errors import FormatError, VerificationError
from compress.interop import exporter as exporting

Tiny = Callable[..., Path]
PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


def step(method: str, **options: Any) -> list[dict[str, Any]]:
    return [{"match": "*.*", "method": method, "options": options}]


RECIPES = {
    "codes": step("quant/rtn", bits=3, group_size=16),
    "offsets": step("quant/hqq", bits=4, group_size=16),
    "widths by column": step("quant/slim", bits=2.5, group_size=16),
    "outliers": step("quant/spqr", bits=3, group_size=16),
    "a table": step("quant/floating", datatype="nf4", group_size=16),
    "2:4": step("prune/magnitude", pattern="2:4"),
    "2:4 and codes": step("prune/wanda", pattern="2:4", bits=4, group_size=16),
    "low rank": step("prune/svd", sparsity=0.5),
}


@pytest.fixture(scope="module")
def made(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Return a function that gives a checkpoint by one of RECIPES, and its export."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def get(recipe: str, family: str = "llama", **changes: Any) -> tuple[Path, Path]:
        name = f"{family} {recipe}"
        if name not in known:
            known[name] = root / name / "out", root / name / "dense"
            run(tiny(family, num_hidden_layers=2, **changes), known[name][0], ids, RECIPES[recipe])
            exporting.export(exporting.prepare(str(known[name][0]), "dense"), known[name][1], lambda *_: None)
        return known[name]

    return get


@pytest.mark.parametrize("recipe", RECIPES)
def test_plain_transformers_gives_our_logits(recipe: str, made: Callable[..., tuple[Path, Path]]) -> None:
    ours, plain = made(recipe)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    y, expected = logits(loaded(plain), PROBE), logits(loaded(ours), PROBE)
    # Parts beside the base are added to its products by our runtime, and to its values here.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    stored, source = load_file(plain / "model.safetensors"), exporting.open_packed(str(ours))
    for site in source.table:
        assert torch.equal(stored[f"{site}.weight"].float(), source.compressed(site).dequantize()), site


def test_experts(made: Callable[..., tuple[Path, Path]]) -> None:
    ours, plain = made("codes", "mixtral")
    expected = logits(loaded(ours), PROBE)
    torch.testing.assert_close(logits(loaded(plain), PROBE), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_kept_values_stay_in_their_type(tiny: Tiny, made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """A model in bfloat16 that was pruned is as large as it was; codes times scales need more."""
    run(tiny("llama", num_hidden_layers=2), tmp_path / "out", None, step("prune/magnitude", pattern="2:4", dtype="bfloat16"))
    exporting.export(exporting.prepare(str(tmp_path / "out"), "dense"), tmp_path / "dense", lambda *_: None)
    for folder, dtype in ((tmp_path / "dense", torch.bfloat16), (made("codes")[1], torch.float32)):
        assert load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].dtype == dtype


def test_a_value_that_was_written_wrong_is_found(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = made("codes")
    work = exporting.prepare(str(ours), "dense")
    real = work.form.tensors
    monkeypatch.setattr(type(work.form), "tensors", lambda self, *given: {"weight": -real(*given)["weight"]})
    with pytest.raises(VerificationError, match="reads back with other values"):
        exporting.export(work, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_what_has_other_shapes_on_disk_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("gpt2"), tmp_path / "out", None, RECIPES["codes"])
    with pytest.raises(FormatError, match=r"stores weights \(in, out\)"):
        exporting.prepare(str(tmp_path / "out"), "dense")
