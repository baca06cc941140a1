"""Exports at the end of a run: one that fails keeps no other from being written, and is an error once all is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.errors import FormatError
from compress.interop import delivery
from compress.interop.delivery import Delivery, Exported


def test_what_fails_keeps_no_other_from_being_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []

    def prepare(source: str, name: str) -> str:
        if name == "gptq":
            raise FormatError("blocks.0: 5 bits; gptq holds 2, 3, 4 and 8")
        return name

    def export(work: str, out: Path, progress: Any) -> dict[str, Any]:
        written.append(out.name)
        return {"format": work}

    monkeypatch.setattr(delivery.exporter, "open_packed", lambda model: model)
    monkeypatch.setattr(delivery.exporter, "prepare", prepare)
    monkeypatch.setattr(delivery.exporter, "export", export)
    wanted = Delivery(formats=("gptq", "awq", "dense"))
    found = delivery.after_run("OUT", wanted, wanted.places(tmp_path / "OUT"), lambda *_: None)
    assert written == ["OUT-awq", "OUT-dense"]
    assert [one["format"] for one in found.made] == ["awq", "dense"]
    with pytest.raises(FormatError, match="gptq holds 2, 3, 4 and 8"):
        found.raise_failed()


def test_all_that_failed_is_said() -> None:
    Exported().raise_failed()
    with pytest.raises(FormatError, match="first\nsecond"):
        Exported(failed=(FormatError("first"), FormatError("second"))).raise_failed()


def test_without_formats_nothing_is_opened() -> None:
    assert delivery.after_run("no such folder", Delivery(), {}, lambda *_: None) == Exported()
