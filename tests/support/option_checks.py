"""What each option of `quantize`, `run` and `prune` does.

Each check gets a function that runs the command with more arguments into a folder of its own and returns how it ended, and the
folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Done, specs, summary
from runs import digests, ids_file

import compress.checkpoint.source

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


def check_effort(start: Start, tmp_path: Path) -> None:
    assert recipe_of(start("--effort", "fast")[1])["steps"][0]["method"] == "quant/rtn"
    done, _ = start("--effort", "fast", "--method", "gptq")
    assert (done.code, "--effort fast: chooses the method, and --method names one" in done.err) == (2, True)
    done, _ = start("--effort", "most")
    assert (done.code, "--effort most: expected one of fast, normal, best" in done.err) == (2, True)


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


def check_bos(start: Start, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": " ".join(f"word{n % 90}" for n in range(300))}))
    common = ("--data", text, "--samples", 4, "--length", 6)
    _, out = start(*common, "--bos")
    assert recipe_of(out)["data"]["bos"] is True
    assert calibration_of(out) != calibration_of(start(*common, "--no-bos")[1])


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
    there = {path.name for path in tmp_path.iterdir()}
    done, out = start("--bpw", 3.25, "--dry-run", "--json", "--method", "rtn")
    assert done.json["candidates"]
    assert {path.name for path in tmp_path.iterdir()} == there, "nothing was measured or kept"
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
        import compress.blockwise.units

        real, seen = compress.blockwise.units.observe, []
        patch.setattr(compress.blockwise.units, "observe", lambda *arguments: seen.append(1) or real(*arguments))  # type: ignore[func-returns-value]
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
        real = compress.checkpoint.source.Source.open.__func__  # type: ignore[attr-defined]

        def opened(cls: Any, model: Any, revision: str | None = None) -> Any:
            asked.append(revision)
            return real(cls, model, revision)

        patch.setattr(compress.checkpoint.source.Source, "open", classmethod(opened))
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


ONLY_QUANTIZE = ("method", "effort", "bits", "group_size", "symmetric", "recipe", "bpw", "size", "max_kl")


ONLY_PRUNE = ("prune_method", "sparsity", "pattern", "group", "within", "prune_bits", "scope", "distribute", "retrain")


DELIVERY = ("format_", "target", "tensor_parallel")  # no other runtime knows masks
