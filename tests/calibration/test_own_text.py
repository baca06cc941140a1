"""Texts that need no network and no file: what comes with the package, and what the model writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.calibration import own_text
from compress.calibration.data import load_ids
from compress.calibration.documents import OWN_TEXT
from compress.errors import CalibrationError
from compress.recipe.data import OWN, Data

pytestmark = pytest.mark.usefixtures("no_network")
WIDE = 400  # ids: more than the tokenizers have


def ids_of(folder: Path, **settings: Any) -> torch.Tensor:
    return load_ids(Data(**settings), folder, WIDE, None)


# --- builtin


def test_the_package_has_a_text_of_many_kinds() -> None:
    """Some hundred kilobytes: documents and conversations, each a row that is read like any other."""
    rows = [json.loads(line) for line in OWN_TEXT.read_text(encoding="utf-8").splitlines()]
    assert 200_000 < OWN_TEXT.stat().st_size < 500_000
    assert {key for row in rows for key in row} == {"text", "messages"}
    roles = {message["role"] for row in rows for message in row.get("messages", ())}
    assert roles == {"system", "user", "assistant"}
    whole = OWN_TEXT.read_text(encoding="utf-8")
    for kind in ("def ", "| rank | element |", "nicht", "l'eau", "SELECT", "- [ ]"):
        assert kind in whole, kind


def test_builtin_needs_nothing_but_a_tokenizer(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = ids_of(plain, name="builtin")
    assert found.shape == (128, 512)
    assert torch.equal(found, ids_of(plain, name="builtin"))
    assert not torch.equal(found, ids_of(plain, name="builtin", seed=1))
    assert load_ids(Data(name="builtin"), plain, WIDE, 64).shape == (128, 64)  # the model's context


def test_conversations_take_the_template_where_there_is_one(models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    def text(folder: Path, **settings: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return str(tokenizer.decode(ids_of(folder, name="builtin", samples=100, **settings).flatten()))

    assert "<|im_start|>user" in text(models["chat"])
    assert "<|im_start|>user" not in text(models["chat"], chat_template=False)
    assert "<|im_start|>user" not in text(models["plain"])  # as plain text, without an error


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("field", ["split", "config", "column"])
def test_settings_that_would_be_ignored(name: str, field: str) -> None:
    with pytest.raises(ValidationError, match=f"`{field}` means nothing for {name}; remove it"):
        Data(name=name, **{field: "x"})  # type: ignore[arg-type]


# --- bos


def test_bos_begins_every_window(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the weight of the error is small when codes follow the grid. " * 20)
    settings: dict[str, Any] = {"name": str(tmp_path / "text.txt"), "samples": 4, "length": 16}
    bos = 1  # <s>
    by_itself, asked = ids_of(models["bos"], **settings), ids_of(models["bos"], **settings, bos=True)
    assert (by_itself[:, 0] == bos).all()
    assert torch.equal(by_itself, asked)
    assert not (ids_of(models["bos"], **settings, bos=False)[:, 0] == bos).any()
    assert not (ids_of(models["bos-only"], **settings)[:, 0] == bos).all()
    assert (ids_of(models["bos-only"], **settings, bos=True)[:, 0] == bos).all()
    with pytest.raises(CalibrationError, match=r"data\.bos: true, but the tokenizer of .*plain has no bos token; leave bos out"):
        ids_of(models["plain"], **settings, bos=True)
    with pytest.raises(ValidationError, match=r"`bos` means nothing for a \.npy file; remove it"):
        Data(name="a.npy", bos=True)


# --- self


@pytest.fixture(scope="module")
def writer(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer of the chat template."""
    import shutil

    from tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path_factory.mktemp("writer") / "m", "llama", vocab_size=WIDE)
    for path in models["chat"].iterdir():
        shutil.copy(path, folder)
    return folder


def test_a_model_writes_its_own_text(writer: Path) -> None:
    """Tokens are the model's own predictions, drawn by the seed."""
    settings: dict[str, Any] = {"name": "self", "samples": 6, "length": 24, "chat_template": False}
    found = ids_of(writer, **settings)
    assert found.shape == (6, 24)
    assert torch.equal(found, ids_of(writer, **settings))
    assert not torch.equal(found, ids_of(writer, **settings, seed=1))
    assert len({tuple(row) for row in found.tolist()}) == 6


def test_what_is_written_follows_the_predictions() -> None:
    """A model that is sure of the next token writes it: here always one more than the last."""

    class Counts:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, past_key_values: int | None, **_: object) -> SimpleNamespace:
            logits = torch.nn.functional.one_hot((input_ids + 1) % 50, 50).float() * 100
            return SimpleNamespace(logits=logits[:, -1:], past_key_values=(past_key_values or 0) + input_ids.shape[1])

    generator = torch.Generator().manual_seed(0)
    assert own_text._written(Counts(), [3], 2, 6, None, [], generator).tolist() == [[3, 4, 5, 6, 7, 8]] * 2
    turns = own_text.Turns([40], [20, 30], [40])
    # The user's turn ends at 45, the template's 20 and 30 follow, and the answer goes on from there until 35.
    written = own_text._written(Counts(), [40], 1, 18, turns, [45, 35], generator)[0].tolist()
    assert written == [40, 41, 42, 43, 44, 20, 30, 31, 32, 33, 34, 40, 41, 42, 43, 44, 20, 30]


def test_a_chat_model_writes_conversations(writer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(writer)
    turns = own_text.turns_of(tokenizer)
    assert turns is not None
    assert tokenizer.decode(turns.opening) == "<|im_start|>user\n"
    assert tokenizer.decode(turns.question).startswith("<|im_end|>")
    found = ids_of(writer, name="self", samples=3, length=40)
    for row in found.tolist():
        assert row[: len(turns.opening)] == turns.opening
    with pytest.raises(CalibrationError, match="has no template with turns of user and assistant"):
        tokenizer.chat_template = "{{ messages[0].role }}"
        assert own_text.turns_of(tokenizer) is None
        own_text.write(writer, tokenizer, [], 1, 8, True, torch.Generator())


def test_a_model_that_does_not_fit_writes_nothing(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text.memory, "available", lambda: 1000)
    monkeypatch.setattr(own_text, "pick_device", lambda name: torch.device("cpu"))
    with pytest.raises(CalibrationError) as caught:
        ids_of(writer, name="self", samples=1, length=8)
    assert caught.value.message.startswith("--data self: the whole model needs 0.0 GB of memory to write its text")
    assert caught.value.message.endswith("use --data builtin, or a file")
