"""Checkpoints in the native format: read like the original, refused when tampered with, and of every version so far."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import PROCESSOR, quickly
from places import TESTS
from runs import compress, steps
from table_damage import damage

from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import load, save
from compress.errors import CheckpointError, FormatError

GOLDEN = TESTS / "golden"


fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the native format, in several shards."""
    out = tmp_path_factory.mktemp("packed") / "out"
    compress(tiny("qwen2"), out, None, steps("quant/rtn", bits=3, group_size=16, symmetric=False), max_shard_size="20KB")
    return out


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_packed_checkpoint_reads_like_the_original(checkpoint: Path, tiny: Tiny) -> None:
    original, source, plain = Source.open(tiny("qwen2")), PackedSource.open_packed(checkpoint), Source.open(checkpoint)
    assert (checkpoint / INDEX).exists()
    assert set(source.entries) == set(original.entries)
    assert {n: e.shape for n, e in source.entries.items()} == {n: e.shape for n, e in original.entries.items()}
    assert "quantization_config" not in source.config
    assert source.stored_nbytes == plain.nbytes  # the guard is empty
    assert source.numel == original.numel
    for name in original.entries:
        site = name.removesuffix(".weight")
        if site in source.table:
            assert 0 < (source.tensor(name) - original.tensor(name)).norm() < 0.5 * original.tensor(name).norm()
            assert torch.equal(source.tensor(name), source.compressed(site).dequantize())
        else:
            assert torch.equal(source.tensor(name), original.tensor(name))


def test_what_is_not_in_the_native_format(tiny: Tiny, copied: Path) -> None:
    with pytest.raises(FormatError, match="no quantization_config of compress"):
        PackedSource.open_packed(tiny("qwen2"))
    config = config_of(copied)
    for method in ("gptq", None, 3, ["compress"], {}):
        config["quantization_config"]["quant_method"] = method
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match="no quantization_config of compress"):
            PackedSource.open_packed(copied)


SITE = "model.layers.1.self_attn.q_proj"


GUARD = "model.layers.0.mlp.down_proj.weight"


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of a checkpoint, which gets a single file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load(file)[0]
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save(folder / SINGLE, tensors)
    return folder


def replaced(leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{SITE}.{leaf}": change(tensors[f"{SITE}.{leaf}"])})


def added(leaf: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{SITE}.{leaf}": torch.zeros(32, 32)})


TAMPERED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "codes missing": (lambda tensors: tensors.pop(f"{SITE}.codes"), "codes is missing"),
    "zero missing": (lambda tensors: tensors.pop(f"{SITE}.zero"), "zero is missing"),
    "codes longer": (replaced("codes", lambda t: torch.cat([t, t[:1]])), "codes is I32"),
    "codes shorter": (replaced("codes", lambda t: t[:-1]), "codes is I32"),
    "codes empty": (replaced("codes", lambda t: t[:0]), "codes is I32"),
    "codes as bytes": (replaced("codes", lambda t: t.view(torch.uint8)), "codes is U8"),
    "codes unsigned": (replaced("codes", lambda t: t.view(torch.uint32)), "codes is U32"),
    "codes in rows": (replaced("codes", lambda t: t.view(32, -1)), "codes is I32"),
    "scale in float16": (replaced("scale", lambda t: t.half()), "scale is F16"),
    "scale turned": (replaced("scale", lambda t: t.T.contiguous()), "scale is BF16"),
    "scale a scalar": (replaced("scale", lambda t: t[0, 0]), "scale is BF16"),
    "dense beside packed": (added("weight"), "weight is not described"),
    "another group": (added("group"), "group is not described"),
    "a guard that is full": (lambda tensors: tensors.update({GUARD: torch.ones(4)}), "guard, is not empty"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tensors_that_the_table_does_not_describe(copied: Path, name: str) -> None:
    assert config_of(copied)["quantization_config"]["guard"] == GUARD
    change, expected = TAMPERED[name]
    with pytest.raises(FormatError, match=expected) as caught:
        PackedSource.open_packed(damaged(copied, change))
    assert str(copied) in str(caught.value)


def test_a_bias_of_a_site_is_described_by_nobody(checkpoint: Path) -> None:
    assert f"{SITE}.bias" in PackedSource.open_packed(checkpoint).entries


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(copied: Path, value: float) -> None:
    def poison(scale: torch.Tensor) -> torch.Tensor:
        scale[3, 1] = value
        return scale

    source = PackedSource.open_packed(damaged(copied, replaced("scale", poison)))
    for read in (lambda: source.compressed(SITE), lambda: source.tensor(f"{SITE}.weight")):
        with pytest.raises(CheckpointError, match=f"{SITE}.scale: 1 of 64 values"):
            read()


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_fuzzed_configs_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    folder = checkpoint.with_name("fuzzed")
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
    config = config_of(checkpoint)
    for _ in range(data.draw(st.integers(1, 2))):
        config["quantization_config"] = damage(config["quantization_config"], data)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with quickly(timer=PROCESSOR):
            source = PackedSource.open_packed(folder)
    except CheckpointError as error:
        assert len(str(error)) < 800
        return
    for site in source.table:
        assert source.compressed(site).shape == tuple(source.table[site]["shape"])


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"specs": []},
        {"specs": [{}]},
        {"sites": None},
        {"sites": {"lm_head": 10**9}},
        {"sites": {"model.layers.{0-9999999}": 0}},
        {"guard": 3},
    ],
    ids=str,
)
def test_transformers_gets_the_same_refusal(copied: Path, change: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(copied)
    config["quantization_config"].update(change)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_checkpoints_of_every_version_keep_their_values(version: str) -> None:
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    source = PackedSource.open_packed(GOLDEN / version)
    found = {name: hashlib.sha256(source.tensor(name).numpy().tobytes()).hexdigest() for name in source.entries}
    assert found == expected["sha256"]
    assert sum((GOLDEN / version / name).stat().st_size for name in ("config.json", SINGLE, "expected.json")) < 30_000


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_checkpoints_of_every_version_load_with_transformers(version: str) -> None:
    from transformers import AutoModelForCausalLM

    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / version, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(expected["probe"]), use_cache=False).logits
    # The numbers are written with four digits after the point; sums of 32 products differ by less.
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)


def test_the_first_version_holds_what_its_script_says() -> None:
    source = PackedSource.open_packed(GOLDEN / "v1")
    parts = [source.compressed(site).base for site in source.table]
    assert {part.bits for part in parts} == set(range(1, 9))
    assert {(part.zero is None, part.group is None) for part in parts} == {(a, b) for a in (True, False) for b in (True, False)}
