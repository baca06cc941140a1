"""The files that a run leaves, made by hand: what reports and cards are written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from compress.report.rows import SiteRow, write_rows

SECRET = "/home/jane/secret"
EVIL = "<script>alert(1)</script>\"'`|$x$ [a](javascript:alert(1))"


def site(name: str, block: int | None, kind: str, error: float = 0.01, **values: Any) -> SiteRow:
    return SiteRow(name, block, kind, (64, 128), "quant/gptq", 4.125, 33792, error, **{"tokens": 4096, **values})


def dense(blocks: int = 2) -> list[SiteRow]:
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    return [
        site(f"model.layers.{b}.{k}", b, k, 0.01 * (1 + b), notes={"damp": 0.01, "dead_columns": b})
        for b in range(blocks)
        for k in kinds
    ]


def moe(blocks: int, experts: int) -> list[SiteRow]:
    rows = []
    for block in range(blocks):
        for expert in range(experts):
            tokens = (block * 31 + expert * 17) % 997
            cold = f"shrunk Hessian: {tokens} of 128 tokens" if tokens < 128 else None
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                name, kind = f"model.layers.{block}.mlp.experts.{expert}.{leaf}", f"mlp.experts.{leaf}"
                rows.append(site(name, block, kind, 0.001 * (1 + expert), expert=expert, tokens=tokens, fallback=cold))
    return rows


DATA = {"name": f"{SECRET}/text.jsonl", "samples": 32, "length": 128, "seed": 7}
QUALITY = {
    "model": f"{SECRET}/out",
    "original": f"{SECRET}/tiny-llama",
    "data": f"{SECRET}/heldout.npy",
    "windows": 16,
    "length": 128,
    "ids_sha256": "e" * 64,
    "perplexity": 12.418,
    "perplexity_before": 12.331,
    "kl": 0.00861,
    "kl_standard_error": 0.00011,
    "agreement": 0.9583,
    "tokens_per_second": 214.3,
    "tokens_per_second_before": 231.9,
    "bytes": 1_000_000,
    "bytes_before": 3_000_000,
    "dtype": "float32",
    "device": "cpu",
    "measured": "2026-11-21",
}


def checkpoint(folder: Path, rows: list[SiteRow], data: dict[str, Any] | None = None, **summary: Any) -> Path:
    """The files of a run that `card` reads."""
    folder.mkdir(exist_ok=True)
    step = {"match": "*.*", "method": "quant/gptq", "options": {"bits": 4, "group_size": 128}}
    recipe = {"description": summary.pop("description", ""), "data": data or DATA, "steps": [step]}
    run = {"dtype": "bfloat16", "device": "cpu", "compress": "0.1.0", "torch": "2.13.0"}
    values = {
        "tool": "compress",
        "version": "0.1.0",
        "base_model": f"{SECRET}/tiny-llama",
        "base_revision": None,
        "identity": {"recipe": recipe, "source": {}, "calibration": "c" * 64, "run": run},
        "weights": 1_500_000,
        "bytes_before": 3_000_000,
        "bytes_after": 1_000_000,
        "bits_per_weight": 5.333,
        "bits_per_compressed_weight": 4.125 if rows else 0.0,
        "sites": len(rows),
        "fallbacks": sum(row.fallback is not None for row in rows),
        "seconds": 125.0,
        "compute_seconds": 60.5,
        "recipe_sha256": "d" * 64,
        "check": {},
        "files": {"model.safetensors": "f" * 64},
    }
    table = {
        "specs": [{"shape": [64, 128], "base": {"format": "bitpack", "bits": 4, "group_size": 128}}] if rows else [],
        "sites": {},
    }
    config = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "vocab_size": 96,
        "hidden_size": 32,
        "quantization_config": table,
    }
    (folder / "summary.json").write_text(json.dumps(values | summary))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "config.json").write_text(json.dumps(config))
    write_rows(folder / "report.jsonl", rows)
    return folder


def measure(folder: Path, **values: Any) -> None:
    (folder / "evaluation.json").write_text(json.dumps(QUALITY | values))
