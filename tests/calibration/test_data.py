"""Calibration windows: against a reference written from the rules, from ids and from text; the tokenizer; the data section."""

from __future__ import annotations

import hashlib
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compress.calibration import data as data_module
from compress.calibration import documents
from compress.calibration.data import fingerprint, load_ids
from compress.errors import CalibrationError
from compress.recipe.data import Data

EOS = 0


# --- the data section


def test_defaults_and_frozen() -> None:
    data = Data(name="wikitext2")
    assert (data.samples, data.length, data.seed, data.chat_template) == (256, 2048, 0, None)
    with pytest.raises(ValidationError):
        data.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 0},
        {"length": 1},
        {"seed": -1},
        {"seed": 2**63},
        {"name": ""},
        {"sample": 3},
        {"samples": 2.5},
        {"chat_template": "x"},
    ],
)
def test_data_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Data(**{"name": "c4", **settings})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("a.npy", "column", "x"),
        ("a.TXT", "column", "x"),
        ("a.npy", "chat_template", True),
        ("a.jsonl", "split", "x"),
        ("a.parquet", "config", "x"),
    ],
)
def test_settings_that_would_be_ignored(name: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"`{field}` means nothing for a \\{Path(name).suffix.lower()} file"):
        Data(name=name, **{field: value})  # type: ignore[arg-type]


def test_recipe_data_is_light() -> None:
    code = (
        "import sys, compress.recipe.data; print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- windows


@pytest.mark.parametrize(("model", "between"), [("plain", [EOS]), ("bos-only", [1]), ("bare", [])])
@pytest.mark.parametrize("seed", [0, 7])
def test_windows_are_slices_of_the_joined_documents(
    tmp_path: Path, models: dict[str, Path], model: str, between: list[int], seed: int, lab: Any
) -> None:
    texts = lab.sentences(60)
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    ids = lab.load(path, models[model], samples=9, length=31, seed=seed)
    assert ids.shape == (9, 31) and ids.dtype == torch.int64 and ids.is_contiguous()
    np.testing.assert_array_equal(ids.numpy(), lab.reference(models[model], texts, 9, 31, seed, between))


def test_a_tokenizer_that_puts_bos_first_does_so_in_every_window(tmp_path: Path, models: dict[str, Path], lab: Any) -> None:
    texts = lab.sentences(60)
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    ids = lab.load(path, models["bos"], samples=8, length=33)
    assert (ids[:, 0] == 1).all()
    np.testing.assert_array_equal(ids[:, 1:].numpy(), lab.reference(models["bos"], texts, 8, 32, 0, [EOS]))
    assert not (ids[:, 1:] == 1).any()


def test_a_prefix_needs_room(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": "x"}])
    monkeypatch.setattr(data_module, "_prefix", lambda *_: [1, 2])
    assert "length: 2, but the tokenizer puts 2 tokens before a text; use 3 or more" in lab.error(path, models["bos"], length=2)


def test_same_seed_same_windows_other_seed_others(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in lab.sentences(60)])
    first, again, other = (lab.load(path, plain, samples=8, length=32, seed=seed) for seed in (3, 3, 4))
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_batches_and_the_pool_do_not_change_the_windows(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any
) -> None:
    texts = lab.sentences(80)
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    expected = lab.reference(plain, texts, 3, 40, 0, [EOS])
    for size in (1, 100, 1 << 20):
        monkeypatch.setattr(data_module, "BATCH", size)
        np.testing.assert_array_equal(lab.load(path, plain, samples=3, length=40).numpy(), expected)


def test_tokenising_stops_when_there_is_enough(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in lab.sentences(500)])
    monkeypatch.setattr(data_module, "BATCH", 200)
    seen = 0
    read = data_module.rows

    def counted(*arguments: Any) -> Iterator[documents.Row]:
        nonlocal seen
        for row in read(*arguments):
            seen += 1
            yield row

    monkeypatch.setattr(data_module, "rows", counted)
    lab.load(path, plain, samples=2, length=20)
    assert 0 < seen < 20


def test_length_follows_the_model_unless_given(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in lab.sentences(60)])
    assert lab.load(path, plain, samples=4, max_length=48).shape == (4, 48)
    assert lab.load(path, plain, samples=4, length=48, max_length=48).shape == (4, 48)
    message = lab.error(path, plain, samples=4, length=49, max_length=48)
    assert "data.length: 49 tokens" in message and "context is 48" in message and "use 48 or less" in message


def test_too_little_text_says_what_would_do(tmp_path: Path, models: dict[str, Path], lab: Any) -> None:
    texts = lab.sentences(20)
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    tokens = sum(len(lab.encode(models["plain"], text)) for text in texts) + len(texts) - 1
    message = lab.error(path, models["plain"], samples=100, length=64)
    assert f"has {tokens:,} tokens" in message and "100 samples x 64 tokens need 6,400" in message
    assert f"samples: {tokens // 64} (at length 64)" in message and f"length: {tokens // 100} (at 100 samples)" in message
    assert lab.load(path, models["plain"], samples=tokens // 64, length=64).shape[0] == tokens // 64
    assert lab.load(path, models["plain"], samples=100, length=tokens // 100).shape[1] == tokens // 100
    # With a prefix of one token, a window takes one less from the text.
    message = lab.error(path, models["bos"], samples=100, length=65)
    assert f"length: {tokens // 100 + 1} (at 100 samples)" in message and f"samples: {tokens // 64} (at length 65)" in message
    assert lab.load(path, models["bos"], samples=100, length=tokens // 100 + 1).shape[1] == tokens // 100 + 1
    message = lab.error(path, models["plain"], samples=10**6, length=10**6)
    assert message.endswith("; use more text")


def test_ids_outside_the_vocabulary(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in lab.sentences(60)])
    message = lab.error(path, plain, samples=4, length=32, vocabulary=50)
    assert "is outside the model's vocabulary of 50" in message and str(plain) in message


def test_fingerprint() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 70000]])
    raw = np.array([2, 3], dtype="<i8").tobytes() + np.array([1, 2, 3, 4, 5, 70000], dtype="<i4").tobytes()
    assert fingerprint(ids) == hashlib.sha256(raw).hexdigest()
    assert fingerprint(ids) != fingerprint(ids.reshape(3, 2))
    assert fingerprint(ids.T) == fingerprint(ids.T.contiguous())


def test_what_was_drawn_is_logged(tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in lab.sentences(60)])
    with caplog.at_level(logging.INFO, logger="compress"):
        lab.load(path, plain, samples=4, length=32)
    assert f"{path}: drew 4 of 16 windows of 32 tokens" in caplog.text
    assert "longer than the specified maximum" not in caplog.text


# --- token ids


@pytest.fixture
def npy(tmp_path: Path) -> Callable[..., Path]:
    def write(values: Any, **settings: Any) -> Path:
        np.save(tmp_path / "ids.npy", values, **settings)
        return tmp_path / "ids.npy"

    return write


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.int64, np.uint64, ">i4"])
def test_npy_is_taken_as_it_is(npy: Callable[..., Path], kind: Any, lab: Any) -> None:
    values = np.random.default_rng(0).integers(0, 400, (12, 20)).astype(kind)
    nowhere = Path("no-such-model")  # ids need no tokenizer
    ids = lab.load(npy(values), nowhere)
    assert ids.dtype == torch.int64
    np.testing.assert_array_equal(ids.numpy(), values)
    np.testing.assert_array_equal(lab.load(npy(np.asfortranarray(values)), nowhere).numpy(), values)
    np.testing.assert_array_equal(lab.load(npy(values), nowhere, max_length=16).numpy(), values[:, :16])
    np.testing.assert_array_equal(lab.load(npy(values), nowhere, samples=12, length=5).numpy(), values[:, :5])
    np.testing.assert_array_equal(lab.load(npy(values), nowhere, samples=12, length=20).numpy(), values)


def test_npy_subset_is_drawn_and_keeps_the_order(npy: Callable[..., Path], lab: Any) -> None:
    values = np.arange(300).reshape(30, 10)
    path = npy(values)
    subsets = [lab.load(path, Path(), samples=7, seed=seed).numpy() for seed in (0, 0, 1)]
    np.testing.assert_array_equal(subsets[0], subsets[1])
    assert not np.array_equal(subsets[0], subsets[2])
    rows = subsets[0][:, 0] // 10
    assert len(set(rows)) == 7 and (np.diff(rows) > 0).all() and not np.array_equal(rows, np.arange(7))
    np.testing.assert_array_equal(subsets[0], values[rows])


def test_npy_that_is_too_small(npy: Callable[..., Path], lab: Any) -> None:
    path = npy(np.zeros((4, 10), dtype=np.int32))
    message = lab.error(path, Path(), samples=5, length=8)
    assert "has 4 rows of 10 ids, expected at least 5 x 8; use samples: 4 and length: 8" in message
    assert "expected at least 4 x 11" in lab.error(path, Path(), length=11)
    assert "context is 8" in lab.error(path, Path(), length=10, max_length=8)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((2, 3), dtype=np.float32), "got shape (2, 3) of float32"),
        (np.full((2, 3), np.nan), "of float64"),
        (np.zeros((2, 3), dtype=bool), "of bool"),
        (np.zeros((2, 3), dtype=[("a", "<i4")]), "got shape (2, 3)"),
        (np.zeros(6, dtype=np.int32), "got shape (6,)"),
        (np.zeros((1, 2, 3), dtype=np.int32), "got shape (1, 2, 3)"),
        (np.zeros((0, 3), dtype=np.int32), "expected at least one row"),
        (np.zeros((3, 1), dtype=np.int32), "at least two ids"),
        (np.array([[1, 2, 3], [4, 400, 5]]), "id 400 in window 1 at position 1 is outside the model's vocabulary of 400"),
        (np.array([[1, 2, -1], [4, 5, 6]]), "id -1 in window 0 at position 2"),
        (np.array([[1, 2**63 + 1]], dtype=np.uint64), f"id {2**63 + 1}"),
    ],
)
def test_npy_that_holds_no_ids(npy: Callable[..., Path], values: Any, said: str, lab: Any) -> None:
    message = lab.error(npy(values), Path())
    assert said in message and "ids.npy" in message


def header(shape: str) -> bytes:
    return (
        b"\x93NUMPY\x01\x00\x76\x00"
        + f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode()
        + b"\n"
    )


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello hello",
        pickle.dumps([1, 2]),
        header("(4, 10)")[:60],
        header("(4, 10)") + bytes(100),
        header("(4294967296, 4294967296)") + bytes(160),
        header("(1000000000, 1000000000000)") + bytes(160),
        header("(18446744073709551620, 10)") + bytes(160),
        header("(-1, 10)") + bytes(160),
        header("((4, 10)") + bytes(160),
        header("(4.0, 10)") + bytes(160),
    ],
    ids=["empty", "text", "pickle", "cut-header", "cut-data", "wraps", "huge", "overflow", "negative", "unbalanced", "float"],
)
def test_npy_that_is_mangled(tmp_path: Path, raw: bytes, lab: Any) -> None:
    (tmp_path / "ids.npy").write_bytes(raw)
    message = lab.error(tmp_path / "ids.npy", Path())
    assert "ids.npy: cannot be read (" in message and "expected a two-dimensional array of integers" in message
    assert "allow_pickle" not in message


def test_npy_that_is_an_archive_or_objects(tmp_path: Path, npy: Callable[..., Path], lab: Any) -> None:
    assert "cannot be read" in lab.error(npy(np.array([[{}, 1]], dtype=object), allow_pickle=True), Path())
    np.savez(tmp_path / "a.npz", ids=np.zeros((2, 2)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "is an archive" in lab.error(tmp_path / "a.npy", Path())


# --- the tokenizer


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "tokenizer cannot be loaded"),
        ({"config.json": '{"model_type": "gpt2"}'}, "has no tokenizer"),
        ({"config.json": '{"model_type": "llama"}', "tokenizer.json": "{"}, "tokenizer cannot be loaded"),
        (
            {"config.json": '{"model_type": "llama"}', "tokenizer.json": '{"added_tokens": [], "model": 3}'},
            "tokenizer cannot be loaded",
        ),
        (
            {"config.json": '{"model_type": "llama"}', "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'},
            "tokenizer cannot be loaded",
        ),
    ],
    ids=["none", "made-up", "cut", "mangled", "code"],
)
def test_models_without_a_tokenizer(tmp_path: Path, files: dict[str, str], said: str, lab: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": "x"}])
    message = lab.error(path, folder)
    assert said in message and str(folder) in message and "ids.npy" in message


def test_a_measurement_takes_the_windows_that_there_are(plain: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a window of some words, again and again. " * 60)
    data = Data(name=str(text), length=16)
    with pytest.raises(CalibrationError, match="samples"):
        load_ids(data, plain, 10**6, None)
    ids = load_ids(data, plain, 10**6, None, fewer=True)
    assert 1 <= ids.shape[0] < data.samples
    with pytest.raises(CalibrationError, match="samples"):  # a number that was asked for is taken at its word
        load_ids(Data(name=str(text), length=16, samples=500), plain, 10**6, None, fewer=True)
