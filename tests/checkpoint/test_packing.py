"""Packed sites as named tensors, in memory and in the file of a block."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import PROCESSOR, quickly

from compress.checkpoint import packing
from compress.checkpoint.block_file import read_block_file, specs_of, write_block_file
from compress.checkpoint.tensor_file import read_header, save
from compress.errors import FormatError
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight


def weight(
    rows: int = 32, columns: int = 64, bits: int = 3, size: int = 16, zero: bool = True, seed: int = 0
) -> CompressedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // size

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)

    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    return CompressedWeight(Uniform(codes(rows, columns), scale, bits, size, codes(rows, groups) if zero else None))


def test_a_weight_there_and_back() -> None:
    for bits in range(1, 9):
        original = weight(bits=bits)
        tensors, described = packing.pack(original)
        assert packing.layout(described).keys() == tensors.keys() == {"codes", "scale", "zero"}
        back = packing.unpack(json.loads(json.dumps(described)), {**tensors, "other": torch.empty(0)})
        assert torch.equal(back.dequantize(), original.dequantize())
        assert back.stored_bits == original.stored_bits == 8 * sum(tensor.nbytes for tensor in tensors.values())


def test_only_known_parts_and_formats_are_read() -> None:
    tensors, described = packing.pack(weight())
    for changed in (
        {**described, "outliers": described["base"]},
        {"shape": described["shape"]},
        {**described, "base": None},
        {**described, "base": [1]},
        {**described, "base": {**described["base"], "format": "codebook"}},
        {**described, "base": {**described["base"], "format": "_bits"}},
        {**described, "base": {**described["base"], "format": ["bitpack"]}},
        {**described, "base": {key: value for key, value in described["base"].items() if key != "format"}},
        {key: value for key, value in described.items() if key != "shape"},
        {**described, "shape": [32, 65]},
        {**described, "shape": [True, 64]},
        {**described, "shape": [2**31, 64]},
        {**described, "shape": [10**4000, 10**4000]},
    ):
        for use in (
            lambda c=changed: packing.layout(c),
            lambda c=changed: packing.unpack(c, tensors),
            lambda c=changed: packing.unpack_rows(c, tensors, 0, 16),
        ):
            with quickly(timer=PROCESSOR), pytest.raises(FormatError):
                use()
    with pytest.raises(FormatError, match="no format stores"):
        packing.pack(SimpleNamespace(shape=(1, 1), parts={"base": "no part"}))  # type: ignore[arg-type]


def test_a_block_file_there_and_back(tmp_path: Path) -> None:
    weights = {f"model.layers.0.{n}": weight(bits=bits, seed=bits) for n, bits in (("a_proj", 2), ("b_proj", 5))}
    tensors, specs = {}, {}
    for site, value in weights.items():
        mine, specs[site] = packing.pack(value)
        tensors |= {f"{site}.{leaf}": tensor for leaf, tensor in mine.items()}
    write_block_file(tmp_path / "part", tensors, specs)
    found = dict(read_block_file(tmp_path / "part"))
    assert list(found) == list(weights)
    assert all(torch.equal(found[site].dequantize(), weights[site].dequantize()) for site in weights)
    assert specs_of(read_header(tmp_path / "part")[1]) == specs


@pytest.mark.parametrize(
    "metadata", [{}, {"sites": ""}, {"sites": "{"}, {"sites": "[]"}, {"sites": '{"a": 3}'}, {"sites": "[" * 10**5}]
)
def test_a_block_file_without_its_descriptions(tmp_path: Path, metadata: dict[str, str]) -> None:
    save(tmp_path / "part", {"a.codes": torch.zeros(1)}, metadata)
    with pytest.raises(FormatError, match="a part"):
        list(read_block_file(tmp_path / "part"))


def test_a_block_file_without_its_tensors(tmp_path: Path) -> None:
    tensors, described = packing.pack(weight())
    write_block_file(
        tmp_path / "part", {f"a.{leaf}": tensor for leaf, tensor in tensors.items() if leaf != "zero"}, {"a": described}
    )
    with pytest.raises(FormatError, match=r"no tensor 'a\.zero'"):
        list(read_block_file(tmp_path / "part"))
    write_block_file(
        tmp_path / "part", {f"a.{leaf}": tensor for leaf, tensor in tensors.items()}, {"a": {**described, "shape": [32, 32]}}
    )
    with pytest.raises(FormatError, match="codes"):
        list(read_block_file(tmp_path / "part"))
