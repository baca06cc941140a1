"""What tests of commands share: a small model, and the checkpoint that `compress quantize` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Done, Run

Tiny = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tiny: Tiny) -> Path:
    """A llama of one block."""
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture
def quantize(run: Run, model: Path, ids: Path, tmp_path: Path) -> Run:
    """`compress quantize` of the small model to OUT; more arguments follow or override."""

    def call(*arguments: object, out: str = "out", data: object = ids) -> Done:
        common = ["--device", "cpu", "--group-size", 16, *(["--data", data] if data else [])]
        return run("quantize", model, "-o", tmp_path / out, *common, *arguments)

    return call


@pytest.fixture(scope="session")
def packed(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint that tests leave as it is."""
    from runs import compress, steps

    out = tmp_path_factory.mktemp("packed") / "out"
    compress(model, out, ids, steps(bits=3, group_size=16))
    return out
