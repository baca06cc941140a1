"""A short run with every other Python on this machine that the package supports: install, the demo and a few tests.

`make test` runs everything with one Python, the one that runs this file. Each other version from pyproject.toml's range gets an
environment of its own, which is removed afterwards, a quarter of an hour for the install and as much for the rest. What was found
and how it went is printed. Where no package index answers, or an install is not done in time, that is reported and is no failure,
since the network decides it; all else that goes wrong is one. `--small` leaves out a Python for which there is no build of torch
without CUDA libraries, which take gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900.0  # seconds for the install, and for what follows it
TESTS = ("tests/checkpoint/test_tensor_file.py", "tests/laws/test_formats.py", "tests/recipe", "tests/runtime/test_guard.py")
_ASK = "import ensurepip, sys, venv; print(*sys.version_info[:2])"


def supported(text: str) -> range:
    """Return the minor versions of Python 3 that the text of pyproject.toml allows."""
    found = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit('pyproject.toml: found no line requires-python = ">=3.A,<3.B"')
    return range(int(found[1]), int(found[2]))


def candidates(minors: range) -> list[str]:
    """Return commands that may be Pythons: on the path, then those of pyenv, the newest first."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = [shutil.which(f"python3.{minor}") for minor in minors]
    own = [str(path) for minor in minors for path in sorted(versions.glob(f"3.{minor}.*/bin/python"), reverse=True)]
    return [path for path in named if path] + own


def choose(commands: Iterable[str], minors: range, mine: int) -> dict[int, str]:
    """Return a Python for each other minor version: the first that starts and can make environments."""
    found: dict[int, str] = {}
    for command in commands:
        try:
            done = subprocess.run([command, "-c", _ASK], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue  # a version manager may list a command that does not run
        major, minor = (int(number) for number in done.stdout.split())
        if major == 3 and minor in minors and minor != mine:
            found.setdefault(minor, command)
    return dict(sorted(found.items()))


def can_get(python: str, folder: Path, *wanted: str) -> bool:
    """Whether pip finds a package where it looks."""
    command = [python, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1", "-d", str(folder / "asked"), *wanted]
    try:
        return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def small_torch(python: str, folder: Path) -> bool:
    """Whether there is a build of torch without CUDA libraries, which only Linux has to ask for."""
    pin = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return sys.platform != "linux" or (pin is not None and can_get(python, folder, f"torch=={pin[1]}+cpu"))


def short_run(python: str, folder: Path, small: bool = False) -> str:
    """Install into a new environment, run the demo and a few tests; return how it went; `small`: only with a small torch.

    Raises CalledProcessError, and TimeoutExpired for what follows the install.
    """
    start = begun = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["OMP_NUM_THREADS"] = "1"

    def run(*command: str) -> None:
        left = LIMIT - (time.monotonic() - begun)
        subprocess.run(command, cwd=ROOT, env=environment, timeout=max(left, 1.0), check=True)

    inside = str(folder / "bin" / "python")
    try:
        run(python, "-m", "venv", str(folder))
        if not can_get(inside, folder, "packaging"):
            return "NOT RUN: no package index answers"
        if small and not small_torch(inside, folder):
            return "NOT RUN: no build of torch without CUDA libraries was found where pip looks"
        run(inside, "tools/install.py")
        run(inside, "-m", "pip", "install", "-q", "--constraint", "constraints.txt", "pytest", "hypothesis", "accelerate")
    except subprocess.TimeoutExpired:
        return f"NOT RUN: the install was not done within {LIMIT:.0f} s"
    begun = time.monotonic()
    installed = begun - start
    demo = ("run", "demo", "examples/demo", "-o", str(folder / "demo"), "--evaluate", "examples/demo/evaluation.jsonl")
    run(inside, "-m", "compress", *demo)
    run(inside, "-m", "pytest", "-q", *TESTS)
    return f"passed in {time.monotonic() - start:.0f} s, {installed:.0f} of them for the install"


def main() -> None:
    """Run with each other Python; exit with 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only where torch comes without CUDA libraries")
    small = parser.parse_args().small
    minors = supported((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    mine = sys.version_info.minor
    others = choose(candidates(minors), minors, mine)
    listed = ", ".join(f"3.{minor} ({command})" for minor, command in others.items()) or "none"
    lacking = ", ".join(f"3.{minor}" for minor in minors if minor != mine and minor not in others) or "none"
    print(f"Python: tested 3.{mine}; others here: {listed}; supported and not here: {lacking}", flush=True)
    results = {}
    for minor, command in others.items():
        with tempfile.TemporaryDirectory(prefix=f"python3.{minor}-") as folder:
            try:
                results[minor] = short_run(command, Path(folder) / "environment", small)
            except subprocess.CalledProcessError as error:
                results[minor] = f"FAILED: exit code {error.returncode} of {' '.join(error.cmd)}"
            except subprocess.TimeoutExpired as error:
                results[minor] = f"FAILED: not done within {LIMIT:.0f} s: {' '.join(error.cmd)}"
    for minor, result in results.items():
        print(f"Python 3.{minor}: {result}")
    sys.exit(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    main()
