"""`compress doctor`: each thing that can be wrong is found and said with what to do, and a sound checkpoint has nothing."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from places import ROOT
from runs import compress as run
from safetensors.torch import load_file, save_file
from thorough import some

from compress.checkpoint.source import INDEX
from compress.inspection.doctor import Diagnosis, diagnose
from compress.interop import exporter as exporting

Tiny = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj"
STEPS = [{"match": "*.*", "method": "quant/rtn", "options": {"bits": 4, "group_size": 32}}]


@pytest.fixture(scope="module")
def kinds(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each kind, with a tokenizer beside it."""
    from tokenizers import Tokenizer, models

    root = tmp_path_factory.mktemp("kinds")
    shutil.copytree(tiny("llama", hidden_size=64, intermediate_size=96), root / "dense")
    Tokenizer(models.WordLevel({f"w{n}": n for n in range(90)}, unk_token="w0")).save(str(root / "dense" / "tokenizer.json"))
    run(root / "dense", root / "native", None, STEPS)
    run(root / "dense", root / "shards", None, STEPS, max_shard_size="20KB")
    run(tiny("mixtral"), root / "experts", None, [{**STEPS[0], "options": {"bits": 4, "group_size": 16}}])
    for name in ("awq", "compressed-tensors"):
        exporting.export(exporting.prepare(str(root / "native"), name), root / name, lambda *_: None)
    names = ("dense", "native", "shards", "experts", "awq", "compressed-tensors")
    return {name: root / name for name in names}


def doctor(folder: Path, target: str | None = None) -> Diagnosis:
    return diagnose(folder, target, 1, lambda *_: None)


def errors(found: Diagnosis) -> str:
    return "\n".join(f"{p.stage}: {p.message}" for p in found.problems if p.severity == "error")


@pytest.mark.parametrize("kind", ["dense", "native", "shards", "experts", "awq", "compressed-tensors"])
def test_a_sound_checkpoint_has_nothing(kind: str, kinds: dict[str, Path]) -> None:
    found = doctor(kinds[kind])
    assert errors(found) == ""
    assert found.healthy
    assert found.kind == (kind if kind in ("dense", "awq", "compressed-tensors") else "native")
    warnings = [p.message for p in found.problems if p.severity == "warning"]
    assert len(warnings) == (1 if kind == "experts" else 0), "the model of experts has no tokenizer"
    said = "import compress" in "".join(p.message for p in found.problems if p.severity == "note")
    assert said == (found.kind == "native")


@pytest.mark.parametrize(
    "family", some(["gpt2", "opt", "gemma2", "phi3", "qwen2_moe", "deepseek_v3", "gpt_oss"], "gpt2", "gpt_oss")
)
def test_families(family: str, tiny: Tiny, tmp_path: Path) -> None:
    run(tiny(family), tmp_path / "out", None, [{**STEPS[0], "options": {"bits": 4, "group_size": 16}}])
    assert errors(doctor(tiny(family))) == ""
    assert errors(doctor(tmp_path / "out")) == ""


Change = Callable[[Path], None]


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def config(change: Callable[[dict[str, Any]], Any]) -> Change:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def truncated(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def without_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def swapped(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def stale_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = sorted(set(index["weight_map"].values()))[0]
    (folder / INDEX).write_text(json.dumps(index))


def stray(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "model-00099-of-00099.safetensors")


def hostile_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**12))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def tokens(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["w500"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(values))


def put(name: str, value: torch.Tensor) -> Change:
    return tensors(lambda t: t.update({name: value}))


CASES: dict[str, tuple[str, Change, str]] = {
    "no config": ("dense", lambda f: (f / "config.json").unlink(), "files: .*no config.json, which is written last"),
    "config is no JSON": ("native", lambda f: (f / "config.json").write_text("{"), "files: config.json: cannot be read"),
    "config is a list": ("dense", lambda f: (f / "config.json").write_text("[]"), "files: config.json: holds a JSON list"),
    "no model type": ("dense", config(lambda c: c.pop("model_type")), "files: config.json: no model_type"),
    "generation config": (
        "dense",
        lambda f: (f / "generation_config.json").write_text("x"),
        "generation_config.json: cannot be read",
    ),
    "truncated": ("dense", truncated, "files: .*model.safetensors: .*fetch it again"),
    "truncated shard": ("shards", truncated, "files: .*model-00001.*(.|\n)*checksums: model-00001"),
    "absent shard": (
        "shards",
        without_shard,
        r"files: model-00002-of.*: not there, but .*index.json places \d+",
    ),
    "swapped shards": ("shards", swapped, "files: model-00001.*swapped or renamed(.|\n)*checksums: .*files were swapped"),
    "stale index": ("shards", stale_index, "files: model-00001.*lacks 1 tensors .* such as model.extra.weight"),
    "hostile header": ("dense", hostile_header, "files: .*the header claims 1000000000000 bytes"),
    "pickles": ("dense", pickled, "files: .*holds only pytorch_model.bin; expected safetensors"),
    "changed file": (
        "native",
        put(f"{UP}.scale", torch.full((96, 2), 0.5).bfloat16()),
        "checksums: .*SHA-256 is",
    ),
    "changed export": ("awq", put(f"{UP}.scales", torch.full((2, 96), 0.5).half()), "checksums: .*SHA-256 is"),
    "newer format": (
        "native",
        config(lambda c: c["quantization_config"].update(format_version=9)),
        "is 9.*: upgrade it",
    ),
    "missing packed tensor": ("native", tensors(lambda t: t.pop(f"{UP}.scale")), f"tensors: .*{UP}.scale is missing"),
    "packed tensor of another dtype": ("native", put(f"{UP}.scale", torch.ones(96, 2)), f"tensors: .*{UP}.scale is F32"),
    "missing foreign tensor": ("awq", tensors(lambda t: t.pop(f"{UP}.scales")), f"tensors: .*{UP}.scales: missing"),
    "missing tensor": (
        "dense",
        tensors(lambda t: t.pop("model.norm.weight")),
        "model: .*1 parameters .*model.norm.weight",
    ),
    "missing head": ("dense", tensors(lambda t: t.pop("lm_head.weight")), "model: .*no tensor, such as lm_head.weight"),
    "missing linear": ("dense", tensors(lambda t: t.pop(f"{UP}.weight")), "model: .*has mlp.gate_proj but not mlp.up_proj"),
    "unknown tensor": ("dense", put("model.layers.1.surprise", torch.ones(3)), "no rule claims 1 tensors.*layers.1.surprise"),
    "wrong shape": (
        "dense",
        put(f"{UP}.weight", torch.ones(96, 32)),
        r"model: .*has shape \[96, 32\], but config.json makes",
    ),
    "other model's config": (
        "native",
        config(lambda c: c.update(hidden_size=128)),
        "config.json of one model with weights",
    ),
    "fewer layers": ("dense", config(lambda c: c.update(num_hidden_layers=5)), "model: .*layers.3 has no linear"),
    "other type": ("dense", config(lambda c: c.update(model_type="gpt2", n_layer=3)), "model: "),
    "stale quantization": (
        "dense",
        config(lambda c: c.update(quantization_config={"quant_method": "fp8"})),
        "tensors: config.json: quantization_config is there, but no tensor is packed: it is left over",
    ),
    "lost quantization": (
        "native",
        config(lambda c: c.pop("quantization_config")),
        "tensors: 21 tensors such as .*codes are packed by compress, but config.json has no quantization_config",
    ),
    "lost foreign quantization": (
        "awq",
        config(lambda c: c.pop("quantization_config")),
        "packed by GPTQ or AWQ, but",
    ),
    "NaN": ("dense", put("model.norm.weight", torch.full((64,), float("nan"))), r"values: .*model.norm.weight \(64 of 64\)"),
    "infinite scale": (
        "awq",
        put(f"{UP}.scales", torch.full((2, 96), float("inf")).half()),
        r"values: .*scales \(192 of 192\)",
    ),
    "tokenizer of another model": ("dense", tokens, "tokenizer: tokenizer.json: names token 500, but the model has 96"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_found(case: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    import re

    kind, change, expected = CASES[case]
    folder = tmp_path / "copy"
    shutil.copytree(kinds[kind], folder)
    change(folder)
    found = doctor(folder)
    assert not found.healthy
    assert re.search(expected, errors(found)), errors(found)
    for problem in found.problems:
        assert len(problem.message) > 30
        assert "; " in problem.message or ". " in problem.message, "what it is, and what to do"


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("dense", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        ("shards", stray, "model-00099-of-00099.safetensors: is not in"),
        ("dense", lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "which loaders take alone"),
    ],
)
def test_what_is_only_a_warning(kind: str, change: Change, expected: str, kinds: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kinds[kind], tmp_path / "copy")
    change(tmp_path / "copy")
    found = doctor(tmp_path / "copy")
    assert found.healthy
    assert expected in "\n".join(p.message for p in found.problems if p.severity == "warning")


def test_tensors_that_the_model_does_not_load_are_named(kinds: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kinds["dense"], tmp_path / "copy")
    put("audio_tower.conv.weight", torch.ones(3, 2, 2))(tmp_path / "copy")
    found = doctor(tmp_path / "copy")
    assert found.healthy
    assert "1 tensors have no place in the model of config.json, such as audio_tower.conv.weight" in found.problems[0].message


def test_runtimes(kinds: dict[str, Path]) -> None:
    assert doctor(kinds["native"]).runtimes["transformers"] == "loads it"
    assert "`compress export --format compressed-tensors`" in doctor(kinds["native"]).runtimes["vllm"]
    found = doctor(kinds["native"], "llama.cpp")
    assert not found.healthy
    assert "runtimes: llama.cpp: llama.cpp does not read the layout native" in errors(found)
    assert doctor(kinds["awq"], "vllm").healthy
    assert not doctor(kinds["awq"], "llama.cpp").healthy
    assert doctor(kinds["dense"], "vllm").runtimes == {}


def test_gguf_files(tmp_path: Path) -> None:
    demo = ROOT / "examples" / "demo"
    run(demo, tmp_path / "native", None, [{**STEPS[0], "options": {"bits": 4, "group_size": 128}}])
    exporting.export(exporting.prepare(str(tmp_path / "native"), "gguf"), tmp_path / "gguf", lambda *_: None)
    found = doctor(tmp_path / "gguf")
    assert (found.kind, found.problems) == ("gguf", [])
    path = tmp_path / "gguf" / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-10:] = b"\xff" * 10
    path.write_bytes(data)
    assert "SHA-256" in errors(doctor(tmp_path / "gguf"))
    path.write_bytes(data[: len(data) // 2])
    assert "model.gguf: cannot be read" in errors(doctor(tmp_path / "gguf"))


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such folder" in errors(doctor(tmp_path / "nothing"))
    assert "holds no weights" in errors(doctor(tmp_path))


def test_a_method_that_is_not_read(kinds: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(kinds["dense"], tmp_path / "copy")
    config(lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))(tmp_path / "copy")
    put(f"{UP}.weight.absmax", torch.ones(3))(tmp_path / "copy")
    found = doctor(tmp_path / "copy")
    assert found.kind == "bitsandbytes"
    assert "whose tensors compress does not read" in "".join(p.message for p in found.problems)


def test_exit_codes(kinds: dict[str, Path], tmp_path: Path, run: Run) -> None:
    done = run("doctor", kinds["native"], "-q")
    assert done.code == 0
    assert "nothing is wrong" in done.out
    shutil.copytree(kinds["dense"], tmp_path / "copy")
    truncated(tmp_path / "copy")
    done = run("doctor", tmp_path / "copy", "--json")
    assert done.code == 9
    found = done.json
    assert (found["healthy"], found["problems"][0]["stage"]) == (False, "files")
    done = run("doctor", kinds["awq"], "--target", "llama.cpp")
    assert done.code == 9
    assert "1 error" in done.out
    assert run("doctor", kinds["awq"], "--target", "ollama").code == 2
