"""The last step of a run: a fresh process loads the result."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import compress, steps

from compress.errors import VerificationError
from compress.output import seal
from compress.system import memory
from compress.verify import fresh_process as reload

Tiny = Callable[..., Path]
RECIPE = steps(bits=4, group_size=16)


@pytest.mark.fresh_process
def test_a_process_of_its_own_gives_the_same_losses(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    found = compress(tiny("mixtral"), tmp_path / "out", ids, RECIPE, reload=True).values["reload"]
    assert found["tokens"] == 16
    assert found["mean_difference_nats"] < 1e-4
    assert found["transformers"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["reload"] == found


@pytest.mark.fresh_process
def test_what_does_not_load_is_not_published(tiny: Tiny, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that our own reader accepts and transformers does not: its message is passed on, and the parts are kept."""
    write = seal.write_config

    def broken(folder: Path, config: Any, table: Any) -> None:
        write(folder, config, table)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "hidden_act": "no such function"}))

    checked = reload.check
    monkeypatch.setattr(seal, "write_config", broken)
    monkeypatch.setattr(
        "compress.runs.finish._check", lambda *_: {"ids": [1, 2], "losses": [0.0], "dtype": "float32", "difference": 0}
    )
    with pytest.raises(VerificationError, match=r"a fresh process cannot load what was written: .*no such function"):
        compress(tiny("llama"), tmp_path / "out", ids, RECIPE, reload=True)
    assert checked is reload.check
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.job" / "parts").iterdir())


def test_other_losses_are_an_error(tmp_path: Path) -> None:
    answer = {"losses": [1.0, 2.0], "seconds": 0.1, "transformers": "5"}
    common = ("float32", "cpu", 1000, 0.01)
    assert reload.check(lambda _: dict(answer), tmp_path, [1, 2, 3], [1.0, 2.001], *common)["mean_difference_nats"] < 0.001
    for losses in ([1.5, 2.0], [float("nan"), 2.0]):
        with pytest.raises(VerificationError, match="differ by"):
            reload.check(lambda _: dict(answer), tmp_path, [1, 2, 3], losses, *common)


def test_what_does_not_fit_into_memory_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2 << 30)
    found = reload.check(lambda _: {}, tmp_path, [1, 2], [1.0], "float32", "cpu", 4 << 30, 0.01)
    assert found == {"skipped": "loading needs about 5120 MiB and 2048 MiB of memory are free"}


@pytest.mark.fresh_process
def test_a_run_that_fails_leaves_no_process() -> None:
    with reload.fresh_process() as ask:
        assert callable(ask)
    with pytest.raises(ValueError, match="closed file"):
        ask({})


@pytest.mark.fresh_process
def test_files_of_the_working_directory_are_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "compress", "numpy", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('taken from the working directory')\n")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with reload.fresh_process() as ask:
        answer = ask({"folder": str(tmp_path / "nothing"), "ids": [1], "dtype": "float32", "device": "cpu"})
    assert "nothing" in answer["error"]
    assert "working directory" not in answer["error"]


def test_available_memory_is_plausible() -> None:
    room = memory.available()
    assert room is None or 1 << 20 < room < 1 << 50
