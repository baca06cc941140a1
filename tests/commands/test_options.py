"""Every option of `quantize`, `run` and `prune` does something."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Done, Run
from option_checks import ALIASES, CHECKS, DELIVERY, ONLY_PRUNE, ONLY_QUANTIZE
from thorough import some

from compress import cli

COMMANDS = {
    command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands if command.callback
}


PRUNE_ALIASES = {"method": "prune_method", "bits": "prune_bits", "group_size": "prune_bits", "symmetric": "prune_bits"}


def checks_of(command: str) -> list[str]:
    """The checks of a command: what all share, and its own."""
    own = {"quantize": ONLY_QUANTIZE, "prune": ONLY_PRUNE, "run": ()}[command]
    other = {*ONLY_QUANTIZE, *ONLY_PRUNE} | (set(DELIVERY) if command == "prune" else set())
    return [name for name in CHECKS if name in own or name not in other]


def options_of(command: str) -> set[str]:
    names = set(COMMANDS[command].__annotations__) - {"model", "return"}
    found = {ALIASES.get(name, name) for name in names} - ({"recipe"} if command == "run" else set())
    return {PRUNE_ALIASES.get(name, name) for name in found} if command == "prune" else found


@pytest.mark.parametrize("command", ["quantize", "run", "prune"])
def test_every_option_has_a_check(command: str) -> None:
    assert options_of(command) == set(checks_of(command))


@pytest.fixture(scope="module")
def speaking(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a tokenizer of 90 words and a chat template."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(model, tmp_path_factory.mktemp("speaking") / "model")
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, **{f"word{n}": n + 1 for n in range(90)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="word3")
    fast.chat_template = "{% for m in messages %}word7 {{ m.content }} word8 {% endfor %}"
    fast.save_pretrained(folder)
    return folder


OF_COMMANDS = [(command, option) for command in ("quantize", "run", "prune") for option in checks_of(command)]


def each_option_once() -> Iterator[tuple[str, str]]:
    """Options that commands share, with each command in turn."""
    for number, option in enumerate(dict.fromkeys(option for _, option in OF_COMMANDS)):
        having = [command for command, known in OF_COMMANDS if known == option]
        yield having[number % len(having)], option


@pytest.mark.parametrize(("command", "option"), some(OF_COMMANDS, *each_option_once()))
def test_every_option_does_something(command: str, option: str, run: Run, speaking: Path, ids: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{match: '*.*', method: quant/gptq, options: {group_size: 16}}]\n")
    count = 0

    def start(*arguments: object) -> tuple[Done, Path]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        flags = [] if "--device" in arguments else ["--device", "cpu"]
        flags += [] if "--data" in arguments else ["--data", str(ids)]
        if command == "run":
            return run("run", recipe, speaking, "-o", out, *flags, *arguments), out
        if command == "prune":
            flags += ["--set", "steps.0.options.group_size=16"] if "--set" in arguments else []
            flags += [] if "--method" in arguments else ["--method", "sparsegpt"]  # the default takes longer
            return run("prune", speaking, "-o", out, *flags, *arguments), out
        if not {"--recipe", "--group-size", "--bpw", "--size", "--max-kl"} & set(arguments):
            flags += ["--group-size", "16"]
        return run("quantize", speaking, "-o", out, *flags, *arguments), out

    CHECKS[option](start, tmp_path)


def test_without_data_the_text_of_the_package_is_used(run: Run, speaking: Path, tmp_path: Path) -> None:
    """No file and no network: one line says what it was calibrated on, a dry run too."""
    common = ("--group-size", "16", "--samples", "2", "--length", "16", "--device", "cpu", "--no-reload")
    done = run("quantize", speaking, "-o", tmp_path / "out", *common)
    line = "Calibration text: builtin, 2 windows of 16 tokens of the text that comes with compress; --data gives another"
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == line
    assert run("quantize", speaking, "-o", tmp_path / "other", *common, "--dry-run").out.splitlines()[0] == line
    assert "Calibration text" not in run("quantize", speaking, "-o", tmp_path / "rtn", "--method", "rtn", *common).out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "builtin" in card
    assert "datasets:" not in card, "it is no dataset of the Hub"


def test_what_gguf_has_no_place_for_is_said_before_the_run(run: Run, speaking: Path, tmp_path: Path) -> None:
    """The tokenizer of words is one that llama.cpp does not know; nothing was computed."""
    done = run("quantize", speaking, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32, "--format", "gguf")
    assert done.code == 3, done.text
    assert "tokenizer.json: model is 'WordLevel'; expected BPE" in done.err
    assert list(tmp_path.iterdir()) == []
