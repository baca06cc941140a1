"""Side files of untrusted folders: nothing is waited for, filled, nested or followed beyond what is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from limits import quickly

from compress.errors import CheckpointError
from compress.system import side_files
from compress.system.side_files import MAX_BYTES, MAX_DEPTH, lies_within, read_json, read_json_lines, read_object, read_text


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(5 << 30)


def secret(path: Path) -> None:
    outside = path.parent.parent / "secret.json"
    outside.write_text("{}")
    path.symlink_to(outside)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is not a file"),
    "a folder": (Path.mkdir, "is not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "outside of the folder"),
    "a loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "a link to outside": (secret, "outside of the folder"),
    "5 GB of nothing": (sparse, f"expected at most {MAX_BYTES:,}"),
    "deep": (lambda path: path.write_text(nested(MAX_DEPTH + 1)), "nested more than"),
    "so deep that parsers give up": (lambda path: path.write_text(nested(200_000)), "nested more than|cannot be read"),
    "millions of values": (lambda path: path.write_text("[" + "0," * 4_100_000 + "0]"), "values; expected at most"),
    "half a pair": (lambda path: path.write_text('"\\ud800"'), "cannot be read"),
    "a long number": (lambda path: path.write_text("9" * 5000), "cannot be read"),
    "no UTF-8": (lambda path: path.write_bytes(b'"\xff"'), "cannot be read"),
    "nothing": (lambda path: None, "it is not there"),
    "empty": (lambda path: path.write_text(""), "cannot be read"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    path = tmp_path / "folder" / "config.json"
    path.parent.mkdir()
    make(path)
    with quickly(60.0, 200 << 20), pytest.raises(CheckpointError, match=message) as found:
        read_json(path)
    assert str(path) in str(found.value)


def test_what_is_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(nested(MAX_DEPTH - 1))
    assert json.dumps(read_json(path)) == nested(MAX_DEPTH - 1)
    path.write_text('{"a": "\\ud83d\\ude00"}', encoding="utf-8")
    assert read_object(path) == {"a": "\U0001f600"}
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a JSON list; expected an object"):
        read_object(path)
    with pytest.raises(CheckpointError, match="has 3 bytes; expected at most 2"):
        read_text(path, 2)


def test_links_lead_within_a_folder_or_to_what_the_hub_s_client_keeps(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123").write_text("{}")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    (snapshot / "other.json").symlink_to("config.json")
    (snapshot / "up.json").symlink_to("../../../elsewhere.json")
    assert read_object(snapshot / "config.json") == read_object(snapshot / "other.json") == {}
    assert lies_within(snapshot / "config.json", snapshot)
    assert not lies_within(snapshot / "up.json", snapshot)
    (tmp_path / "model").symlink_to(snapshot)
    assert lies_within(tmp_path / "model" / "config.json", tmp_path / "model")


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": 2}]
    for line, message in (
        ("[]", "report.jsonl:1: holds a list"),
        ("{", "report.jsonl:1: cannot be read"),
        ("", "cannot be read"),
    ):
        path.write_text(f"{line}\n")
        with pytest.raises(CheckpointError, match=message):
            list(read_json_lines(path))
    monkeypatch.setattr(side_files, "MAX_LINE", 10)
    path.write_text('{"a": 1}\n{"long": 12345}\n')
    with pytest.raises(CheckpointError, match=r"report\.jsonl:2: is longer than 10 bytes"):
        list(read_json_lines(path))
    path.unlink()
    os.mkfifo(path)
    with quickly(), pytest.raises(CheckpointError, match="is not a file"):
        list(read_json_lines(path))
