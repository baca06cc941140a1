"""Every command that writes, killed at a durable step and run again: the same result, and nothing left over."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from kills import count_steps, killed_at
from runs import compress, steps

from compress import cli

Tiny = Callable[..., Path]
RTN = steps("quant/rtn", bits=4, group_size=32)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
WEIGHTS = ("*.safetensors", "*.index.json", "config.json", "recipe.yaml", "*.gguf")
_CPU = ("--device", "cpu", "--quiet")
_DATA = ("--data", "IDS", *_CPU)
_TWO = ("--candidates", "rtn:bits=3,group_size=32", "--candidates", "rtn:bits=5,group_size=32")

# Words of a command line: IDS, MODEL, NATIVE, GPTQ, PRUNED are what the fixture makes, OUT is a place of its own.
COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": (
        "quantize",
        "MODEL",
        "-o",
        "OUT",
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--device",
        "cpu",
        "--quiet",
        "--no-reload",
    ),
    "quantize with a cache": (
        *("quantize", "MODEL", "-o", "OUT", "--bits", "3", "--cache", "OUT-cache", "--no-reload", "--group-size", "32"),
        *("--offload", *_DATA),
    ),
    "export": ("export", "NATIVE", "--format", "gptq", "-o", "OUT", "--quiet"),
    "convert": ("convert", "GPTQ", "-o", "OUT", "--to", "native", "--quiet"),
    "cut": ("cut", "MODEL", "-o", "OUT", "--channels", "0.25", "--no-reload", *_DATA),
    "plan": (
        "plan",
        "MODEL",
        "-o",
        "OUT.yaml",
        "--bpw",
        "4",
        "--candidates",
        "rtn:bits=3,group_size=32",
        "--candidates",
        "rtn:bits=5,group_size=32",
        *_DATA,
    ),
    "retrain": ("retrain", "PRUNED", "-o", "OUT", "--steps", "2", "--no-reload", *_DATA),
    "eval --save": ("eval", "OUT-copy", "--save", "--no-speed", *_DATA),
    "compare": ("compare", "NATIVE", "PRUNED", "-o", "OUT.html"),
}


@pytest.fixture(scope="module")
def made(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands begin with."""
    folder = tmp_path_factory.mktemp("made")
    found = {"MODEL": tiny("llama", **SIZES), "IDS": ids, "NATIVE": folder / "native", "GPTQ": folder / "gptq"}
    compress(found["MODEL"], found["NATIVE"], None, RTN)
    found["PRUNED"] = folder / "pruned"
    compress(found["MODEL"], found["PRUNED"], ids, steps("prune/magnitude", sparsity=0.5))
    start("export", "NATIVE", "--format", "gptq", "-o", "GPTQ", "--quiet", made=found, out=folder)
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where that can be: these tests wait for thousands of fsyncs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def start(*words: str, made: dict[str, Path], out: Path) -> None:
    """Run a command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        places = {"OUT": out, **made}
        known = {name: str(path) for name, path in places.items()}
        filled = [known.get(word, f"{out}{word[3:]}" if word.startswith("OUT") else word) for word in words]
        patch.setattr(sys, "argv", ["compress", *filled])
        try:
            cli.main()
        except SystemExit as end:
            raise AssertionError(f"compress {' '.join(filled)} ended with {end.code}") from end


def begin(name: str, made: dict[str, Path], folder: Path) -> Callable[[], None]:
    """Prepare a folder, and return the command as a function."""
    folder.mkdir()
    out = folder / "out"
    if "OUT-copy" in COMMANDS[name]:
        shutil.copytree(made["NATIVE"], folder / "out-copy")
    return partial(start, *COMMANDS[name], made=made, out=out)


def content(folder: Path) -> dict[str, bytes]:
    """All files, with the bytes of those that do not tell how long something took."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    exact = {path for pattern in (*WEIGHTS, "out.yaml") for path in folder.rglob(pattern)}
    return {name: path.read_bytes() if path in exact else b"" for name, path in files.items()}


def killed_at_steps(name: str, chosen: Callable[[int], list[int]], made: dict[str, Path], place: Path) -> None:
    reference = place / "reference"
    count = count_steps(begin(name, made, reference))
    expected = content(reference)
    assert count > 1
    for step in chosen(count):
        folder = place / f"{step}"
        work = begin(name, made, folder)
        killed_at(step, work)
        work()
        assert content(folder) == expected, f"{name}, killed at durable step {step} of {count}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_some_steps(name: str, made: dict[str, Path], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in between, and of the quick ones all around publishing."""
    last = 8 if name in ("export", "convert") else 0
    killed_at_steps(
        name, lambda count: sorted({random.Random(name).randint(1, count), *range(count + 1 - last, count + 1)}), made, place
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_each_step(name: str, made: dict[str, Path], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed_at_steps(name, lambda count: list(range(1, count + 1)), made, place)
