"""The command line: what each command and each option does, what goes where, and how it ends."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from places import ROOT
from runs import digests, ids_file
from transformers import AutoModelForCausalLM

import compress.checkpoint
from compress import cli, errors

Tiny = Callable[..., Path]
COMMANDS = {
    command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands if command.callback
}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err, "nothing here is a terminal"
        return Done(code, out, err)

    return call


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    """A llama of one block."""
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture
def quantize(run: Run, model: Path, ids: Path, tmp_path: Path) -> Run:
    """`compress quantize` of the small model to OUT; more arguments follow or override."""

    def call(*arguments: object, out: str = "out", data: object = ids) -> Done:
        common = ["--device", "cpu", "--group-size", 16, *(["--data", data] if data else [])]
        return run("quantize", model, "-o", tmp_path / out, *common, *arguments)

    return call


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def specs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "config.json").read_text())["quantization_config"]["specs"]
    return found


@pytest.fixture(scope="module")
def packed(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed checkpoint that tests leave as it is."""
    from runs import compress, steps

    out = tmp_path_factory.mktemp("packed") / "out"
    compress(model, out, ids, steps(bits=3, group_size=16))
    return out


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


# --- runs


def test_quantize_gives_a_checkpoint_and_a_table(quantize: Run, model: Path, tmp_path: Path) -> None:
    done = quantize()
    out = tmp_path / "out"
    assert done.code == 0
    assert all(text in done.out for text in ("size", "bits per weight", str(out / "report.html"), "import compress"))
    assert "block 1/1" in done.err
    assert {spec["base"]["bits"] for spec in specs(out)} == {4}
    assert not (tmp_path / "out.job").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 96
    before, after = summary(out)["bytes_before"], summary(out)["bytes_after"]
    assert before == (model / "model.safetensors").stat().st_size - header(model / "model.safetensors")
    assert after == (out / "model.safetensors").stat().st_size - header(out / "model.safetensors")


def header(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_finished_job_is_not_done_again(quantize: Run, tmp_path: Path) -> None:
    quantize()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    done = quantize()
    assert done.code == 0
    assert "is there already, made by the same job" in done.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_dry_run_writes_nothing(quantize: Run, model: Path, tmp_path: Path) -> None:
    before = tree(model)
    text, plain = quantize("--dry-run"), quantize("--dry-run", "--json")
    assert (text.code, plain.code) == (0, 0)
    assert not list(tmp_path.iterdir())
    assert tree(model) == before
    assert "self_attn.q_proj" in text.out
    assert "12 windows of 16 tokens" in text.out
    found = plain.json
    assert found["calibration"] == {"samples": 12, "length": 16}
    assert found["bytes_after_exact"]
    quantize()
    assert summary(tmp_path / "out")["bytes_after"] == found["bytes_after"]
    assert summary(tmp_path / "out")["bytes_before"] == found["bytes_before"]


def test_json_is_all_that_goes_to_standard_output(quantize: Run, tmp_path: Path) -> None:
    done = quantize("--json")
    assert done.code == 0
    assert done.err == ""
    found = done.json
    assert found["output"] == str(tmp_path / "out")
    assert found["files"] == summary(tmp_path / "out")["files"]
    assert found["bytes_after"] < found["bytes_before"]
    assert found["evaluation"] is None


# --- every option of quantize and run does something. Each check gets a function that runs the command with more arguments into a
# folder of its own and returns how it ended, and the folder.

Start = Callable[..., tuple[Done, Path]]


def recipe_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text())
    return values


def calibration_of(folder: Path) -> str:
    found: str = summary(folder)["identity"]["calibration"]
    return found


def check_output(start: Start, tmp_path: Path) -> None:
    _, out = start()
    assert (out / "model.safetensors").exists()


def check_method(start: Start, tmp_path: Path) -> None:
    assert recipe_of(start("--method", "rtn")[1])["steps"][0]["method"] == "quant/rtn"
    assert recipe_of(start("--method", "quant/gptq")[1])["steps"][0]["method"] == "quant/gptq"
    done, _ = start("--method", "rtm")
    assert done.code == 2
    assert "did you mean quant/rtn?" in done.err


def check_bits(start: Start, tmp_path: Path) -> None:
    assert {spec["base"]["bits"] for spec in specs(start("--bits", 3)[1])} == {3}
    done, _ = start("--bits", 9)
    assert (done.code, "steps.0.options.bits: Input should be less than or equal to 8 (got 9)" in done.err) == (2, True)


def check_group_size(start: Start, tmp_path: Path) -> None:
    assert {spec["base"]["group_size"] for spec in specs(start("--group-size", 8)[1])} == {8}
    assert {spec["base"]["group_size"] for spec in specs(start("--group-size", -1)[1])} == {32, 64}


def check_symmetric(start: Start, tmp_path: Path) -> None:
    assert {spec["base"]["zero"] for spec in specs(start("--asymmetric")[1])} == {True}
    assert {spec["base"]["zero"] for spec in specs(start("--symmetric")[1])} == {False}


def check_data(start: Start, tmp_path: Path) -> None:
    other = ids_file(tmp_path / "other.npy", seed=1)
    first, second = start()[1], start("--data", other)[1]
    assert calibration_of(first) != calibration_of(second)
    assert recipe_of(second)["data"]["name"] == other.name
    assert digests(first)["model.safetensors"] != digests(second)["model.safetensors"]


def check_samples(start: Start, tmp_path: Path) -> None:
    done, _ = start("--samples", 5, "--dry-run", "--json")
    assert done.json["calibration"] == {"samples": 5, "length": 16}


def check_length(start: Start, tmp_path: Path) -> None:
    done, _ = start("--length", 7, "--dry-run", "--json")
    assert done.json["calibration"] == {"samples": 12, "length": 7}


def check_seed(start: Start, tmp_path: Path) -> None:
    drawn = [calibration_of(start("--samples", 3, "--seed", seed)[1]) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def check_chat_template(start: Start, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"word{n} word{n + 1} word{n + 2}"}]} for n in range(40)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--data", chat, "--samples", 4, "--length", 6)
    with_template, without = start(*common, "--chat-template")[1], start(*common, "--no-chat-template")[1]
    assert calibration_of(with_template) != calibration_of(without)
    assert calibration_of(with_template) == calibration_of(start(*common)[1]), "messages get the template unless told otherwise"
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "word1 word2 " * 200}))
    done, _ = start("--data", text, "--samples", 4, "--length", 6, "--chat-template")
    assert (done.code, "holds plain text, but chat_template: true expects messages" in done.err) == (4, True)


def check_recipe(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: [{match: '*.mlp.*', method: quant/rtn, options: {bits: 2, group_size: 32}}]\n")
    _, out = start("--recipe", file)
    assert recipe_of(out)["steps"][0]["match"] == "*.mlp.*"
    assert {spec["base"]["bits"] for spec in specs(out)} == {2}
    done, _ = start("--recipe", file, "--bits", 3)
    assert (done.code, "--bits: not with --recipe; change the recipe with --set" in done.err) == (2, True)
    done, _ = start("--recipe", file, "--method", "rtn")
    assert (done.code, "--method: not with --recipe" in done.err) == (2, True)


def check_set(start: Start, tmp_path: Path) -> None:
    _, out = start("--set", "steps.0.options.bits=5", "--set", "max_shard_size=10KB")
    assert {spec["base"]["bits"] for spec in specs(out)} == {5}
    assert len(list(out.glob("*.safetensors"))) > 1


def check_bpw(start: Start, tmp_path: Path) -> None:
    done, out = start("--bpw", 3.25, "--json")
    assert done.code == 0, done.err
    assert 3.0 < summary(out)["bits_per_compressed_weight"] <= 3.25
    done, _ = start("--bpw", 3, "--bits", 3)
    assert (done.code, "--bits: not with a budget" in done.err) == (2, True)


def check_size(start: Start, tmp_path: Path) -> None:
    done, out = start("--size", "29KB", "--json")
    assert done.code == 0, done.err
    assert 28_500 < summary(out)["bytes_after"] <= 29_000


def check_max_kl(start: Start, tmp_path: Path) -> None:
    done, small = start("--max-kl", 0.05)
    assert "predicted" in done.out
    _, large = start("--max-kl", 0.005, "--json")
    assert summary(small)["bytes_after"] < summary(large)["bytes_after"]
    done, _ = start("--max-kl", 0.05, "--bpw", 3)
    assert (done.code, "--bpw and --max-kl: give one of" in done.err) == (2, True)


def check_dry_run(start: Start, tmp_path: Path) -> None:
    done, out = start("--dry-run")
    assert done.code == 0
    assert not out.exists()


def check_json(start: Start, tmp_path: Path) -> None:
    done, out = start("--json")
    assert done.json["output"] == str(out)


def check_device(start: Start, tmp_path: Path) -> None:
    assert summary(start("--device", "cpu")[1])["identity"]["run"]["device"] == "cpu"
    done, _ = start("--device", "toaster")
    assert (done.code, "--device toaster: not a device" in done.err) == (2, True)
    if not torch.cuda.is_available():
        done, _ = start("--device", "cuda")
        assert (done.code, "torch sees no GPU" in done.err) == (2, True)


def check_dtype(start: Start, tmp_path: Path) -> None:
    assert summary(start("--dtype", "float32")[1])["identity"]["run"]["dtype"] == "float32"
    assert summary(start("--dtype", "bfloat16")[1])["identity"]["run"]["dtype"] == "bfloat16"
    done, _ = start("--dtype", "float7")
    assert (done.code, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'" in done.err) == (2, True)


def check_offload(start: Start, tmp_path: Path) -> None:
    _, with_it = start("--offload", "--keep-job")
    _, without = start("--keep-job")
    assert list((with_it.with_name(with_it.name + ".job") / "hidden").iterdir())
    assert not list((without.with_name(without.name + ".job") / "hidden").iterdir())
    assert digests(with_it) == digests(without)


def check_memory(start: Start, tmp_path: Path) -> None:
    done, once = start("--memory", "1GB", "--quiet")
    assert done.code == 0
    with pytest.MonkeyPatch.context() as patch:
        import compress.block

        real, seen = compress.block.observe, []
        patch.setattr(compress.block, "observe", lambda *arguments: seen.append(1) or real(*arguments))  # type: ignore[func-returns-value]
        _, several = start("--memory", "20kB")
    assert len(seen) > 1, "one pass over the calibration per group of statistics that fits"
    assert digests(once) == digests(several)
    done, _ = start("--memory", "lots")
    assert (done.code, "--memory: 'lots' is not a size" in done.err) == (2, True)


def check_job(start: Start, tmp_path: Path) -> None:
    start("--job", tmp_path / "elsewhere", "--keep-job")
    assert (tmp_path / "elsewhere" / "journal.jsonl").exists()


def check_keep_job(start: Start, tmp_path: Path) -> None:
    _, out = start("--keep-job")
    assert (out.with_name(out.name + ".job") / "journal.jsonl").exists()
    _, out = start()
    assert not out.with_name(out.name + ".job").exists()


def check_watch(start: Start, tmp_path: Path) -> None:
    _, out = start("--watch", 3)
    assert recipe_of(out)["watch"] == {"windows": 3, "limit": 1.0}
    found = summary(out)["watched"]
    assert len(found) == 1 and 0 < found[0] < 1.0, "below the limit, and the run went on"
    assert summary(start("--watch", 0)[1])["watched"] == []
    assert start("--watch", 12)[0].code == 4
    assert start("--watch", -1)[0].code == 2


def check_cache(start: Start, tmp_path: Path) -> None:
    done, first = start("--cache", tmp_path / "cache")
    assert summary(first)["cache"] == {"found": 0, "made": 1}
    assert "0 passes of the calibration over a block skipped, 1 made" in done.out
    assert summary(start("--cache", tmp_path / "cache", "--set", "steps.0.options.bits=3")[1])["cache"] == {"found": 1, "made": 0}
    assert summary(start()[1])["cache"] is None


def check_no_reload(start: Start, tmp_path: Path) -> None:
    assert summary(start("--no-reload")[1])["reload"] == {"skipped": "it was switched off"}
    done, out = start()
    assert summary(out)["reload"]["tokens"] > 1
    assert "loads it anew" in done.out


def check_revision(start: Start, tmp_path: Path) -> None:
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        real = compress.checkpoint.Source.open.__func__  # type: ignore[attr-defined]

        def opened(cls: Any, model: Any, revision: str | None = None) -> Any:
            asked.append(revision)
            return real(cls, model, revision)

        patch.setattr(compress.checkpoint.Source, "open", classmethod(opened))
        start("--revision", "v1.5")
    assert asked[0] == "v1.5"


def check_evaluate(start: Start, tmp_path: Path) -> None:
    text = ids_file(tmp_path / "held-out.npy", samples=3, seed=5)
    done, out = start("--evaluate", text, "--json")
    found = done.json["evaluation"]
    assert 0 < found["kl"] < 1
    assert (found["windows"], found["length"]) == (3, 16)
    assert json.loads((out / "evaluation.json").read_text())["kl"] == found["kl"]
    assert f"{found['perplexity']:.2f}" in (out / "README.md").read_text()
    done, out = start("--evaluate", tmp_path / "typo.npy")
    assert (done.code, out.exists()) == (4, False), "found before the run, not after it"
    assert "--evaluate: " in done.err


def check_format_(start: Start, tmp_path: Path) -> None:
    done, out = start("--format", "compressed-tensors", "--format", "awq", "--json")
    assert [found["format"] for found in done.json["exports"]] == ["compressed-tensors", "awq"]
    for name in ("compressed-tensors", "awq"):
        config = json.loads((tmp_path / f"{out.name}-{name}" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == name
    done, out = start("--format", "gguf")
    assert (done.code, out.exists()) == (2, False), "found before the run, not after it"
    assert "groups of 16, where a block has 32 columns" in done.err
    done, out = start("--format", "exl2")
    assert (done.code, out.exists()) == (2, False)


def check_target(start: Start, tmp_path: Path) -> None:
    done, out = start("--target", "vllm", "--format", "compressed-tensors")
    assert (done.code, out.exists()) == (0, True)
    assert done.err.count("warning: vllm: ") == 1, "once, though the result is looked at too"
    assert "group_size=16: fast kernels have 32, 64, 128 or whole rows" in done.err
    done, out = start("--target", "llama.cpp")
    assert (done.code, out.exists()) == (2, False)
    assert "no layout that llama.cpp reads holds this" in done.err
    done, _ = start("--target", "vllm", "--dry-run", "--json")
    assert (done.json["target"], len(done.json["warnings"])) == ("vllm", 1)


def check_tensor_parallel(start: Start, tmp_path: Path) -> None:
    done, out = start("--target", "vllm", "--tensor-parallel", 4)
    assert (done.code, out.exists()) == (2, False)
    assert "in=32 over 4 GPUs gives 8 columns each, no whole groups of 16" in done.err
    assert "--tensor-parallel 2 at most" in done.err
    done, _ = start("--tensor-parallel", 2)
    assert done.code == 2
    assert "says nothing without --target" in done.err


def check_quiet(start: Start, tmp_path: Path) -> None:
    done, _ = start("--quiet")
    assert done.err == ""
    assert "bits per weight" in done.out
    done, _ = start()
    assert re.search(r"\d+\.\d s  block 1/1  \(.* peak.*\)", done.err)


def check_prune_method(start: Start, tmp_path: Path) -> None:
    assert recipe_of(start("--method", "wanda")[1])["steps"][0]["method"] == "prune/wanda"
    done, _ = start("--method", "wonda")
    assert (done.code, "did you mean prune/wanda?" in done.err) == (2, True)
    done, _ = start("--method", "quant/gptq")
    assert (done.code, "removes nothing" in done.err) == (2, True)


def check_sparsity(start: Start, tmp_path: Path) -> None:
    done, out = start("--sparsity", 0.75)
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert {row["notes"]["sparsity"] for row in rows} == {0.75}
    assert "75.0% of 9,216 weights in 7 matrices are removed" in done.out
    assert "75% of the weights removed" in (out / "README.md").read_text()
    done, _ = start("--sparsity", 1.5)
    assert (done.code, "steps.0.options.sparsity: Input should be less than 1" in done.err) == (2, True)


def check_pattern(start: Start, tmp_path: Path) -> None:
    _, out = start("--pattern", "1:4")
    assert {(spec["keep"]["kept"], spec["keep"]["of"]) for spec in specs(out)} == {(1, 4)}
    done, _ = start("--pattern", "1:4", "--sparsity", 0.5)
    assert (done.code, "not with a pattern" in done.err) == (2, True)
    done, _ = start("--pattern", "4:2")
    assert (done.code, "error: steps.0.options.pattern: expected N:M" in done.err.replace("command line:\n", "")) == (
        2,
        True,
    )


def check_group(start: Start, tmp_path: Path) -> None:
    assert {spec["keep"]["size"] for spec in specs(start("--group", 8)[1])} == {8}


def check_within(start: Start, tmp_path: Path) -> None:
    assert all("kept" in spec["base"] for spec in specs(start("--within", "row")[1]))
    assert all("fields" in spec["base"] for spec in specs(start("--within", "matrix")[1]))


def check_prune_bits(start: Start, tmp_path: Path) -> None:
    done, out = start("--bits", 3, "--group-size", 16, "--json")
    assert {(spec["base"]["bits"], spec["base"]["group_size"]) for spec in specs(out)} == {(3, 16)}
    assert done.json["pruned"]["bits_per_weight"] == summary(out)["bits_per_compressed_weight"]
    done, _ = start("--group-size", 16)
    assert (done.code, "--group-size: means something only with --bits" in done.err) == (2, True)
    assert {spec["base"]["zero"] for spec in specs(start("--bits", 3, "--group-size", 16, "--asymmetric")[1])} == {True}


def check_scope(start: Start, tmp_path: Path) -> None:
    _, out = start("--scope", "*.mlp.up_proj", "--scope", "*.self_attn.*")
    assert recipe_of(out)["steps"][0]["match"] == ["*.mlp.up_proj", "*.self_attn.*"]
    assert summary(out)["sites"] == 5


def check_distribute(start: Start, tmp_path: Path) -> None:
    for way in ("owl", "global", "measured"):
        done, out = start("--distribute", way, "--method", "magnitude", "--json")
        assert done.code == 0, done.err
        assert done.json["pruned"]["sparsity"] == pytest.approx(0.5, abs=0.02)
        if way != "owl":  # of one block there is nothing to compare
            assert len(recipe_of(out)["steps"]) > 1
    done, _ = start("--distribute", "owl", "--pattern", "2:4")
    assert (done.code, "a pattern has one sparsity" in done.err) == (2, True)
    done, _ = start("--distribute", "fairly")
    assert (done.code, "expected one of uniform, global, owl, measured" in done.err) == (2, True)


def check_retrain(start: Start, tmp_path: Path) -> None:
    _, out = start("--method", "magnitude", "--retrain", "perp")
    assert [stage["method"] for stage in recipe_of(out)["tuning"]] == ["retrain/perp"]
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert all(row["notes"]["retrain/perp"]["loss"] < row["notes"]["retrain/perp"]["loss_before"] for row in rows)
    done, _ = start("--retrain", "perl")
    assert (done.code, "expected one of ast, bqpo, perp" in done.err) == (2, True)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
ALIASES = {"settings": "set", "json_": "json"}
ONLY_QUANTIZE = ("method", "bits", "group_size", "symmetric", "recipe", "bpw", "size", "max_kl")
ONLY_PRUNE = ("prune_method", "sparsity", "pattern", "group", "within", "prune_bits", "scope", "distribute", "retrain")
DELIVERY = ("format_", "target", "tensor_parallel")  # no other runtime knows masks
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


def test_masks_are_refused_by_other_layouts_before_the_run(run: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{match: '*.*', method: prune/magnitude, options: {bits: 4, group_size: 16}}]\n")
    out = tmp_path / "out"
    done = run("run", recipe, model, "-o", out, "--data", ids, "--device", "cpu", "--format", "gptq")
    assert (done.code, out.exists(), out.with_name("out.job").exists()) == (2, False, False)
    assert "keep" in done.err


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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}word7 {{ m.content }} word8 {% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in ("quantize", "run", "prune") for option in checks_of(command)],
)
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


def test_a_revision_reaches_the_hub_and_the_model_card(
    quantize: Run, run: Run, model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(compress.checkpoint, "_fetch", lambda name, revision: asked.append((name, revision)) or (model, "c0ffee"))  # type: ignore[func-returns-value]
    text = ids_file(tmp_path / "text.npy", samples=2)
    common = ["--device", "cpu", "--data", ids, "--group-size", 16]
    done = run("quantize", "some/model", "-o", tmp_path / "out", *common, "--revision", "v2", "--evaluate", text, "--json")
    assert done.code == 0, done.err
    assert asked == [("some/model", "v2")], "and the evaluation compares with the same revision"
    assert done.json["base_revision"] == "c0ffee"
    assert done.json["evaluation"]["original"] == "some/model"
    assert "some/model" in (tmp_path / "out" / "README.md").read_text()


# --- inspect


@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_inspect_adds_up_to_the_files(shards: str, run: Run, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    source = tiny("llama", max_shard_size=shards)
    run(
        "quantize",
        source,
        "-o",
        tmp_path / "out",
        "--data",
        ids,
        "--group-size",
        16,
        "--device",
        "cpu",
        "--set",
        f"max_shard_size={shards}",
    )
    for folder, compressed in ((source, False), (tmp_path / "out", True)):
        found = run("inspect", folder, "--json").json
        stored = sum(path.stat().st_size - header(path) for path in folder.glob("*.safetensors"))
        assert found["bytes"] == stored
        assert found["compressed"] == compressed
        assert found["bytes"] == found["other_bytes"] + sum(kind["bytes"] for kind in found["kinds"])
        assert sum(size for _, _, size in found["by_block"]) == sum(kind["bytes"] for kind in found["kinds"])
        assert found["weights"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
        assert found["blocks"] == 3
        text = run("inspect", folder).out
        assert all(kind["name"] in text for kind in found["kinds"])
        assert f"{found['bytes'] * 8 / found['weights']:.3f} bits per weight" in text
    kinds = {kind["name"]: kind for kind in run("inspect", tmp_path / "out", "--json").json["kinds"]}
    assert kinds["mlp.up_proj"]["stored"] == "4-bit g16"
    assert kinds["mlp.up_proj"]["bytes"] * 8 / kinds["mlp.up_proj"]["weights"] == 5, "4 bits, and 16 bits of scale for 16 weights"
    assert kinds["lm_head"]["stored"] == "F32"


def test_tables_keep_a_row_on_a_line_when_piped(quantize: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a user's own width is kept
    rows = [line for line in quantize("--dry-run").out.splitlines() if "quant/gptq" in line]
    assert len(rows) == 7
    assert all("group_size=16" in row and "…" not in row for row in rows)


# --- eval


def perplexity(folder: Path, ids: np.ndarray[Any, Any]) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = torch.from_numpy(ids).long()
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    return math.exp(float(loss))


@pytest.mark.parametrize("which", ["model", "packed"])
def test_eval_equals_transformers(which: str, run: Run, ids: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    found = run("eval", folder, "--data", ids, "--no-speed", "--json", "--device", "cpu").json
    assert found["perplexity"] == pytest.approx(perplexity(folder, np.load(ids)), rel=1e-6)
    assert (found["windows"], found["length"]) == (12, 16)
    assert found["tokens_per_second"] is None


def test_a_model_agrees_with_itself(run: Run, model: Path, ids: Path) -> None:
    found = run("eval", model, "--data", ids, "--original", model, "--no-speed", "--json", "--device", "cpu").json
    assert (found["kl"], found["agreement"], found["kl_standard_error"]) == (0, 1, 0)
    assert found["perplexity"] == found["perplexity_before"]


def test_the_memory_of_measuring_is_not_that_of_the_run(
    run: Run, model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.screen.results.memory", SimpleNamespace(peak=lambda: 10**15))
    arguments = ("quantize", model, "--method", "rtn", "--group-size", 16, "--device", "cpu", "--no-reload", "-q")
    measured = run(*arguments, "-o", tmp_path / "out", "--evaluate", ids)
    assert (measured.out.count("1000.00 TB peak memory"), "measuring  took more" in measured.out) == (1, True)
    assert "took more" not in run(*arguments, "-o", tmp_path / "other").out


def test_eval_finds_the_original_and_measures_the_divergence(run: Run, model: Path, packed: Path, ids: Path) -> None:
    found = run("eval", packed, "--data", ids, "--no-speed", "--json", "--device", "cpu").json
    assert found["original"] == str(model)
    windows = torch.from_numpy(np.load(ids)).long()
    logs = []
    for folder in (model, packed):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows, use_cache=False).logits
        logs.append(logits[:, :-1].double().log_softmax(-1))
    p, q = logs
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    text = run("eval", packed, "--data", ids, "--no-speed", "--device", "cpu").out
    assert f"{found['kl']:.5f}" in text
    assert f"{found['perplexity']:.3f}" in text


def test_options_of_eval(run: Run, packed: Path, model: Path, ids: Path, tmp_path: Path) -> None:
    common = ("--data", ids, "--device", "cpu", "--json")
    few = run("eval", packed, *common, "--no-speed", "--samples", 2, "--length", 5).json
    assert (few["windows"], few["length"]) == (2, 5)
    other = run("eval", packed, *common, "--no-speed", "--samples", 2, "--length", 5, "--seed", 3).json
    assert other["ids_sha256"] != few["ids_sha256"]
    half = run("eval", packed, *common, "--no-speed", "--dtype", "bfloat16").json
    assert half["dtype"] == "bfloat16"
    assert half["perplexity"] != run("eval", packed, *common, "--no-speed").json["perplexity"]
    done = run("eval", packed, *common, "--dtype", "float7")
    assert (done.code, "--dtype float7: expected one of float32" in done.err) == (2, True)
    fast = run("eval", model, *common).json
    assert fast["tokens_per_second"] > 0
    copied = shutil.copytree(packed, tmp_path / "copy")
    saved = run("eval", copied, *common, "--no-speed", "--save").json
    assert json.loads((copied / "evaluation.json").read_text())["perplexity"] == saved["perplexity"]
    assert not (packed / "evaluation.json").exists()
    done = run("eval", model, *common, "--no-speed", "--save")
    assert (done.code, "not a checkpoint that compress wrote" in done.err) == (6, True)
    quiet, loud = (run("eval", packed, *common[:-1], "--no-speed", *more) for more in (("--quiet",), ()))
    assert (quiet.err, quiet.out) == ("", loud.out)
    assert loud.err


def test_eval_against_a_model_of_another_vocabulary(run: Run, packed: Path, tiny: Tiny, ids: Path) -> None:
    done = run("eval", packed, "--data", ids, "--original", tiny("llama", vocab_size=97), "--no-speed", "--device", "cpu")
    assert (done.code, "has another vocabulary" in done.err) == (3, True)


# --- verify


def test_verify(run: Run, packed: Path) -> None:
    done = run("verify", packed)
    assert done.code == 0
    assert "5 files match their checksums, 7 of 7 weights are what was compressed" in done.out
    found = run("verify", packed, "--json")
    assert found.err == ""
    assert found.json["mean_difference_nats"] <= found.json["limit_nats"]
    assert run("verify", packed, "--quiet").err == ""
    assert run("verify", packed, "--device", "toaster").code == 2


@pytest.mark.parametrize("place", ["first", "middle", "last", "header"])
def test_verify_notices_one_byte(place: str, run: Run, packed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed, tmp_path / "copy")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    at = {"first": header(path), "middle": len(raw) // 2, "last": len(raw) - 1, "header": 40}[place]
    raw[at] ^= 1
    path.write_bytes(raw)
    done = run("verify", folder)
    assert done.code == 7
    assert "model.safetensors was changed since it was written (SHA-256" in done.err
    assert "fetch these files again" in done.err


def test_verify_notices_what_checksums_do_not_cover(run: Run, packed: Path, tmp_path: Path) -> None:
    gone = shutil.copytree(packed, tmp_path / "gone")
    (gone / "model.safetensors").unlink()
    assert run("verify", gone).code == 7
    other = shutil.copytree(packed, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 3.0}))
    done = run("verify", other)
    assert (done.code, "config.json was changed" in done.err) == (7, True)
    values = summary(other)
    values["files"]["config.json"] = hashlib.sha256((other / "config.json").read_bytes()).hexdigest()
    (other / "summary.json").write_text(json.dumps(values))
    done = run("verify", other)
    assert (done.code, "losses of the recorded batch differ" in done.err) == (7, True)


def test_verify_of_something_else(run: Run, model: Path, packed: Path, tmp_path: Path) -> None:
    assert run("verify", model).code == 3
    assert run("verify", tmp_path / "nowhere").code == 3
    assert run("verify", ids_file(tmp_path / "file.npy")).code == 3
    values = summary(packed)
    for number, text in enumerate(
        [
            "[]",
            "{}",
            "3",
            "{",
            json.dumps({**values, "check": 3}),
            json.dumps({**values, "files": []}),
            json.dumps({**values, "check": {}}),
        ]
    ):
        folder = shutil.copytree(packed, tmp_path / str(number))
        (folder / "summary.json").write_text(text)
        done = run("verify", folder)
        assert (done.code, "summary.json" in done.err) == (3, True), text


# --- methods and recipes


def test_methods(run: Run) -> None:
    found = run("methods", "--json").json
    assert set(found) >= {"quant/gptq", "quant/rtn"}
    assert found["quant/gptq"]["needs"] == ["Hessian"]
    assert found["quant/rtn"]["needs"] == []
    assert (found["prune/magnitude"]["needs"], found["prune/magnitude"]["needs_by_default"]) == (["Hessian"], [])
    assert found["quant/gptq"]["options"]["bits"]["default"] == 4
    assert all(method["about"] for method in found.values())
    text = run("methods").out
    for path, method in found.items():
        assert path in text
        assert all(f"    {name} = " in text for name in method["options"])


def test_recipes(run: Run, tmp_path: Path) -> None:
    listed = run("recipes", "--json").json
    assert listed["rtn-8bit"].startswith("Round to nearest")
    assert all(name in run("recipes").out for name in listed)
    for name in listed:
        text = run("recipes", name).out
        assert text == (ROOT / "recipes" / f"{name}.yaml").read_text()
        assert run("recipes", name, "--json").json == yaml.safe_load(text)
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: []\n")
    assert run("recipes", mine).out == "steps: []\n"
    done = run("recipes", "rtn-9bit")
    assert (done.code, "did you mean rtn-8bit?" in done.err) == (2, True)


# --- how things end


def test_exit_codes_are_those_of_the_help(run: Run) -> None:
    text = " ".join(run("--help").out.split())
    documented = dict(re.findall(r"(\d+) ([a-z ]+)", text[text.index("Exit codes:") :]))
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CompressError)]
    assert {kind.exit_code for kind in classes} | {0, 130} == set(map(int, documented))
    assert documented["7"] == "verification failed"


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == compress.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["squash"],
        ["quantize"],
        ["quantize", "MODEL"],
        ["quantize", "MODEL", "-o", "OUT", "--bits", "four"],
        ["quantize", "MODEL", "-o", "OUT", "--no-such"],
        ["quantize", "MODEL", "-o", "OUT", "--method", "nothing"],
        ["quantize", "MODEL", "-o", "OUT", "--recipe", "nothing"],
        ["quantize", "MODEL", "-o", "OUT", "--set", "steps"],
        ["quantize", "MODEL", "-o", "OUT", "--set", "stesp.0=1"],
        ["quantize", "MODEL", "-o", "OUT", "--samples", "0"],
        ["quantize", "MODEL", "-o", "OUT", "--memory", "much"],
        ["run", "nothing", "MODEL", "-o", "OUT"],
        ["run", "BROKEN", "MODEL", "-o", "OUT"],
        ["run", "BROKEN", "MODEL", "-o", "OUT", "--samples", "3"],
        ["eval", "MODEL"],
        ["eval", "MODEL", "--data", "IDS", "--samples", "-1"],
    ],
)
def test_a_wrong_command_line_or_recipe_is_2(arguments: list[str], run: Run, model: Path, ids: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("data: c4\nsteps: [{match: '*', method: quant/rtn, bits: 3}]\n")
    names = {"MODEL": model, "OUT": tmp_path / "out", "IDS": ids, "BROKEN": tmp_path / "broken.yaml"}
    done = run(*(names.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert done.err
    assert not (tmp_path / "out").exists()


def broken_models(folder: Path, model: Path) -> dict[str, Path]:
    made = {name: shutil.copytree(model, folder / name) for name in ("no config", "bad config", "pickle", "cut", "family", "nan")}
    (made["no config"] / "config.json").unlink()
    (made["bad config"] / "config.json").write_text("{")
    (made["pickle"] / "model.safetensors").rename(made["pickle"] / "pytorch_model.bin")
    cut = made["cut"] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    config = json.loads((made["family"] / "config.json").read_text())
    (made["family"] / "config.json").write_text(json.dumps({**config, "model_type": "squirrel"}))
    path = made["nan"] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    return {**made, "nowhere": folder / "nowhere", "hub": Path("no-such/model-anywhere")}


def test_a_checkpoint_that_cannot_be_read_is_3(run: Run, model: Path, packed: Path, ids: Path, tmp_path: Path) -> None:
    for name, folder in {**broken_models(tmp_path, model), "compressed": packed}.items():
        done = run("quantize", folder, "-o", tmp_path / "out", "--data", ids, "--group-size", 16, "--device", "cpu")
        assert (done.code, done.err.splitlines()[-1].startswith("error: ")) == (3, True), (name, done)
        assert not (tmp_path / "out").exists()
        if name not in ("nan", "compressed"):
            assert run("inspect", folder).code == 3, name


def test_calibration_data_that_does_not_do_is_4(quantize: Run, tmp_path: Path) -> None:
    cases = {
        "nowhere.npy": None,
        "large.npy": np.full((4, 8), 96),
        "flat.npy": np.zeros(8, dtype=np.int64),
        "floats.npy": np.zeros((4, 8)),
        "words.txt": "no tokenizer here",
    }
    for name, values in cases.items():
        if isinstance(values, str):
            (tmp_path / name).write_text(values)
        elif values is not None:
            np.save(tmp_path / name, values)
        done = quantize(data=tmp_path / name)
        assert (done.code, done.err.startswith("error: ")) == (4, True), name
    assert quantize("--samples", 99).code == 4
    assert not (tmp_path / "out").exists()


def test_another_job_in_the_folder_is_5(quantize: Run, tmp_path: Path) -> None:
    assert quantize("--keep-job", "--bits", 3).code == 0
    done = quantize("--bits", 2)
    assert done.code == 5
    assert "recipe.steps.0.options.bits was 3 and is 2 now" in done.err
    shutil.rmtree(tmp_path / "out")
    done = quantize("--bits", 2)
    assert (done.code, "recipe.steps.0.options.bits was 3 and is 2 now" in done.err) == (5, True)
    assert quantize("--bits", 3).code == 0


def test_a_place_that_cannot_be_written_is_6(quantize: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = quantize()
    assert (done.code, "is not a checkpoint that compress wrote" in done.err) == (6, True)
    assert tree(tmp_path) == {"out/thesis.tex": 4}
    (tmp_path / "file").write_text("")
    assert quantize(out="file/out").code == 6
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "notes").write_text("mine")
    done = quantize("--job", tmp_path / "job", out="other")
    assert (done.code, "is not a job folder" in done.err) == (6, True)


def test_a_bug_keeps_its_traceback(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("compress.inspection.contents.contents", broken)
    with pytest.raises(ZeroDivisionError):
        run("inspect", model)


# --- as a process


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
