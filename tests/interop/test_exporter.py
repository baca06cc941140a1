"""Exports from end to end: what transformers makes of them, and round trips."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import FLOATS, PROBE, equal_codes, export, logits, parts, tensors
from runs import compress as run
from safetensors.torch import load_file
from thorough import some
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

import compress
from compress.checkpoint import tensor_file as container
from compress.checkpoint.packed_source import PackedSource
from compress.interop.foreign import ForeignSource, open_any

Tiny = Callable[..., Path]


@pytest.mark.parametrize("recipe", ["symmetric", "3 bits", "5 bits per row", "two widths, with the head"])
def test_transformers_reads_compressed_tensors(recipe: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """It decodes to the dtype of the scales, bfloat16, when a module first runs in float32: exactly as codes times scales."""
    export(made(recipe), "compressed-tensors", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(made(recipe)))


def test_transformers_reads_asymmetric_compressed_tensors_decoded(made: Callable[..., Path], tmp_path: Path) -> None:
    """Packed, transformers 5.23 expects zero points of another shape; with dequantize=True it rounds values to bfloat16."""
    export(made("asymmetric"), "compressed-tensors", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    source = PackedSource.open_packed(made("asymmetric"))
    for site in source.table:
        assert torch.equal(model.get_submodule(site).weight, source.tensor(f"{site}.weight").bfloat16().float()), site


@pytest.mark.parametrize(
    ("family", "recipe"),
    some(
        [(f, r) for f in ("qwen3_moe", "mixtral") for r in ("symmetric", "3 bits")],
        ("qwen3_moe", "3 bits"),
        ("mixtral", "symmetric"),
    ),
)
def test_transformers_reads_experts(family: str, recipe: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """Experts become one dense tensor in the dtype of the scales; every decoded value is compared."""
    model = made(recipe, family, num_hidden_layers=2, **({"moe_intermediate_size": 64} if family == "qwen3_moe" else {}))
    export(model, "compressed-tensors", tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    source = PackedSource.open_packed(model)
    disk, names = (
        ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    )
    block = next(n for n in range(2) if any(f"layers.{n}.{disk}.experts" in site for site in source.table))
    experts = loaded.model.layers[block].mlp.experts

    def weight(expert: int, name: str) -> torch.Tensor:
        return source.tensor(f"model.layers.{block}.{disk}.experts.{expert}.{name}.weight").bfloat16().float()

    for expert in range(4):
        joined = torch.cat([weight(expert, names[0]), weight(expert, names[1])])
        assert torch.equal(experts.gate_up_proj[expert], joined)
        assert torch.equal(experts.down_proj[expert], weight(expert, names[2]))
    with torch.no_grad():
        assert bool(loaded(PROBE).logits.isfinite().all())


TRIPS = [
    ("symmetric", ["gptq", "awq", "compressed-tensors"]),
    ("asymmetric", ["gptq", "awq", "compressed-tensors"]),
    ("3 bits", ["gptq", "compressed-tensors"]),
    ("5 bits per row", ["compressed-tensors"]),
    ("two widths, with the head", ["gptq", "compressed-tensors"]),
    ("act-order", ["gptq"]),
]


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe, names in TRIPS for name in names])
def test_there_and_back_again(recipe: str, name: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """Native -> other -> native: every code, scale, zero point and group; and all other tensors byte for byte."""
    original = made(recipe)
    summary = export(original, name, tmp_path / "there")
    assert summary["widened"] == {}
    assert isinstance(open_any(tmp_path / "there"), ForeignSource)
    export(tmp_path / "there", "native", tmp_path / "back")
    first, second = PackedSource.open_packed(original), PackedSource.open_packed(tmp_path / "back")
    equal_codes(parts(original), parts(tmp_path / "back"), scale_dtype=False)
    assert first.entries.keys() == second.entries.keys()
    for tensor in first.entries:
        if tensor.removesuffix(".weight") not in first.table:
            assert torch.equal(first.tensor(tensor), second.tensor(tensor)), tensor
    assert torch.equal(logits(tmp_path / "back"), logits(original))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("recipe", "first", "second"),
    [
        ("symmetric", "gptq", "awq"),
        ("symmetric", "awq", "compressed-tensors"),
        ("symmetric", "compressed-tensors", "gptq"),
        ("asymmetric", "gptq", "awq"),
        ("asymmetric", "awq", "gptq"),
        ("3 bits", "compressed-tensors", "gptq"),
    ],
)
def test_between_foreign_layouts(recipe: str, first: str, second: str, made: Callable[..., Path], tmp_path: Path) -> None:
    """A -> B gives the files that native -> B gives, where scales have one type."""
    export(made(recipe), first, tmp_path / "a")
    export(tmp_path / "a", second, tmp_path / "b")
    equal_codes(parts(made(recipe)), parts(tmp_path / "b"), scale_dtype=False)
    again = tmp_path / "again"
    export(tmp_path / "b", first, again)
    assert tensors(again).keys() == tensors(tmp_path / "a").keys()
    for tensor, value in tensors(tmp_path / "a").items():
        assert torch.equal(tensors(again)[tensor].double(), value.double()), tensor


def test_a_checkpoint_from_elsewhere_becomes_native(made: Callable[..., Path], tmp_path: Path) -> None:
    """As GPTQModel writes them: float16 scales with all their bits, v1 zeros, its own settings."""
    export(made("symmetric"), "gptq", tmp_path / "foreign")
    path = tmp_path / "foreign" / "model.safetensors"
    found, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, tensor in found.items():
        if name.endswith(".scales"):
            found[name] = (tensor.float() * (1 + torch.rand(tensor.shape, generator=generator) / 100)).half()
    container.save(path, found)
    (tmp_path / "foreign" / "quantize_config.json").unlink()
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    more = {"damp_percent": 0.01, "true_sequential": True, "model_file_base_name": None}
    config["quantization_config"] = {**config["quantization_config"], **more}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    export(tmp_path / "foreign", "native", tmp_path / "native")
    equal_codes(parts(tmp_path / "foreign"), parts(tmp_path / "native"))
    part = parts(tmp_path / "native")["model.layers.0.mlp.up_proj"]
    assert part.scale.dtype == torch.float16
    assert not torch.equal(part.scale.bfloat16().half(), part.scale)
    export(tmp_path / "native", "gptq", tmp_path / "again")
    assert all(torch.equal(value, found[name]) for name, value in tensors(tmp_path / "again").items())
    model = compress.load(str(tmp_path / "native"), dtype=torch.float32)
    site = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(site).compressed().dequantize(), part.dequantize())


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("low", [False, True])
def test_floats_of_four_bits_are_wider_integers(name: str, low: bool, tiny: Tiny, tmp_path: Path) -> None:
    """E2M1 times a power of two; scales that float16 does not hold are written in bfloat16, where a layout has that."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", hidden_size=128), model)
    if low:
        found = load_file(model / "model.safetensors")
        found["model.layers.1.mlp.up_proj.weight"][:, :32] *= 2.0**-30
        container.save(model / "model.safetensors", found)
    run(model, tmp_path / "native", None, [{"match": "*.up_proj", "method": "quant/floating", "options": FLOATS}])
    made = export(tmp_path / "native", name, tmp_path / "out")
    assert made["scale_dtypes"] == (["BF16"] if low or name == "compressed-tensors" else ["F16"])
    assert made["widened"] == {("4 -> 5 bits" if name == "compressed-tensors" else "4 -> 8 bits"): 3}
    first, second = open_any(tmp_path / "native"), open_any(tmp_path / "out")
    for site in PackedSource.open_packed(tmp_path / "native").table:
        assert torch.equal(first.tensor(f"{site}.weight"), second.tensor(f"{site}.weight"))
