"""The running check: held-out windows are followed, a broken model stops the run, and a resumed run gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress, digests, steps

from compress.errors import CalibrationError
from compress.model.streamed import StreamedModel
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]
RECIPE = steps(bits=3, group_size=16)


def test_differences_are_those_of_the_models(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Against both models as transformers runs them, on the last windows of the data."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    import compress as package

    found = compress(tiny("llama"), tmp_path / "out", ids, RECIPE, watch={"windows": 3}).values["watched"]
    held = torch.from_numpy(np.load(ids)[-3:].astype("int64"))
    with torch.no_grad():
        both = [
            model.eval()(held, output_hidden_states=True, use_cache=False).hidden_states
            for model in (package.load(str(tmp_path / "out")), AutoModelForCausalLM.from_pretrained(tiny("llama")))
        ]
    # The last of transformers' is behind the final norm.
    expected = [float((a - b).norm() / b.norm()) for a, b in zip(both[0][1:-1], both[1][1:-1], strict=True)]
    assert found[:-1] == pytest.approx(expected, rel=1e-3)
    assert len(found) == 3
    assert found == sorted(found), "errors add up on this model"


def test_held_windows_are_not_calibrated_on(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    watched = compress(tiny("llama"), tmp_path / "watched", ids, RECIPE, watch={"windows": 3})
    plain = compress(tiny("llama"), tmp_path / "plain", ids, RECIPE)
    assert {row.tokens for row in plain.rows} == {12 * 16}
    assert {row.tokens for row in watched.rows} == {9 * 16}


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_broken_model_stops_the_run(
    value: float, tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that gives nonsense once it is compressed: the run ends there and not after the last block."""
    set_weight, compressed = StreamedModel.set_weight, []

    def broken(self: Any, site: Any, weight: torch.Tensor) -> None:
        compressed.append(site.block)
        again = compressed.count(site.block) > 7  # the block's seven linears come a second time when they are decoded
        set_weight(
            self, site, torch.full_like(weight, value) if site.block == 1 and again and "down_proj" in site.name else weight
        )

    monkeypatch.setattr(StreamedModel, "set_weight", broken)
    with pytest.raises(CalibrationError, match=r"block 1: on held-out windows .* The model has broken"):
        compress(tiny("llama"), tmp_path / "out", ids, RECIPE, watch={"windows": 2})
    assert 2 not in compressed
    assert not (tmp_path / "out").exists()


def test_the_limit_counts(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"expected at most 1e-06 \(watch.limit\)"):
        compress(tiny("llama"), tmp_path / "out", ids, RECIPE, watch={"windows": 2, "limit": 1e-6})


@pytest.mark.parametrize("settings", [Settings(), Settings(offload=True), Settings(snapshot_seconds=0.0)])
def test_a_run_that_goes_on_watches_the_same(settings: Settings, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    whole = compress(tiny("mixtral"), tmp_path / "whole", ids, RECIPE, watch={"windows": 3})

    def stop(block: int, *_: object) -> None:
        if block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny("mixtral"), tmp_path / "out", ids, RECIPE, watch={"windows": 3}, settings=settings, progress=stop)
    again = compress(tiny("mixtral"), tmp_path / "out", ids, RECIPE, watch={"windows": 3}, settings=settings)
    assert again.values["watched"] == pytest.approx(whole.values["watched"], rel=1e-6)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_without_data_random_tokens_are_watched(tiny: Tiny, tmp_path: Path) -> None:
    found = compress(tiny("llama"), tmp_path / "out", None, steps("quant/rtn", bits=4, group_size=16), watch={"windows": 2})
    assert len(found.values["watched"]) == 3


def test_too_few_windows(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"watch.windows: 12 of 12"):
        compress(tiny("llama"), tmp_path / "out", ids, RECIPE, watch={"windows": 12})
