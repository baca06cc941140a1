"""A command of compress in two processes that share the work, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any


def rank(number: int, port: int, arguments: list[str], log: Path) -> None:
    """Be one of two ranks, as torchrun would start it."""
    from compress import cli

    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["compress", *arguments]
    with log.open("w") as stream, contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
        cli.main()


def two_ranks(forks: Any, folder: Path, *arguments: object) -> None:
    """Run a command in two ranks; what they print goes into `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, logs = [str(a) for a in arguments], [folder / f"rank{number}.log" for number in range(2)]
    processes = [forks.Process(target=rank, args=(number, port, words, logs[number])) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    said = "\n".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [0, 0], said
