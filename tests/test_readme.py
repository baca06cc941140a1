"""What the README shows is what happens: every command and every recipe in it runs, and every option it names exists."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from places import ROOT
from written import compress, less, process, python, short_demo

from compress import cli
from compress.recipe import reading as recipe_reading

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def lines(language: str) -> Iterator[str]:
    for name, text in BLOCKS:
        if name == language:
            yield from (line for line in text.splitlines() if line.strip())


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where the names that the README uses mean something: the first blocks of the demo's model, and a little text."""
    place = tmp_path_factory.mktemp("readme")
    (place / "MODEL").symlink_to(short_demo(place))
    texts = (ROOT / "examples" / "demo" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:600]
    (place / "text.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return place


SHELL = [line for line in lines("sh") if not line.startswith(("make ", "pip install "))]


def test_there_are_commands() -> None:
    assert len(SHELL) >= 6
    assert any(line.startswith("torchrun") for line in SHELL)


def test_commands_run_as_written_and_the_result_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, because some use what others have made; what is drawn from a text is less, to take seconds."""
    monkeypatch.chdir(folder)
    for line in SHELL:
        words = shlex.split(line.replace("/tmp/", f"{folder}/"), comments=True)
        drawn = {"--samples": "8", "--length": "64"} if words[-2:] == ["--data", "text.jsonl"] else {}
        if words[0] == "torchrun":
            words[words.index("OUT")] = "OUT-of-two"
            process([sys.executable, "-m", "torch.distributed.run", *less(words[1:], drawn)], folder)
        else:
            assert words[0] == "compress"
            compress(less(words[1:], drawn))
    loaded, called = blocks("python")
    python(loaded + "\nassert type(model.model.layers[0].mlp.up_proj).__name__ == 'CompressedLinear'", folder)
    python(called + "\nassert 0 < outcome.summary['bytes_after'] < outcome.summary['bytes_before']", folder)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in lines("sh") if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_recipes_in_the_text_are_recipes() -> None:
    for text in blocks("yaml"):
        recipe_reading.parse(yaml.safe_load(text))
    assert blocks("yaml")


def test_commands_of_the_table_are_all_there_are() -> None:
    shown = set(re.findall(r"`compress (\w+)[^`]*`", README))
    assert set(COMMANDS) <= shown
    assert shown <= set(COMMANDS)


def test_options_that_are_named_exist() -> None:
    known = {
        name for command in COMMANDS.values() for option in command.params for name in (*option.opts, *option.secondary_opts)
    }
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - {"--nproc-per-node"}
    assert shown <= known


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
