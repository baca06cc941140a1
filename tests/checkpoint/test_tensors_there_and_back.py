"""Tensors written and read: bit for bit those of the reference, whole or not at all, finite where they must be."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_headers import check

from compress.checkpoint import tensor_file as container
from compress.checkpoint.source import check_finite
from compress.checkpoint.tensor_file import (
    DTYPES,
    Entry,
    copy_entries,
    load,
    read_header,
    read_tensor,
    save,
    stream_entry,
)
from compress.errors import CheckpointError, OutputError

# The same examples each time: a commit does not fail for what another one broke. The folder is shared between them, which is
# fine, since each example writes the whole file.
fuzz = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits, NaN and all; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    octets = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return octets.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def all_bits(found: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: bits(tensor) for name, tensor in found.items()}


SHAPES = ((), (1,), (5,), (0,), (3, 0, 2), (2, 3), (7, 1, 3), (1,) * 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_there_and_back_and_as_the_reference_has_it(tmp_path: Path, dtype: str) -> None:
    written = {f"t{n}": random_tensor(DTYPES[dtype], shape, n) for n, shape in enumerate(SHAPES)}
    save(tmp_path / "ours", written, {"note": "é"})
    found, metadata = load(tmp_path / "ours")
    assert metadata == {"format": "pt", "note": "é"}
    assert all_bits(found) == all_bits(written)
    assert all_bits(safetensors.torch.load_file(tmp_path / "ours")) == all_bits(written)
    safetensors.torch.save_file(written, tmp_path / "theirs", metadata={"format": "pt"})
    assert all_bits(load(tmp_path / "theirs")[0]) == all_bits(written)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ours", "theirs"]


dtype_and_shape = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4).map(tuple))


names_to_tensors = st.dictionaries(st.text(max_size=8).filter(lambda n: n != "__metadata__"), dtype_and_shape, max_size=8)


@settings(fuzz, max_examples=150)
@given(described=names_to_tensors, seed=st.integers(0, 1000))
def test_any_tensors_there_and_back_and_aligned(path: Path, described: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> None:
    written = {name: random_tensor(DTYPES[dtype], shape, seed) for name, (dtype, shape) in described.items()}
    save(path, written)
    entries = check(path)
    assert entries is not None
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())
    assert all_bits(load(path)[0]) == all_bits(written)
    for name, entry in entries.items():
        assert b"".join(stream_entry(entry)) == bits(written[name])[2]
        for index in range(entry.shape[0] if entry.shape else 0):
            assert bits(read_tensor(entry, index)) == bits(written[name][index])


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    written = {"turned": whole.T, "cut": whole[1:3, 2:5], "spread": whole[:, ::2], "wide": whole[0].expand(3, 6)}
    save(tmp_path / "f", written)
    assert all_bits(load(tmp_path / "f")[0]) == all_bits(written)


def test_copies_are_byte_for_byte_from_any_file_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "CHUNK", 7)  # several chunks, and a tail
    first = {name: random_tensor(DTYPES[name], (3, 5), n) for n, name in enumerate(DTYPES)}
    second = {"x": random_tensor(torch.uint8, (3,)), "y": random_tensor(torch.float64, ()), "none": torch.empty(0, 4)}
    save(tmp_path / "first", first)
    save(tmp_path / "second", second)
    chosen = [*read_header(tmp_path / "second")[0].values(), *read_header(tmp_path / "first")[0].values()]
    copy_entries(tmp_path / "both", chosen, {"x": "renamed"}, {"k": "v"})
    found, metadata = load(tmp_path / "both")
    assert metadata == {"format": "pt", "k": "v"}
    assert all_bits(found) == all_bits({**first, "renamed": second["x"], "y": second["y"], "none": second["none"]})
    entries = check(tmp_path / "both")
    assert entries is not None
    assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())


def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path) -> None:
    save(tmp_path / "source", {"a": torch.ones(100), "b": torch.ones(100)})
    entries, _ = read_header(tmp_path / "source")
    os.truncate(tmp_path / "source", (tmp_path / "source").stat().st_size - 100)
    for entry in entries.values():  # the bytes of one are still there, but whose are they?
        with pytest.raises(CheckpointError, match="was changed while it was in use"):
            read_tensor(entry)
        with pytest.raises(CheckpointError, match="was changed while it was in use"):
            list(stream_entry(entry))
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        copy_entries(tmp_path / "copy", entries.values())
    unseen = {name: replace(entry, seen=None) for name, entry in entries.items()}
    assert bits(read_tensor(unseen["a"])) == bits(torch.ones(100))
    for use in (lambda: read_tensor(unseen["b"]), lambda: list(stream_entry(unseen["b"]))):
        with pytest.raises(CheckpointError, match="'b' ends"):
            use()
    (tmp_path / "source").unlink()
    for use in (lambda: read_tensor(entries["a"]), lambda: list(stream_entry(entries["a"]))):
        with pytest.raises(CheckpointError, match="cannot be read"):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), MemoryError()], ids=lambda f: type(f).__name__
)
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, earlier: bool
) -> None:
    path = tmp_path / "file"
    save(tmp_path / "source", {"a": torch.ones(3), "b": torch.zeros(3)})
    entries, _ = read_header(tmp_path / "source")
    (tmp_path / "source").rename(tmp_path.with_name(tmp_path.name + "-source"))
    entries = {
        n: Entry(e.name, e.dtype, e.shape, e.start, e.nbytes, tmp_path.with_name(tmp_path.name + "-source"))
        for n, e in entries.items()
    }
    if earlier:
        path.write_bytes(b"earlier")
    calls = iter([None, failure])

    def fail(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if (raised := next(calls, None)) is not None:
                raise raised
            return real(*args)

        return call

    expected = OutputError if isinstance(failure, OSError) else type(failure)
    monkeypatch.setattr(container, "bytes_of", fail(container.bytes_of))
    with pytest.raises(expected):
        save(path, {"a": torch.ones(3), "b": torch.zeros(3)})
    calls = iter([None, failure])
    monkeypatch.setattr(container, "stream_entry", fail(container.stream_entry))
    with pytest.raises(expected):
        copy_entries(path, entries.values())
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if earlier else [])
    assert not earlier or path.read_bytes() == b"earlier"


FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_values_are_finite_although_their_sum_is_not(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_finite(torch.full((64, 64), largest, dtype=torch.float64).to(dtype), "place")
    check_finite(torch.tensor([largest, -largest] * 500, dtype=torch.float64).to(dtype), "place")
    check_finite(torch.empty(0, 4).to(dtype), "place")
    check_finite(torch.tensor(largest, dtype=torch.float64).to(dtype), "place")


# float8_e4m3fn has no infinities.
SPECIAL = [(dtype, value) for dtype in FLOATS for value in (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, v in SPECIAL if math.isnan(v) or d != torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("fill", [0.0, 1.0, "max"])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, fill: float | str) -> None:
    full = torch.finfo(dtype).max if fill == "max" else fill
    tensor = torch.full((31, 33), full, dtype=torch.float64)
    tensor[30, 32] = value
    with pytest.raises(CheckpointError, match=r"^place: 1 of 1023 values"):
        check_finite(tensor.to(dtype), "place")
    tensor[0, 0] = -value
    with pytest.raises(CheckpointError, match="2 of 1023"):
        check_finite(tensor.to(dtype), "place")
