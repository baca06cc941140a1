"""`compress verify` of exports and converted checkpoints, and of what nothing was recorded of."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT
from runs import compress as run
from runs import steps

from compress.errors import CheckpointError, VerificationError
from compress.interop import exporter as exporting
from compress.interop.hub import push
from compress.runs.rehearsal import small_tokenizer
from compress.verify.verify import verify

Tiny = Callable[..., Path]
DEMO = ROOT / "examples" / "demo"
LAYOUTS = ("compressed-tensors", "gptq", "awq", "gguf", "native", "dense")


@pytest.fixture(scope="module")
def exports(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model, 4 bits in groups of 32, in every layout; the native one is made from the GPTQ one."""
    root = tmp_path_factory.mktemp("jane-secret")
    model = Path(shutil.copytree(tiny("llama", hidden_size=64, intermediate_size=96), root / "model"))
    words = json.loads((DEMO / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(small_tokenizer(words, 96)))
    run(model, root / "out", None, steps("quant/rtn", bits=4, group_size=32), dtype="float32")
    made = {}
    for layout in LAYOUTS:
        made[layout] = root / layout
        source = made["gptq"] if layout == "native" else root / "out"
        exporting.export(exporting.prepare(str(source), layout), made[layout], lambda *_: None)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_written_anywhere(layout: str, exports: dict[str, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exports[layout], tmp_path / "moved"))
    (moved / "README.md").write_text("mine")
    found = verify(moved, "cpu", lambda *_: None)
    assert found["format"] == layout
    assert found["decoded"] == found["sites"] >= 21
    recorded = json.loads((moved / "export.json").read_text())["files"]
    assert set(recorded) == {path.name for path in moved.iterdir()} - {"README.md", "export.json"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_is_found(layout: str, exports: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exports[layout], tmp_path / "copy"))
    draw = random.Random(layout)
    for name in json.loads((folder / "export.json").read_text())["files"]:
        path = folder / name
        raw = path.read_bytes()
        changed = bytearray(raw)
        place = draw.randrange(len(raw) * 8)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(VerificationError, match=name):
            verify(folder, "cpu", lambda *_: None)
        path.write_bytes(raw)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_compared_beside_checksums(layout: str, exports: dict[str, Path], tmp_path: Path) -> None:
    """A record whose checksums were made to fit does not hide other values."""
    folder = Path(shutil.copytree(exports[layout], tmp_path / "copy"))
    record = json.loads((folder / "export.json").read_text())
    name = sorted(record["values"])[0]
    record["values"][name] = "0" * 64
    (folder / "export.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match=f"{name} decodes to other values"):
        verify(folder, "cpu", lambda *_: None)


def test_an_export_says_nothing_of_this_machine_and_can_be_pushed(exports: dict[str, Path], tmp_path: Path) -> None:
    for folder in exports.values():
        assert "secret" not in (folder / "export.json").read_text() + (folder / "README.md").read_text()
        assert "export.json" in push(folder, "me/x", False, True).files
    changed = Path(shutil.copytree(exports["gptq"], tmp_path / "changed"))
    (changed / "quantize_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"quantize_config\.json: was changed"):
        push(changed, "me/x", False, True)


def test_repeating_an_export_after_an_evaluation_is_not_another_one(tiny: Tiny, tmp_path: Path) -> None:
    """Files that are laid beside the weights change the folder, not what is exported."""
    run(tiny("llama"), tmp_path / "out", None, steps("quant/rtn", bits=4, group_size=-1))
    work = exporting.prepare(str(tmp_path / "out"), "compressed-tensors")
    exporting.export(work, tmp_path / "ct", lambda *_: None)
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    again = exporting.prepare(str(tmp_path / "out"), "compressed-tensors")
    assert exporting.export(again, tmp_path / "ct", lambda *_: None)["resumed"]


def test_nothing_recorded_is_said(tiny: Tiny, exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither summary\.json nor export\.json.*compress doctor"):
        verify(tiny("llama"), "cpu", lambda *_: None)
    older = Path(shutil.copytree(exports["awq"], tmp_path / "older"))
    record = json.loads((older / "export.json").read_text())
    del record["values"]
    (older / "export.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="older version, export it again"):
        verify(older, "cpu", lambda *_: None)
