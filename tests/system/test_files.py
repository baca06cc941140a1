"""Durable files: locks that follow no links, leftovers of kills, and what a full disk says."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from compress.errors import OutputError
from compress.system import files
from compress.system.files import locked, remove_folder, replacing, write_text, writing


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "lock").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(OutputError, match="a link is there"), writing(tmp_path / "lock"):
        locked(tmp_path / "lock")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError):
        locked(tmp_path / "lock")
    locked(tmp_path / "lock").close()


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    mine = files._temporary(tmp_path / "a.json").name
    stem = mine.rpartition("-")[0]
    dead, alive, elsewhere = f"{stem}-{process.pid}", f"{stem}-{os.getppid()}", f"a.json.tmp-00000000-{process.pid}"
    others = (alive, elsewhere, "a.json.tmp-mine", f"b{dead}")
    for name in (dead, *others):
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "a.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *others}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError("4096 requested and 0 written"), "the disk is full"),  # as numpy has it
        (OSError(errno.EIO, "Input/output error"), "Input/output error; look at that place"),
        (OSError(errno.ENOTEMPTY, "Directory not empty"), "something else is already there"),
    ],
)
def test_what_cannot_be_written_says_why(error: OSError, message: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=message), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_removing_a_folder_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("a")
    (tmp_path / "job" / "parts").mkdir(parents=True)
    (tmp_path / "job" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "job" / "job.json").write_text("{}")
    remove_folder(tmp_path / "job", "job.json")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "a").read_text() == "a"
