"""A recipe from end to end on a tiny model: run, load with transformers, save and load again, and the bits against the disk."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from runs import compress
from tiny import VOCABULARY


def assert_round_trip(model: Path, folder: Path, data: Path | None, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Check everything between a recipe and the logits of what it made, and return the summary of the run."""
    from transformers import AutoModelForCausalLM

    from compress.blockwise.forward import last_hidden
    from compress.checkpoint.packed_source import PackedSource

    summary: dict[str, Any] = compress(model, folder / "out", data, steps).values
    source = PackedSource.open_packed(folder / "out")
    probe = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))

    def logits(where: Path) -> Any:
        loaded, info = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, dtype=torch.float32)
        assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
        with torch.no_grad():
            return loaded, loaded(probe, use_cache=False).logits

    loaded, first = logits(folder / "out")
    streamed, hidden = last_hidden(source, probe, torch.float32, torch.device("cpu"))
    with streamed.embeddings_and_head():
        torch.testing.assert_close(first, streamed.logits(probe, hidden), rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(folder / "again")
    assert torch.equal(logits(folder / "again")[1], first)

    specs = source.table.values()
    stored = sum(entry.nbytes for entry in source.packed.values())
    assert specs
    assert summary["bits_per_compressed_weight"] == 8 * stored / sum(prod(spec["shape"]) for spec in specs)
    return summary
