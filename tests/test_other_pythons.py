"""Which Pythons `tools/other_pythons.py` finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import other_pythons

sys.path.pop(0)


def pretended(folder: Path, name: str, says: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_that_runs_of_each_other_supported_version(tmp_path: Path) -> None:
    broken = pretended(tmp_path, "python3.12", "echo no such version >&2; exit 127")
    twelve, again = pretended(tmp_path, "twelve", "echo 3 12"), pretended(tmp_path, "again", "echo 3 12")
    old, own, two = (pretended(tmp_path, name, f"echo {name}") for name in ("3 10", "3 11", "2 12"))
    commands = [broken, str(tmp_path / "absent"), old, own, two, twelve, again]
    assert other_pythons.choose(commands, range(11, 15), mine=11) == {12: twelve}


def test_versions_are_those_of_the_project_and_the_makefile() -> None:
    minors = other_pythons.supported((ROOT / "pyproject.toml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert f"(3, {minors.start}) <= sys.version_info < (3, {minors.stop})" in makefile
    assert all(f"python3.{minor} " in makefile for minor in minors)
    with pytest.raises(SystemExit, match="requires-python"):
        other_pythons.supported("")


INSIDE = """#!/bin/sh
case "$*" in *download*torch*) exit {torch};; *download*) exit {index};; *install.py*) exit {install};; esac
"""


@pytest.mark.parametrize(
    ("index", "torch", "install", "result"),
    [(1, 0, 0, "NOT RUN: no package"), (0, 1, 0, "NOT RUN: no build of torch"), (0, 0, 1, "exit 1"), (0, 0, 0, "passed")],
)
def test_what_cannot_be_had_is_no_failure(
    index: int, torch: int, install: int, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "inside").write_text(INSIDE.format(index=index, torch=torch, install=install))
    makes = f'mkdir -p "$3/bin"; cp {tmp_path}/inside "$3/bin/python"; chmod +x "$3/bin/python"'
    try:
        found = other_pythons.short_run(pretended(tmp_path, "python", makes), tmp_path / "environment", small=True)
    except subprocess.CalledProcessError as error:
        found = f"exit {error.returncode}"
    assert found.startswith(result)


def test_pyenv_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "versions" / "3.13.2" / "bin"
    home.mkdir(parents=True)
    python = pretended(home, "python", "echo 3 13")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert other_pythons.candidates(range(11, 15)) == [python]
