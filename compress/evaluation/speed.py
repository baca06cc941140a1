"""Tokens per second of generation, the way a user runs it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

PROMPT, NEW, REPEATS = 8, 32, 3


def tokens_per_second(folder: str, device: torch.device) -> float:
    """Load a checkpoint with transformers and return tokens per second of greedy generation, batch 1, median of three."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    # Its loading bars would write over ours.
    bars = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        model.to(device)
    finally:
        if bars:
            their_logging.enable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=generator).to(device)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    rates = []
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            start = time.perf_counter()
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one prepares kernels
                rates.append(NEW / (time.perf_counter() - start))
    return statistics.median(rates)
