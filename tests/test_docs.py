"""Every command in docs/ runs as written, in its order; the example of a method is one; the table of commands is complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
from options import bits_known
from places import ROOT
from written import compress, less, python, short_demo

import compress as compress_package
from compress import cli

PAGES = ("quickstart", "choosing", "commands", "python", "adding-a-method", "all-methods")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [found[2] for found in re.finditer(r"```(\w+)\n(.*?)```", text(page), flags=re.DOTALL) if found[1] == language]


def test_python_runs_as_written(tmp_path: Path) -> None:
    """On a shorter model, to take seconds."""
    short_demo(tmp_path)
    for snippet in blocks("python", "python"):
        python(snippet.replace("/tmp/", f"{tmp_path}/"), tmp_path)
    assert (tmp_path / "python" / "planned" / "config.json").exists()


def test_the_table_of_functions_is_complete() -> None:
    functions = {name for name in compress_package.__all__ if name[0].islower()}
    assert set(re.findall(r"`compress\.([a-z_]+)\(", text("python"))) == functions
    kinds = {name for name in compress_package.__all__ if name[0].isupper()}
    assert {name for name in kinds if not re.search(rf"\b{name}\b", text("python"))} == {"FormatError"}, "a CheckpointError"


@pytest.mark.parametrize("page", ["quickstart", "choosing", "commands"])
def test_commands_run_as_written(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shorter model and less text, to take seconds."""
    short_demo(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.replace("/tmp/", f"{tmp_path}/"))
        assert words[0] == "compress"
        for word in words:  # folders of results need no making
            assert not word.endswith("/")
        drawn = {"--samples": "8", "--length": "64"} if words[1:3] == ["run", "demo"] else {}
        compress(less(words[1:], drawn))
    for snippet in blocks(page, "python"):
        python(snippet.replace("/tmp/", f"{tmp_path}/"), tmp_path)


def test_the_method_that_is_shown_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "powers_example.py").write_text(blocks("adding-a-method", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    method = importlib.import_module("powers_example").METHOD(bits=3)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    result = method(weight, {})
    assert result.weight.stored_bits == bits_known(method, (16, 64))
    decoded = result.weight.dequantize()
    scale = torch.exp2((weight.abs().amax(1, keepdim=True) / 3).log2().ceil())
    assert bool(((decoded - weight).abs() <= scale / 2 * 1.0001).all())


def test_the_table_of_commands_is_complete() -> None:
    shown = set(re.findall(r"`compress ([a-z]+)[^`]*`", text("commands").split("## Before")[0]))
    assert shown - {"COMMAND"} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_options_exist_and_links_lead_somewhere(page: str) -> None:
    known = {
        name for command in COMMANDS.values() for option in command.params for name in (*option.opts, *option.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text(page))) - {"--help"} <= known
    for target in re.findall(r"\]\(([^)#]+)\)", text(page)):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
