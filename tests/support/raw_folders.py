"""A llama of one block in as many files as a test wants, and refusals of such folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import quickly
from raw_headers import advice

from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import (
    save,
)
from compress.errors import CheckpointError

LLAMA = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.post_attention_layernorm.weight": (4,),
    **{f"model.layers.0.self_attn.{name}_proj.weight": (4, 4) for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}_proj.weight": (4, 4) for name in ("gate", "up", "down")},
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}


CONFIG: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4}


def checkpoint(folder: Path, config: Any = CONFIG, files: dict[str, list[str]] | None = None, index: Any = None) -> Path:
    """Write a llama of one block: whole, or cut into `files` with an index that is right unless given."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    files = {SINGLE: list(LLAMA)} if files is None else files
    for file, names in files.items():
        save(folder / file, {name: torch.ones(LLAMA[name]) for name in names})
    if index is None and SINGLE not in files:
        index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    if index is not None:
        (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return folder


HALVES = {"one.safetensors": list(LLAMA)[:6], "two.safetensors": list(LLAMA)[6:]}


MAP = {name: file for file, names in HALVES.items() for name in names}


LAST = list(LLAMA)[-1]


def folder_refusal(folder: Path, pattern: str | None = None) -> str:
    with quickly(), pytest.raises(CheckpointError, match=pattern) as caught:
        Source.open(folder)
    return advice(caught.value, folder)
