"""Train a small model on any text, so that methods can be compared on a model and a text of one's own.

    python bench/train_small.py TEXT_FOLDER -o MODEL [--glob '*.py'] [--family qwen3] [--steps 600] [--minutes 30]

Writes a checkpoint with a tokenizer of its own, and beside it calibration-ids.npy and heldout-ids.npy (256 windows of 256 ids)
from files that it was not trained on. One file in ten is held out; half of those calibrate, half measure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

LENGTH, WINDOWS, END = 256, 256, "<|end|>"
SHARED = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "qwen3": (Qwen3Config, {"intermediate_size": 768}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"intermediate_size": 768, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2},
    ),
}  # fmt: skip


def texts(folder: Path, glob: str, limit: int) -> list[tuple[str, str]]:
    """Return (name, text) of files in an order that depends on their names alone, up to `limit` characters."""
    paths = sorted(folder.rglob(glob), key=lambda path: hashlib.sha256(str(path.relative_to(folder)).encode()).digest())
    found, total = [], 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        found.append((str(path.relative_to(folder)), text))
        total += len(text)
        if total >= limit:
            break
    if not found:
        raise SystemExit(f"{folder}: no file matches {glob}")
    return found


def byte_pairs(text: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    )
    return tokenizer


def stream(tokenizer: Tokenizer, text: Sequence[str]) -> Tensor:
    """Return the ids of documents, an end after each, (tokens,) int64."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([i for encoding in tokenizer.encode_batch(list(text)) for i in (*encoding.ids, end)])


def train(model: torch.nn.Module, ids: Tensor, steps: int, minutes: float, batch: int, rate: float) -> int:
    """Train until either limit is reached; the rate falls to nothing along a cosine over whichever comes first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    random = torch.Generator().manual_seed(0)
    started, step, share = time.monotonic(), 0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * share))
        starts = torch.randint(len(ids) - LENGTH, (batch,), generator=random)
        windows = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        share = max(step / steps, (time.monotonic() - started) / 60 / minutes)
        if step % 20 == 0 or share >= 1:
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return step


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--glob", default="*.py")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--characters", type=int, default=12_000_000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    given = parser.parse_args()
    torch.manual_seed(0)
    found = texts(given.text, given.glob, given.characters)
    seen, rest = [text for n, (_, text) in enumerate(found) if n % 10], [text for n, (_, text) in enumerate(found) if n % 10 == 0]
    tokenizer = byte_pairs(seen, given.vocabulary)
    ids = stream(tokenizer, seen)
    print(f"{len(seen)} files, {len(ids)} ids to train on; {len(rest)} files held out", flush=True)
    kind, own = FAMILIES[given.family]
    config = kind(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=None, eos_token_id=tokenizer.token_to_id(END), **SHARED, **own
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    steps = train(model, ids, given.steps, given.minutes, given.batch, given.rate)
    model.to(torch.bfloat16).save_pretrained(given.output)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(given.output)
    for name, part in (("calibration", rest[0::2]), ("heldout", rest[1::2])):
        windows = stream(tokenizer, part)
        count = min(WINDOWS, len(windows) // LENGTH)
        np.save(given.output / f"{name}-ids.npy", windows[: count * LENGTH].view(count, LENGTH).to(torch.int32).numpy())
        print(f"{name}: {count} windows of {LENGTH}")
    (given.output / "training.json").write_text(json.dumps({"steps": steps, "files": len(seen), "ids": len(ids)}) + "\n")


if __name__ == "__main__":
    main()
