"""Folders with indexes, pickles and configs that others wrote."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import quickly
from raw_folders import CONFIG, HALVES, LAST, LLAMA, MAP, checkpoint, folder_refusal
from raw_headers import anything

from compress.architecture.inventory import take_inventory
from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import (
    load,
    save,
)
from compress.errors import CheckpointError
from compress.model.detect import find_family

# The same examples each time: a commit does not fail for what another one broke. The folder is shared between them, which is
# fine, since each example writes the whole file.
fuzz = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_whole_and_cut_and_linked_folders_are_read(tmp_path: Path) -> None:
    whole = Source.open(checkpoint(tmp_path / "whole"))
    cut = Source.open(checkpoint(tmp_path / "cut", files=HALVES))
    cached = tmp_path / "models--org--name"  # as the Hub's cache has it
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "blobs").mkdir()
    for number, file in enumerate((tmp_path / "cut").iterdir()):
        shutil.copyfile(file, cached / "blobs" / f"{number}")
        (cached / "snapshots" / "0" / file.name).symlink_to(f"../../blobs/{number}")
    linked = Source.open(cached / "snapshots" / "0")
    assert set(whole.entries) == set(cut.entries) == set(linked.entries) == set(LLAMA)
    assert whole.numel == cut.numel == sum(math.prod(shape) for shape in LLAMA.values())
    assert whole.nbytes == 4 * whole.numel
    assert torch.equal(linked.tensor(LAST), torch.ones(LLAMA[LAST]))
    assert Source.open(str(tmp_path / "whole")).folder == whole.folder
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        whole.tensor("other")


@pytest.mark.parametrize(
    "file",
    [
        "../two.safetensors",
        "/etc/two.safetensors",
        "sub/two.safetensors",
        "./two.safetensors",
        "..\\two.safetensors",
        "C:\\two.safetensors",
        "two.safetensors/",
        "two.safetensors\0",
        "\0.safetensors",
        "two\n.safetensors",
        "\ud800.safetensors",
        "a" * 5000 + ".safetensors",
        "two.bin",
        "two.safetensors.bin",
        *("", ".", "..", None, 3, True, ["two.safetensors"], {"two.safetensors": 1}),
    ],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, file: Any) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "two.safetensors", {LAST: torch.ones(LLAMA[LAST])})
    folder = checkpoint(tmp_path / "model", files=HALVES, index={"weight_map": {**MAP, LAST: file}})
    (folder / "sub").symlink_to(tmp_path / "sub")
    message = folder_refusal(folder)
    assert "Do not use" in message or file == "\ud800.safetensors"


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"\xff", b"{", b"[" * 100_000, b'{"weight_map": NaN}', b'{"weight_map": {"\\ud800": "one.safetensors"}}'),
        *([], None, "x", {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "one"}),
    ],
)
def test_an_index_that_is_no_index(tmp_path: Path, index: Any) -> None:
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    folder_refusal(checkpoint(tmp_path, files=HALVES, index=content))


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({name: file for name, file in MAP.items() if name != LAST}, "does not place there"),
        ({**MAP, LAST: "one.safetensors"}, "does not place there"),
        ({**MAP, "more": "one.safetensors"}, "no file holds"),
        ({**MAP, "m" * 10_000: "one.safetensors"}, "no file holds"),
        ({**MAP, "more": "three.safetensors"}, "three.safetensors: not found"),
    ],
)
def test_an_index_and_headers_that_disagree(tmp_path: Path, weight_map: dict[str, str], expected: str) -> None:
    folder_refusal(checkpoint(tmp_path, files=HALVES, index={"weight_map": weight_map}), expected)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path, files={"one.safetensors": [*HALVES["one.safetensors"], LAST], "two.safetensors": HALVES["two.safetensors"]}
    )
    folder_refusal(folder, "does not place there")


def test_a_damaged_file_among_several(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, files=HALVES)
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-1])
    assert "two.safetensors" in folder_refusal(folder, "within the")
    (folder / "two.safetensors").unlink()
    folder_refusal(folder, "not found")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, pickle: str) -> None:
    checkpoint(tmp_path, files={})
    (tmp_path / INDEX).unlink()
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    message = folder_refusal(tmp_path)
    assert pickle in message
    assert "save_pretrained" in message
    assert "Source" not in message
    assert len(Source.open(checkpoint(tmp_path)).entries) == len(LLAMA)  # beside safetensors they do not matter


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    folder_refusal(tmp_path, "config.json: not found")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder_refusal(tmp_path, "neither model.safetensors nor")
    save(tmp_path / SINGLE, {})
    folder_refusal(tmp_path, "no tensors")


@pytest.mark.parametrize(
    "name",
    ["/no/such/folder", "./no", "~nobody-of-this-name/x", "no/such/thing", "a" * 5000, "a\0b", "-", "no-such-model", "a//b", "é"],
)
def test_names_that_lead_nowhere(name: str) -> None:
    with quickly(20.0), pytest.raises(CheckpointError, match="give the folder of a checkpoint"):
        Source.open(name)


def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    checkpoint(tmp_path / "inner" / "model")
    (tmp_path / "inner").chmod(0)
    try:
        if os.access(tmp_path / "inner", os.R_OK):
            pytest.skip("root may read everything")
        with pytest.raises(CheckpointError):
            Source.open(tmp_path / "inner" / "model")
    finally:
        (tmp_path / "inner").chmod(0o700)


@pytest.mark.parametrize(
    "config", [b"", b"\xff\xfe{}", b"{", b"[" * 100_000, b"[]", b"null", b"3", b'"x"', b'{"a": "\\ud800"}', b"9" * 5000]
)
def test_a_config_that_is_no_object(tmp_path: Path, config: bytes) -> None:
    assert "config.json" in folder_refusal(checkpoint(tmp_path, config))


def claimed(folder: Path) -> int:
    source = Source.open(folder)
    return len(take_inventory(source, find_family(source)).sites)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": n} for n in ("3", -1, 0, 1e9, 10**9, 10**18, 10**4000, None, True, [1], {}, 1.0, float("nan"))]
    + [{"n_layer": n} for n in (10**9, True)]
    + [{"text_config": {"num_hidden_layers": 10**9}}]
    + [{"model_type": m} for m in (None, 3, [], ["llama"], {"llama": 1}, "", "no such", "../llama", "x" * 10_000)]
    + [{"quantization_config": q} for q in ([], "x", 3, True)],
    ids=lambda change: f"{change}"[:60],
)
def test_a_config_with_other_things_than_expected(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, {**CONFIG, **change})
    # A model_type that is not known may be looked up in transformers, whose import takes its time.
    limits = {"seconds": 60.0} if "model_type" in change else {"nbytes": 4 << 20}
    with quickly(**limits), pytest.raises(CheckpointError):
        claimed(folder)


@pytest.mark.parametrize("left_over", [{}, {"quant_method": 3}, {"quant_method": ["gptq"]}, {"quant_method": "gptq"}])
def test_a_quantization_config_over_plain_weights_is_left_over(tmp_path: Path, left_over: dict[str, Any]) -> None:
    assert claimed(checkpoint(tmp_path / "with", {**CONFIG, "quantization_config": left_over})) == claimed(
        checkpoint(tmp_path / "without", CONFIG)
    )


def test_a_config_that_says_nothing_of_blocks(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="num_hidden_layers is None"):
        claimed(folder)


def test_a_config_with_nothing_for_a_quantization(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {**CONFIG, "quantization_config": None, "other": [None, {"deep": 1e300}]})
    assert claimed(folder) == 8
    assert "quantization_config" not in Source.open(folder).config


keys = st.sampled_from(
    ["num_hidden_layers", "n_layer", "text_config", "quantization_config", "tie_word_embeddings", "hidden_size"]
)


@settings(fuzz, max_examples=200)
@given(changes=st.dictionaries(keys, anything, max_size=3))
def test_fuzzed_configs(path: Path, changes: dict[str, Any]) -> None:
    folder = checkpoint(
        path.parent / "model", {**CONFIG, **changes}, None if not (path.parent / "model").exists() else {SINGLE: list(LLAMA)}
    )
    try:
        with quickly(60.0):
            assert claimed(folder) > 0
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_a_source_refuses_values_that_are_not_finite(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    tensors, _ = load(folder / SINGLE)
    tensors[LAST][3, 1] = float("nan")
    tensors["counts"] = torch.tensor([2**62, 2**62, 2**62])  # integers are not summed
    save(folder / SINGLE, tensors)
    source = Source.open(folder)
    with pytest.raises(CheckpointError, match=f"{LAST}: 1 of 32 values"):
        source.tensor(LAST)
    with pytest.raises(CheckpointError, match="1 of 4 values"):
        source.tensor(LAST, 3)
    assert torch.equal(source.tensor(LAST, 2), torch.ones(4))
    assert torch.equal(source.tensor("counts"), tensors["counts"])
