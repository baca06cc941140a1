"""Massive activations are found where they are, and the model card says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import compress, steps
from safetensors.torch import load_file, save_file

from compress.blockwise.stream import ORIGINAL, Stream
from compress.runs import massive

Tiny = Callable[..., Path]
RECIPE = steps(bits=4, group_size=16)


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Token 5 stands at one place: position 0 of window 2."""
    ids = np.random.default_rng(0).integers(6, 96, (6, 16))
    ids[2, 0] = 5
    np.save(tmp_path / "ids.npy", ids)
    return tmp_path / "ids.npy"


def test_a_massive_token_is_named(tiny: Tiny, windows: Path, tmp_path: Path) -> None:
    """Value, channel, token, position and block: in the summary, and in a sentence of the card."""
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 3] = -5000.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = compress(model, tmp_path / "out", windows, RECIPE).values["massive"]
    assert [one["block"] for one in found] == [0, 1, 2]
    for one in found:
        assert (one["channel"], one["position"], one["token"]) == (3, 0, 5)
        assert one["value"] == pytest.approx(-5000, rel=0.01)
        assert 0 < one["median"] < 1
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "The model has massive activations: -5,0" in card
    assert "in channel 3 of token 0 (id 5) before block" in card
    assert "before blocks 0-2 values are over a thousand times the median" in card


def test_an_even_model_has_none(tiny: Tiny, windows: Path, tmp_path: Path) -> None:
    assert compress(tiny("llama"), tmp_path / "out", windows, RECIPE).values["massive"] == []
    assert "massive" not in (tmp_path / "out" / "README.md").read_text()


def test_states_elsewhere_are_not_looked_at() -> None:
    """Where the calibration is not run through a block, nothing is known of it."""
    stream = Stream("calibration", ORIGINAL, torch.zeros(1, 4), [slice(0, 1)], None, position=2)  # type: ignore[arg-type]
    assert massive.largest(stream, 1) is None
