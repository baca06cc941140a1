"""The second reader gives bit for bit what the first gives, for every kind of part, and knows every format that there is."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.sparse import drawn as drawn_sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masks import BASES as MASKED
from masks import MASKS, pruned
from places import TESTS
from thorough import times
from weights import random_weight

from compress import registry
from compress.checkpoint import packing
from compress.checkpoint.packing import digest as _digest
from compress.checkpoint.tensor_file import save
from compress.errors import CheckpointError, FormatError
from compress.verify import raw_files as stored_module
from compress.verify import second_reader as independent
from compress.verify.raw_files import Stored, header, open_stored
from compress.weights.low_rank import LowRank
from compress.weights.site_input import SiteInput
from compress.weights.sparse import Sparse
from compress.weights.weight import ROLES, CompressedWeight
from examples import input as inputs
from examples import low_rank

FORMATS = registry.names("formats")
BASES = [name for name in FORMATS if "base" in registry.lookup("formats", name).roles]
GOLDEN = TESTS / "golden" / "v1"
law = settings(
    max_examples=times(15, 60), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stored(folder: Path, weight: CompressedWeight, site: str = "a.b") -> Stored:
    tensors, spec = packing.pack(weight)
    save(folder / "model.safetensors", {f"{site}.{leaf}": tensor for leaf, tensor in tensors.items()})
    return Stored(folder, header(folder / "model.safetensors"), {site: spec})


def decoded(folder: Path, weight: CompressedWeight) -> np.ndarray[Any, Any]:
    return np.concatenate(list(independent.decode(stored(folder, weight), "a.b")))


def same(weight: CompressedWeight, values: np.ndarray[Any, Any]) -> bool:
    expected = weight.dequantize().numpy()
    return values.dtype == np.float32 and values.shape == expected.shape and values.tobytes() == expected.tobytes()


def test_it_knows_every_format() -> None:
    assert set(independent.DECODERS) == set(FORMATS)


def test_it_knows_every_role() -> None:
    assert independent.ROLES == ROLES


def test_it_imports_nothing_that_packs() -> None:
    text = inspect.getsource(stored_module) + inspect.getsource(independent)
    assert "torch" not in text
    own = {line for line in text.splitlines() if "compress" in line and "import" in line}
    assert own == {
        "from compress.errors import CheckpointError",
        "from compress.system.side_files import open_regular, parse_json, read_json",  # bounds, and nothing of the format
        "from compress.verify.raw_files import SIZES, Bytes, Place, Stored, read_bytes",
    }


@pytest.mark.parametrize("name", BASES)
def test_fixed_examples(name: str, tmp_path: Path) -> None:
    parts = list(importlib.import_module(f"examples.{name}").fixed())
    for part in parts[:: max(1, len(parts) // 60)]:
        weight = CompressedWeight(part)
        assert same(weight, decoded(tmp_path, weight)), packing.pack(weight)[1]


@pytest.mark.parametrize("name", BASES)
def test_drawn_examples(name: str, tmp_path: Path) -> None:
    @law
    @given(importlib.import_module(f"examples.{name}").drawn())
    def check(part: Any) -> None:
        weight = CompressedWeight(part)
        assert same(weight, decoded(tmp_path, weight))

    check()


@law
@given(part=drawn_sparse(), seed=st.integers(0, 99))
def test_outliers_are_added(part: Sparse, seed: int, tmp_path: Path) -> None:
    weight = CompressedWeight(random_weight(*part.shape, bits=3, group_size=-1, seed=seed).base, part)
    assert same(weight, decoded(tmp_path, weight))


@pytest.mark.parametrize("base_kind", MASKED)
@pytest.mark.parametrize("mask_kind", MASKS)
def test_pruned_weights(base_kind: str, mask_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(independent, "_SLAB", 1)  # rows of which the stream of what is kept does not begin at 0
    for rows in (1, 33, 97):
        weight = pruned(base_kind, mask_kind, rows)
        assert same(weight, decoded(tmp_path, weight))


def test_factors_are_multiplied_and_their_own_values_are_in_the_digest(tmp_path: Path) -> None:
    for part in low_rank.fixed():
        weight = CompressedWeight(random_weight(*part.shape, bits=3, group_size=-1).base, low_rank=part)
        np.testing.assert_allclose(decoded(tmp_path, weight), weight.dequantize().numpy(), rtol=1e-5, atol=1e-5)
        assert independent.digest(stored(tmp_path, weight), "a.b") == _digest(weight)
        other = CompressedWeight(weight.base, low_rank=LowRank(part.left, -part.right))
        assert _digest(other) != _digest(weight)


@pytest.mark.parametrize("name", BASES)
def test_a_transform_of_the_input_is_multiplied_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where the order of operations is fixed; sums of Kronecker products come in any."""
    monkeypatch.setattr(independent, "_SLAB", 1)
    parts = list(importlib.import_module(f"examples.{name}").fixed())
    for number, part in enumerate(parts[:: max(1, len(parts) // 12)]):
        columns = part.shape[1]
        block = columns & -columns
        where = torch.rand(part.shape, generator=torch.Generator().manual_seed(number)) < 0.1
        outliers = Sparse.of(torch.randn(part.shape, generator=torch.Generator().manual_seed(number)), where)
        for kind in inputs.KINDS:
            dtype = inputs.DTYPES[number % 3]
            weight = CompressedWeight(part, outliers, input=SiteInput(columns, inputs.transform(kind, columns, block, dtype)))
            found = decoded(tmp_path, weight)
            if kind == "kronecker":
                np.testing.assert_allclose(found, weight.dequantize().numpy(), rtol=1e-4, atol=1e-4)
            else:
                assert same(weight, found), (kind, packing.pack(weight)[1])
            assert independent.digest(stored(tmp_path, weight), "a.b") == _digest(weight)


def test_all_that_is_done_to_an_input_is_in_the_digest(tmp_path: Path) -> None:
    base, seen = random_weight(5, 96, 4, 32).base, set()
    parts = [part for part in inputs.fixed() if part.columns == 96]
    for part in parts:
        weight = CompressedWeight(base, input=part)
        assert independent.digest(stored(tmp_path, weight), "a.b") == _digest(weight)
        seen.add(_digest(weight))
    assert len(seen) == len(parts) > 40


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_slabs_of_rows_join(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(independent, "_SLAB", 1)
    weight = random_weight(75, 40, bits, 8, zero=True, desc_act=True)
    files = stored(tmp_path, weight)
    pieces = list(independent.decode(files, "a.b"))
    assert [len(piece) for piece in pieces] == [32, 32, 11]
    assert same(weight, np.concatenate(pieces))
    for name in BASES:
        part = max(importlib.import_module(f"examples.{name}").fixed(), key=lambda part: part.shape[0])
        assert same(CompressedWeight(part), decoded(tmp_path, CompressedWeight(part)))


def test_a_golden_checkpoint_of_version_1() -> None:
    from compress.checkpoint.packed_source import PackedSource

    files, source = open_stored(GOLDEN), PackedSource.open_packed(GOLDEN)
    assert files.sites == source.table
    for site in files.sites:
        assert same(source.compressed(site), np.concatenate(list(independent.decode(files, site))))


def test_e4m3_of_all_bytes() -> None:
    raw = torch.arange(256, dtype=torch.uint8)
    numbers = (raw & 127) != 127
    expected = raw.view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(independent.e4m3(raw.numpy()))[numbers], expected[numbers])


def test_an_unknown_format_is_told_apart(tmp_path: Path) -> None:
    files = stored(tmp_path, random_weight(4, 8, 4, 8))
    files.sites["a.b"]["base"]["format"] = "from the future"
    with pytest.raises(independent.UnknownFormatError, match="from the future"):
        independent.digest(files, "a.b")


def test_a_reader_of_before_refuses_inputs_by_the_name_of_their_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = SiteInput(8, inputs.transform("hadamard", 8, 8, torch.float32))
    files = stored(tmp_path, CompressedWeight(random_weight(4, 8, 4, 8).base, input=part))
    monkeypatch.setattr(independent, "ROLES", ROLES[:-1])
    monkeypatch.setattr(packing, "ROLES", ROLES[:-1])
    with pytest.raises(independent.UnknownFormatError, match="has the part 'input'"):
        independent.digest(files, "a.b")
    with pytest.raises(FormatError, match=r"has the parts \['base', 'input'\]; expected base.* Written by a newer compress"):
        packing.layout(files.sites["a.b"])


def test_what_is_cut_or_missing(tmp_path: Path) -> None:
    files = stored(tmp_path, random_weight(4, 8, 4, 8))
    del files.tensors["a.b.scale"]
    with pytest.raises(CheckpointError, match=r"no tensor a\.b\.scale"):
        independent.digest(files, "a.b")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="fill the file"):
        header(path)
