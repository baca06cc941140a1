"""What the tests of calibration data share: small tokenizers, a machine without network, and windows written from the rules."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.calibration.data import POOL, load_ids
from compress.errors import CalibrationError
from compress.recipe.data import Data

WORDS = "the of rounding weight error column block scale grid sum is small when codes follow the"
CHATML = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role ' + m.role) }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
VOCABULARY = 400


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"Note {index}: " + " ".join(rng.choice(WORDS.split(), size=rng.integers(20, 40))) + "." for index in range(count)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a tokenizer each: with eos only, bos put first, bos only, a chat template, or neither mark."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    def build(folder: Path, adds_bos: bool = False, template: str | None = None, **names: str) -> Path:
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(sentences(50), trainer)
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
            )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        fast.chat_template = template
        fast.save_pretrained(folder)
        return folder

    root = tmp_path_factory.mktemp("models")
    return {
        "plain": build(root / "plain", eos_token="<|endoftext|>"),
        "bos": build(root / "bos", adds_bos=True, bos_token="<s>", eos_token="<|endoftext|>"),
        "bos-only": build(root / "bos-only", bos_token="<s>"),
        "chat": build(root / "chat", template=CHATML, eos_token="<|endoftext|>"),
        "bare": build(root / "bare"),
    }


@pytest.fixture
def plain(models: dict[str, Path]) -> Path:
    return models["plain"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name resolves, as behind a firewall; the environment's own offline switches are off unless a test sets them."""
    import datasets
    import huggingface_hub.constants

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def load(
    name: Path | str, model: Path, *, max_length: int | None = None, vocabulary: int = VOCABULARY, **settings: Any
) -> torch.Tensor:
    return load_ids(Data(name=str(name), **settings), model, vocabulary, max_length)


def error(name: Path | str, model: Path, **settings: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        load(name, model, **settings)
    assert "\n" not in str(caught.value)
    return caught.value.message


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"])


def reference(
    model: Path, documents: list[str], samples: int, stride: int, seed: int, between: list[int]
) -> np.ndarray[Any, Any]:
    """The windows by the rules of the module's docstring, token by token."""
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        stream += (between if stream else []) + encode(model, documents[index])
    count = min(len(stream) // stride, POOL * samples)
    chosen = sorted(torch.randperm(count, generator=generator)[:samples].tolist())
    return np.array([stream[start * stride : (start + 1) * stride] for start in chosen])


def chats(spelling: str) -> list[dict[str, Any]]:
    role, content, user, assistant = ("role", "content", "user", "assistant")
    if spelling == "conversations":
        role, content, user, assistant = ("from", "value", "human", "gpt")
    return [
        {"id": n, spelling: [{role: user, content: f"Why {n}?"}, {role: assistant, content: text}]}
        for n, text in enumerate(sentences(40))
    ]


@pytest.fixture
def lab(no_network: None) -> SimpleNamespace:
    """The functions above; a conftest cannot be imported."""
    shared = (sentences, load, error, write_jsonl, encode, reference, chats)
    return SimpleNamespace(**{function.__name__: function for function in shared})
