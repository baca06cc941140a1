"""Whether a compressed checkpoint is what was written: checksums, every tensor decoded, one batch against the recorded result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.families import vocabulary
from compress.errors import CheckpointError, VerificationError
from compress.evaluate.streamed import last_hidden, token_losses
from compress.files import sha256
from compress.packed import PackedSource
from compress.prepare import DTYPES, pick_device

# The recorded losses (nats) come from the same arithmetic; another CPU or a GPU adds up in another order.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


def _recorded(folder: Path) -> tuple[dict[str, str], Tensor, Tensor, str]:
    """Return what was recorded when a checkpoint was written: SHA-256 by file, ids (1, tokens), their losses, and the dtype."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        files, check = summary["files"], summary["check"]
        ids, losses, dtype = torch.tensor([check["ids"]]), torch.tensor(check["losses"]), check["dtype"]
        if (
            not isinstance(files, dict)
            or dtype not in TOLERANCE
            or ids.is_floating_point()
            or losses.shape != (ids.shape[1] - 1,)
        ):
            raise ValueError("files or check are not as compress writes them")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}/summary.json: cannot be read ({error}); expected a checkpoint that compress wrote"
        ) from error
    return files, ids, losses, dtype


def verify(folder: Path, device: str, listen: Callable[[int, int, str, float], None]) -> dict[str, Any]:
    """Check a checkpoint and return what was compared. Raises CheckpointError, VerificationError."""
    files, ids, recorded, dtype = _recorded(folder)
    for number, (name, digest) in enumerate(files.items()):
        listen(number, len(files) + 1, f"checksum of {name}", 0.0)
        path = folder / name
        got = sha256(path) if path.is_file() else "nothing"
        if got != digest:
            raise VerificationError(
                f"{path}: SHA-256 is {got}; recorded is {digest}. The file changed since it was written: fetch it again"
            )
    source = PackedSource.open_packed(folder)
    listen(len(files), len(files) + 1, "one batch", 0.0)
    if not bool(((ids >= 0) & (ids < vocabulary(source))).all()):
        raise CheckpointError(
            f"{folder}/summary.json: names tokens outside the vocabulary; expected a checkpoint that compress wrote"
        )
    skeleton, hidden = last_hidden(source, ids, DTYPES[dtype], pick_device(device))
    losses = token_losses(skeleton, ids, hidden)
    difference = float((losses - recorded).abs().mean())
    limit = TOLERANCE[dtype]
    if not difference <= limit:
        raise VerificationError(
            f"{folder}: losses of the recorded batch differ by {difference:.3g} nats in the mean; expected at most {limit}. "
            "Another version of transformers or torch may compute differently; install the ones in summary.json"
        )
    return {
        "folder": str(folder),
        "files": len(files),
        "sites": len(source.table),
        "tokens": ids.numel(),
        "mean_difference_nats": difference,
        "limit_nats": limit,
    }
