"""States of interrupted commands: what comes back, damage that is noticed, a disk that is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from compress.errors import CheckpointError, OutputError
from compress.system import state_file
from compress.system.state_file import load_state, save_state

VALUES = {"step": 3, "moving": [torch.arange(300.0), torch.ones(2, 2, dtype=torch.bfloat16)], "name": "a"}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", VALUES)
    found = load_state(tmp_path / "state.pt", "cpu", "again")
    assert (found["step"], found["name"]) == (3, "a")
    assert all(torch.equal(a, b) for a, b in zip(found["moving"], VALUES["moving"], strict=True))  # type: ignore[call-overload]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_flipped_bit_anywhere_or_a_missing_end_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, VALUES)
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.pt: is damaged.*; start over"):
            load_state(path, "cpu", "start over")
    for length in (0, 10, 32, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(path, "cpu", "start over")


def test_a_full_disk_is_a_message_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    class Full(state_file._Digested):
        """A stream on a disk with room for 100 bytes."""

        def __init__(self, stream: IO[bytes]) -> None:
            super().__init__(stream)
            self.written = 0

        def write(self, data: Any) -> int:
            self.written += len(data)
            if self.written > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(state_file, "_Digested", Full)
    with pytest.raises(OutputError, match=r"state\.pt: cannot be written: the disk is full"):
        save_state(path, VALUES)
    assert load_state(path, "cpu", "again") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
