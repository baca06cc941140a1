"""Originals in FP8 and MXFP4: decoded as they are read, so that all that follows is as for the same values in bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import compress as run
from runs import digests, steps
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from compress.checkpoint import fp8_mxfp4 as coded
from compress.checkpoint.source import Source
from compress.errors import CheckpointError
from compress.inspection.doctor import diagnose

Tiny = Callable[..., Path]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}


def in_fp8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and decoded values of a weight in blocks, one block after the other."""
    high, wide = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-high // rows), -(-wide // columns))
    values = torch.empty(weight.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            values[place] = (codes[place].float() * scale[i, j]).bfloat16()
    return codes, scale, values


def write(folder: Path, model: Path, tensors: dict[str, Tensor], quantization: dict[str, object] | None) -> Path:
    shutil.copytree(model, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(
        json.dumps(config | ({} if quantization is None else {"quantization_config": quantization}))
    )
    return folder


@pytest.fixture(scope="module")
def pair(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in FP8 with a block that its config does not count (also in FP8), and its values in bfloat16."""
    root = tmp_path_factory.mktemp("fp8")
    stored, plain = {}, {}
    for name, tensor in load_file(tiny("llama") / "model.safetensors").items():
        if "_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = in_fp8(tensor, 16, 24)
        else:
            stored[name] = plain[name] = tensor.bfloat16()
    extra = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    stored["mtp.proj.weight"], stored["mtp.proj.weight_scale_inv"], plain["mtp.proj.weight"] = in_fp8(extra, 16, 24)
    stored["mtp.norm.weight"] = plain["mtp.norm.weight"] = extra[0].clone()
    return write(root / "fp8", tiny("llama"), stored, FP8), write(root / "plain", tiny("llama"), plain, None)


def test_blocks_with_scales_are_decoded(pair: tuple[Path, Path]) -> None:
    ours, plain = Source.open(pair[0]), Source.open(pair[1])
    assert ours.coded == "FP8" and "quantization_config" not in ours.config
    assert set(ours.entries) == set(plain.entries)
    for name in plain.entries:
        assert torch.equal(ours.tensor(name), plain.tensor(name)), name
    assert ours.stored_nbytes < 0.7 * plain.stored_nbytes
    assert ours.stored_nbytes == sum(t.nbytes for t in load_file(pair[0] / "model.safetensors").values())


def test_a_run_is_that_of_the_decoded_model(pair: tuple[Path, Path], ids: Path, tmp_path: Path) -> None:
    """Weights that no step takes, and those outside the model, are written decoded, as nothing says their scales any more."""
    recipe = steps(match="*.mlp.*", bits=4, group_size=16)
    for name, model in zip(("fp8", "plain"), pair, strict=True):
        run(model, tmp_path / name, ids, recipe)
    ours, plain = digests(tmp_path / "fp8"), digests(tmp_path / "plain")
    assert ours["model.safetensors"] == plain["model.safetensors"]
    assert ours["config.json"] == plain["config.json"]
    said = json.loads((tmp_path / "fp8" / "summary.json").read_text())
    assert said["decoded_from"] == "FP8"
    assert "The original is stored in FP8" in (tmp_path / "fp8" / "report.html").read_text()


@pytest.mark.parametrize("shape", [(), (1,), (32,), (32, 1)])
@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_inv"])
def test_other_scales(shape: tuple[int, ...], leaf: str, tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny("llama") / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    codes = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    tensors |= {f"{name}.weight": codes, f"{name}.{leaf}": scale, f"{name}.input_scale": torch.ones(())}
    source = Source.open(write(tmp_path / "fp8", tiny("llama"), tensors, {"quant_method": "compressed-tensors"}))
    expected = (codes.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)).bfloat16()
    assert torch.equal(source.tensor(f"{name}.weight"), expected)
    assert not [key for key in source.entries if key.endswith("scale") or key.endswith("scale_inv")]


def test_scales_that_are_missing_or_do_not_fit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in tensors.items() if key != f"{name}_scale_inv"}
    with pytest.raises(CheckpointError, match=rf"{name} is FP8, and there is no scale"):
        Source.open(write(tmp_path / "without", pair[0], without, FP8))
    other = tensors | {f"{name}_scale_inv": torch.ones(3, 7)}
    with pytest.raises(CheckpointError, match=r"is \[3, 7\] beside .*\[64, 32\]; expected .*\[4, 2\] for blocks of \[16, 24\]"):
        Source.open(write(tmp_path / "other", pair[0], other, FP8))


def test_mxfp4_as_transformers_decodes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(coded.mxfp4(blocks, scales), expected)
    assert torch.equal(coded.mxfp4(blocks[1], scales[1]), expected[1])


def test_experts_in_mxfp4(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored, plain = {}, {}
    for name, tensor in load_file(tiny("gpt_oss") / "model.safetensors").items():
        if tensor.ndim == 3:
            experts, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        else:
            stored[name] = plain[name] = tensor.bfloat16()
    models = {
        "mxfp4": write(tmp_path / "a", tiny("gpt_oss"), stored, {"quant_method": "mxfp4"}),
        "plain": write(tmp_path / "b", tiny("gpt_oss"), plain, None),
    }
    assert Source.open(models["mxfp4"]).coded == "MXFP4"
    for name, model in models.items():
        run(model, tmp_path / name, ids, steps("quant/rtn", match="*.experts.*", bits=4, group_size=-1))
    assert digests(tmp_path / "mxfp4")["model.safetensors"] == digests(tmp_path / "plain")["model.safetensors"]


def test_doctor_reads_them(pair: tuple[Path, Path]) -> None:
    found = diagnose(pair[0], None, 1, lambda *_: None)
    assert found.healthy and found.kind == "FP8"
    assert [problem for problem in found.problems if "decodes them to bfloat16" in problem.message]


def test_what_other_methods_packed_is_left_to_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    source = Source.open(write(tmp_path / "x", pair[0], tensors, {"quant_method": "bitsandbytes"}))
    assert source.coded is None and source.config["quantization_config"]["quant_method"] == "bitsandbytes"
