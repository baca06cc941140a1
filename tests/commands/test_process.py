"""`compress` as a process: interrupted, on a terminal, into a pipe that closes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import Run
from places import ROOT
from runs import digests, ids_file

Tiny = Callable[..., Path]


def started(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compress", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **more)


def test_interrupted_and_run_again(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    """Ctrl-C in the middle of a run; the same command then goes on, and gives what an uninterrupted one gives."""
    many = tiny("llama", num_hidden_layers=60)
    data = ids_file(tmp_path / "ids.npy", samples=200, length=64)
    arguments = ["quantize", many, "--data", data, "--group-size", 16, "--device", "cpu", "-o"]
    process = started(*arguments, tmp_path / "out", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "out.job" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert out == b""
    assert b"\x1b" not in err
    assert err.decode().splitlines()[-1] == "interrupted; run the same command again to go on"
    assert b"Traceback" not in err
    assert not (tmp_path / "out").exists()
    begun = journal.read_bytes().count(b"\n")
    assert 2 <= begun < 60
    assert run(*arguments, tmp_path / "out").code == 0
    assert run(*arguments, tmp_path / "whole", "--quiet").code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_progress_on_a_terminal(tiny: Tiny, tmp_path: Path) -> None:
    """A live line with block, step, share and memory; the table follows."""
    import pty

    ours, theirs = pty.openpty()
    many, data = tiny("llama", num_hidden_layers=10), ids_file(tmp_path / "ids.npy", samples=100, length=64)
    arguments = ["quantize", many, "-o", tmp_path / "out", "--data", data, "--group-size", 16, "--device", "cpu"]
    process = started(*arguments, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # what Linux says at the end
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait() == 0
    assert b"\x1b[" in seen
    assert b"Traceback" not in seen
    assert re.search(rb"block \d+/10  (calibrating|compressing|running)", seen)
    assert b"peak" in seen
    assert not re.search(rb"-\d+:\d+ left", seen), "no time is less than none"
    assert b"bits per weight" in seen


def test_a_reader_that_stops_reading(packed: Path) -> None:
    """`compress inspect OUT --json | head -1`"""
    process = started("inspect", packed, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait()
    assert b"Traceback" not in err
