"""Documents from local files and from the Hub: every kind of source, every way to go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.calibration import documents
from compress.calibration.data import POOL
from compress.recipe.data import PRESETS, SUFFIXES, Data

EOS = 0


# --- local text


def test_txt_is_one_text(tmp_path: Path, plain: Path, lab: Any) -> None:
    text = "\n\n".join(lab.sentences(40))
    (tmp_path / "book.TXT").write_bytes(b"\xef\xbb\xbf" + text.encode())
    ids = lab.load(tmp_path / "book.TXT", plain, samples=5, length=64)
    np.testing.assert_array_equal(ids.numpy(), lab.reference(plain, [text], 5, 64, 0, [EOS]))


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n", " ", "€"])
def test_a_large_txt_is_cut_between_paragraphs(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, end: str, lab: Any
) -> None:
    """Every byte is read once and none is lost, whatever there is to cut at."""
    monkeypatch.setattr(documents, "PIECE", 1000)
    text = end.join(lab.sentences(60)) if end != "€" else "€" * 3000
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    order = torch.randperm
    monkeypatch.setattr(documents.torch, "randperm", lambda count, generator: torch.arange(count))
    pieces = [str(row.value) for row in documents.rows(path, Data(name=str(path)), torch.Generator())]
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(1000 <= len(piece.encode()) <= 2000 for piece in pieces[:-1])
    if end in ("\n", "\n\n", "\r\n\r\n"):
        assert all(piece.endswith(end) and piece.startswith("Note") for piece in pieces[:-1])
        monkeypatch.setattr(documents.torch, "randperm", order)
        ids = lab.load(path, plain, samples=5, length=64, seed=2)
        np.testing.assert_array_equal(ids.numpy(), lab.reference(plain, pieces, 5, 64, 2, [EOS]))


def test_text_that_is_not_utf8(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc\xff def")
    assert "text.txt: byte 3 is not UTF-8" in lab.error(path, plain)
    monkeypatch.setattr(documents, "PIECE", 100)
    path.write_bytes(b"\x80" * 1000)
    assert "is not UTF-8" in lab.error(path, plain)
    path.write_bytes(b"word " * 100 + b"\xff")
    assert "byte 500 is not UTF-8" in lab.error(path, plain)
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "text.jsonl:2: byte 24 is not UTF-8" in lab.error(tmp_path / "text.jsonl", plain)


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.parquet"])
def test_empty_files(tmp_path: Path, plain: Path, name: str, lab: Any) -> None:
    (tmp_path / name).touch()
    assert f"{name}: is empty" in lab.error(tmp_path / name, plain)


def test_blank_text_is_too_little(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": " \n"}, {"text": ""}, {"text": None}])
    assert "has 0 tokens" in lab.error(path, plain)
    (tmp_path / "text.txt").write_text("\n\n  \n")
    assert "has 0 tokens" in lab.error(tmp_path / "text.txt", plain)


def test_jsonl_without_last_newline_with_blank_lines_and_bom(tmp_path: Path, plain: Path, lab: Any) -> None:
    texts = lab.sentences(30)
    path = tmp_path / "text.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps({"id": 1, "body": text}) for text in texts).encode())
    ids = lab.load(path, plain, samples=5, length=50, column="body")
    np.testing.assert_array_equal(ids.numpy(), lab.reference(plain, texts, 5, 50, 0, [EOS]))
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n\n"))
    assert lab.load(path, plain, samples=5, length=50, column="body").shape == (5, 50)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nope", ":2: not JSON ("),
        ('{"text": "a"} {"text": "b"}', ":2: not JSON (Extra data"),
        ("[" * 100_000, ":2: not JSON ("),
        ('{"text": ' + "9" * 5000 + "}", ":2: not JSON ("),
        ('["a"]', ":2: got list, expected one JSON object per line"),
        (
            '{"content": "a", "b": 1}',
            ":2: has the columns 'content', 'b', expected text, messages, conversations; name one with data.column",
        ),
        ("{}", ":2: has the columns (none)"),
        ('{"text": 3}', ":2: got int, expected text or a list of messages"),
        ('{"text": {"a": 1}}', ":2: got dict"),
        ('{"text": "half \\ud800 pair"}', ":2: holds half of a surrogate pair"),
        ('{"messages": ["a"]}', ":2: got 'a', expected messages with `role` and `content`"),
        ('{"messages": [{"content": "a"}]}', "expected messages with `role`"),
        ('{"messages": [{"role": "user", "content": 3}]}', "expected messages with `role`"),
    ],
)
def test_bad_lines(tmp_path: Path, models: dict[str, Path], line: str, said: str, lab: Any) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert said in lab.error(path, models["chat"])


def test_column_that_is_not_there(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    assert "has the columns 'text', expected body" in lab.error(path, plain, column="body")


def test_parquet(tmp_path: Path, plain: Path, lab: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = lab.sentences(60)
    path = tmp_path / "a[1]*.parquet"  # no glob
    pyarrow.parquet.write_table(pyarrow.table({"id": range(60), "text": texts}), path, row_group_size=60)
    generator = torch.Generator().manual_seed(5)
    torch.randperm(1, generator=generator)
    order = torch.randperm(60, generator=generator).tolist()
    stream = [
        token for number, index in enumerate(order) for token in ([EOS] if number else []) + lab.encode(plain, texts[index])
    ]
    count = min(len(stream) // 40, POOL * 6)
    chosen = sorted(torch.randperm(count, generator=generator)[:6].tolist())
    ids = lab.load(path, plain, samples=6, length=40, seed=5)
    np.testing.assert_array_equal(ids.numpy(), [stream[start * 40 : start * 40 + 40] for start in chosen])
    # Many row groups: each row once.
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    found = [row.value for row in documents.rows(path, Data(name=str(path)), torch.Generator().manual_seed(1))]
    assert sorted(map(str, found)) == sorted(texts) and found != texts
    assert "has the columns 'text', expected body" in lab.error(path, plain, column="body")


def test_parquet_that_is_mangled(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not parquet PAR1")
    assert "a.parquet: cannot be read" in lab.error(path, plain)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(tmp_path: Path, plain: Path, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    path.chmod(0)
    assert "cannot be read" in lab.error(path, plain)


@pytest.mark.parametrize(
    "name",
    [
        "missing.jsonl",
        "org/missing.txt",
        "./missing",
        "~/missing",
        "/missing/folder",
        "a/b/c",
        "missing.JSON",
        "x.json.gz",
        "c:\\x",
        "a\0.txt",
    ],
)
def test_missing_files_are_not_looked_up(plain: Path, name: str, lab: Any) -> None:
    message = lab.error(name, plain)
    assert "there is no such file" in message and all(suffix in message for suffix in SUFFIXES)


def test_files_of_other_kinds(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    for name in ("text.csv", "text", "org-2.5"):
        (tmp_path / name).write_text("a")
        assert "are not read; expected a file that ends in .txt, .jsonl" in lab.error(tmp_path / name, plain)
    assert "is a folder" in lab.error(tmp_path, plain)
    monkeypatch.chdir(tmp_path)
    assert "files that end in 'nothing' are not read" in lab.error("text", plain)
    lab.write_jsonl(tmp_path / "here.jsonl", [{"text": text} for text in lab.sentences(30)])
    assert lab.load("here.jsonl", plain, samples=3, length=30).shape == (3, 30)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lab.load("~/here.jsonl", plain, samples=3, length=30).shape == (3, 30)


# --- chats


@pytest.mark.parametrize("spelling", ["messages", "conversations"])
@pytest.mark.parametrize("asked", [None, True])
def test_messages_take_the_template(tmp_path: Path, models: dict[str, Path], spelling: str, asked: bool | None, lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "chat.jsonl", lab.chats(spelling))
    texts = [
        f"<|im_start|>user\nWhy {n}?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
        for n, text in enumerate(lab.sentences(40))
    ]
    ids = lab.load(path, models["chat"], samples=6, length=50, chat_template=asked)
    np.testing.assert_array_equal(ids.numpy(), lab.reference(models["chat"], texts, 6, 50, 0, []))


def test_messages_as_plain_text(tmp_path: Path, models: dict[str, Path], lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "chat.jsonl", lab.chats("messages"))
    texts = [f"Why {n}?\n\n{text}" for n, text in enumerate(lab.sentences(40))]
    for model in (models["chat"], models["plain"]):
        ids = lab.load(path, model, samples=6, length=50, chat_template=False)
        np.testing.assert_array_equal(ids.numpy(), lab.reference(model, texts, 6, 50, 0, [EOS]))


def test_messages_in_parts_and_without_content(tmp_path: Path, models: dict[str, Path], lab: Any) -> None:
    parts = [{"type": "text", "text": "Why "}, {"type": "image"}, {"type": "text", "text": "so?"}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, {"role": "user"}]}] * 20
    path = lab.write_jsonl(tmp_path / "chat.jsonl", rows)
    text = "<|im_start|>user\nWhy so?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    ids = lab.load(path, models["chat"], samples=16, length=20)
    np.testing.assert_array_equal(ids.numpy(), lab.reference(models["chat"], [text] * 20, 16, 20, 0, []))
    ids = lab.load(path, models["chat"], samples=3, length=20, chat_template=False)
    np.testing.assert_array_equal(ids.numpy(), lab.reference(models["chat"], ["Why so?\n\n\n\n"] * 20, 3, 20, 0, [EOS]))


def test_chat_errors(tmp_path: Path, models: dict[str, Path], lab: Any) -> None:
    path = lab.write_jsonl(tmp_path / "chat.jsonl", lab.chats("messages")[:1])
    message = lab.error(path, models["plain"])
    assert "chat.jsonl:1: holds messages" in message and "has no chat template" in message and "chat_template: false" in message
    assert "has no chat template" in lab.error(path, models["plain"], chat_template=True)
    lab.write_jsonl(path, [{"messages": [{"role": "judge", "content": "x"}]}])
    assert "chat.jsonl:1: the tokenizer's chat template refuses these messages (unknown role judge)" in lab.error(
        path, models["chat"]
    )
    lab.write_jsonl(path, [{"text": "x"}])
    assert "holds plain text, but chat_template: true expects messages" in lab.error(path, models["chat"], chat_template=True)


# --- the Hub


def test_without_network_it_fails_soon_and_says_what_to_do(plain: Path, lab: Any) -> None:
    start = time.monotonic()
    message = lab.error("wikitext2", plain)
    assert time.monotonic() - start < 5  # datasets alone tries for 24 s
    assert "wikitext2 (Salesforce/wikitext): cannot be read from the Hugging Face Hub" in message and "does not answer" in message
    assert "--data text.jsonl" in message and "ids.npy" in message
    message = lab.error("org/other-2.5", plain)
    assert "org/other-2.5: neither a file nor a preset (wikitext2, c4" in message


def test_offline_mode_is_named(plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "c4 (allenai/c4): cannot be read" in lab.error("c4", plain) and "offline mode is set" in lab.error("c4", plain)


def test_offline_switch_of_the_environment() -> None:
    code = (
        "import torch; from compress.calibration.documents import rows; from compress.recipe.data import Data\n"
        "try: next(rows(None, Data(name='c4'), torch.Generator()))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("CalibrationError c4 (allenai/c4): cannot be read") and "offline mode is set" in done.stdout


def test_a_cached_dataset_is_used_without_network(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet
    from datasets.packaged_modules.parquet.parquet import Parquet

    lines = [f" {text} \n" if number % 3 else "" for number, text in enumerate(lab.sentences(40))]
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "a.parquet")
    cache = tmp_path / "cache"
    files = {"train": [str(tmp_path / "a.parquet")]}
    Parquet(
        cache_dir=str(cache), dataset_name="wikitext", config_name="wikitext-2-raw-v1", hash="abc", data_files=files
    ).download_and_prepare()
    (cache / "Salesforce___wikitext").mkdir()
    next((cache / "wikitext").iterdir()).rename(cache / "Salesforce___wikitext" / "wikitext-2-raw-v1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    ids = lab.load("wikitext2", plain, samples=4, length=40)
    np.testing.assert_array_equal(ids.numpy(), lab.reference(plain, ["\n\n".join(lines)], 4, 40, 0, [EOS]))
    assert datasets.config.HF_HUB_OFFLINE is False
    assert 'Unknown split "nope"' in lab.error("wikitext2", plain, split="nope")
    assert "wikitext2: has the columns 'text', expected body" in lab.error("wikitext2", plain, column="body")


class Hub:
    """Stands in for what `datasets` fetches, and notes what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], size: int | None = None) -> None:
        import datasets

        self.asked: tuple[Any, ...] = ()

        def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
            self.asked = (path, config, split, streaming)
            return datasets.IterableDataset.from_generator(lambda: iter(rows)) if streaming else datasets.Dataset.from_list(rows)

        builder = type("Builder", (), {"info": type("Info", (), {"download_size": size})})
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, config: builder)
        monkeypatch.setattr(documents, "_hub_answers", lambda _: True)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.column != "messages"])
def test_presets_of_text(plain: Path, monkeypatch: pytest.MonkeyPatch, name: str, lab: Any) -> None:
    preset = PRESETS[name]
    hub = Hub(monkeypatch, [{str(preset.column): text} for text in lab.sentences(60)])
    first, again, other = (lab.load(name, plain, samples=5, length=40, seed=seed) for seed in (1, 1, 2))
    assert hub.asked == (preset.path, preset.config, preset.split, preset.streaming)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_order_of_a_stream_is_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    Hub(monkeypatch, [{"text": text} for text in lab.sentences(60)])
    orders = [[row.value for row in documents.rows(None, Data(name="c4", seed=seed), torch.Generator())] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(map(str, orders[2])) == sorted(lab.sentences(60))


def test_preset_of_chats(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    hub = Hub(monkeypatch, lab.chats("messages"))
    assert lab.load("ultrachat", models["chat"], samples=5, length=40).shape == (5, 40)
    assert hub.asked == ("HuggingFaceH4/ultrachat_200k", None, "train_sft", True)
    message = lab.error("ultrachat", models["plain"])
    assert "ultrachat: row 0 of the shuffled stream: holds messages" in message


@pytest.mark.parametrize(("size", "streamed"), [(None, True), (10**6, False), (10**12, True)])
def test_other_datasets_are_streamed_when_large(
    plain: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, streamed: bool, lab: Any
) -> None:
    texts = lab.sentences(60)
    hub = Hub(monkeypatch, [{"body": text} for text in texts], size)
    ids = lab.load("org/some-2.5", plain, samples=5, length=40, config="de", split="test", column="body")
    assert hub.asked == ("org/some-2.5", "de", "test", streamed)
    if not streamed:
        np.testing.assert_array_equal(ids.numpy(), lab.reference(plain, texts, 5, 40, 0, [EOS]))
    assert "has the columns 'body', expected text, messages, conversations" in lab.error("org/some-2.5", plain)


def test_rows_of_wikitext_are_joined(plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    texts = lab.sentences(2500)
    Hub(monkeypatch, [{"text": text} for text in texts])
    ids = lab.load("wikitext2", plain, samples=400, length=64)
    parts = ["\n\n".join(texts[start : start + 1000]) for start in (0, 1000, 2000)]
    np.testing.assert_array_equal(ids.numpy(), lab.reference(plain, parts, 400, 64, 0, [EOS]))


@pytest.mark.parametrize("kind", ["refused", "failed"])
def test_the_hub_answers_with_an_error(plain: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lab: Any) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    client = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx, or httpx2 with a newer huggingface_hub

    def info(*_: object, **__: object) -> None:
        raise HfHubHTTPError("404", response=client.Response(404, request=client.Request("GET", "https://huggingface.co")))

    def load_dataset(*_: object, **__: object) -> None:
        assert datasets.config.HF_HUB_OFFLINE is False
        raise DatasetNotFoundError("Dataset 'org/x' doesn't exist") if kind == "refused" else client.ReadTimeout("slow")

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset)
    message = lab.error("org/x", plain)
    assert ("doesn't exist" if kind == "refused" else "slow") in message and "--data text.jsonl" in message


def test_a_stream_that_breaks_off(plain: Path, monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    import datasets

    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionResetError("connection reset by peer")

    Hub(monkeypatch, [])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(broken))
    assert "c4 (allenai/c4): cannot be read" in lab.error("c4", plain) and "connection reset by peer" in lab.error("c4", plain)
