"""`compress verify`: one changed byte is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from command_line import Run, header, summary
from runs import ids_file


def test_verify(run: Run, packed: Path) -> None:
    done = run("verify", packed)
    assert done.code == 0
    assert "5 files match their checksums, 7 of 7 weights are what was compressed" in done.out
    found = run("verify", packed, "--json")
    assert found.err == ""
    assert found.json["mean_difference_nats"] <= found.json["limit_nats"]
    assert run("verify", packed, "--quiet").err == ""
    assert run("verify", packed, "--device", "toaster").code == 2


@pytest.mark.parametrize("place", ["first", "middle", "last", "header"])
def test_verify_notices_one_byte(place: str, run: Run, packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "copy")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    at = {"first": header(path), "middle": len(raw) // 2, "last": len(raw) - 1, "header": 40}[place]
    raw[at] ^= 1
    path.write_bytes(raw)
    done = run("verify", folder)
    assert done.code == 7
    assert "model.safetensors was changed since it was written (SHA-256" in done.err
    assert "fetch these files again" in done.err


def test_verify_notices_what_checksums_do_not_cover(run: Run, packed: Path, tmp_path: Path) -> None:
    gone = shutil.copytree(packed, tmp_path / "gone")
    (gone / "model.safetensors").unlink()
    assert run("verify", gone).code == 7
    other = shutil.copytree(packed, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 3.0}))
    done = run("verify", other)
    assert (done.code, "config.json was changed" in done.err) == (7, True)
    values = summary(other)
    values["files"]["config.json"] = hashlib.sha256((other / "config.json").read_bytes()).hexdigest()
    (other / "summary.json").write_text(json.dumps(values))
    done = run("verify", other)
    assert (done.code, "losses of the recorded batch differ" in done.err) == (7, True)


def test_verify_of_something_else(run: Run, model: Path, packed: Path, tmp_path: Path) -> None:
    assert run("verify", model).code == 3
    assert run("verify", tmp_path / "nowhere").code == 3
    assert run("verify", ids_file(tmp_path / "file.npy")).code == 3
    values = summary(packed)
    for number, text in enumerate(
        [
            "[]",
            "{}",
            "3",
            "{",
            json.dumps({**values, "check": 3}),
            json.dumps({**values, "files": []}),
            json.dumps({**values, "check": {}}),
        ]
    ):
        folder = shutil.copytree(packed, tmp_path / str(number))
        (folder / "summary.json").write_text(text)
        done = run("verify", folder)
        assert (done.code, "summary.json" in done.err) == (3, True), text
