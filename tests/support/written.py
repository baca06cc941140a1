"""Commands of the documentation as they are written, on less: a demo of two blocks, a few short windows of its text."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compress import cli

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
OFFLINE = ROOT / "tests" / "support" / "offline"  # processes with it on their path have no network
_FEWER = {"--samples": "8", "--length": "64", "--limit": "4"}


def short_demo(folder: Path, blocks: int = 2) -> Path:
    """Write examples/demo with its first blocks only below a folder; all its text and its tokenizer are there."""
    place = folder / "examples" / "demo"
    place.mkdir(parents=True)
    for path in DEMO.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, place / path.name)
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}), encoding="utf-8")
    tensors = load_file(DEMO / "model.safetensors")
    gone = tuple(f"model.layers.{block}." for block in range(blocks, config["num_hidden_layers"]))
    save_file(
        {name: t for name, t in tensors.items() if not name.startswith(gone)}, place / "model.safetensors", {"format": "pt"}
    )
    return place


def less(words: list[str], more: dict[str, str] | None = None) -> list[str]:
    """The same command on fewer and shorter windows; `more` are options that are added."""
    found = [_FEWER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return [*found, *(word for option in (more or {}).items() if option[0] not in words for word in option)]


@contextmanager
def no_network() -> Iterator[None]:
    """Take the network from this process for as long as it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("socket", "getaddrinfo"):
            patch.setattr(socket, name, getattr(socket, name))  # what is put back in the end
        runpy.run_path(str(OFFLINE / "sitecustomize.py"))
        yield


def compress(words: list[str]) -> None:
    """Run a command of compress in this process and working folder, without a network."""
    with no_network():
        done = CliRunner().invoke(cli.app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"compress {shlex.join(words)}") from done.exception
    assert done.exit_code == 0, f"compress {shlex.join(words)}\n{done.output[-2000:]}"


def process(command: list[str], folder: Path) -> None:
    """Run a command in a process of its own, without a network."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{OFFLINE}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-2000:]}"


def python(snippet: str, folder: Path) -> None:
    """Run a piece of Python in a process of its own."""
    process([sys.executable, "-c", snippet], folder)
