"""A few windows that go along with a run, in memory: held out to watch it, or followed for the check in the end."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.blockwise.hidden_states import Hidden
from compress.errors import CalibrationError
from compress.model.streamed import Skeleton


def begin(skeleton: Skeleton, ids: Tensor) -> Hidden:
    """Send windows (samples, length) through the embeddings; what comes of them is never on disk alone."""
    with skeleton.outer():
        first = skeleton.embed(ids)
    hidden = Hidden([len(first)], first.shape[1], first.shape[2], first.dtype, None)
    hidden.update(iter([first]), "")
    return hidden


def through(skeleton: Skeleton, block: int, hidden: Hidden) -> None:
    """Send them through a filled block."""
    hidden.update(iter([skeleton.forward(block, hidden.read(0).to(skeleton.device))]), "")


def difference(watched: Sequence[Hidden], block: int, limit: float) -> float:
    """How far hidden states behind a compressed block are from those behind the original's, over the norm of the latter.

    Raises CalibrationError where that is above a limit: the model has broken.
    """
    mine, original = (hidden.read(0).double() for hidden in watched)
    found = float((mine - original).norm() / original.norm().clamp_min(1e-30))
    if not found <= limit:  # also where it is not a number
        raise CalibrationError(
            f"block {block}: on held-out windows the compressed model's hidden states differ from the original's by "
            f"{found:.3g} of their norm; expected at most {limit:g} (watch.limit). The model has broken: use more "
            "bits or another method for this block, or look for activations that overflow. Nothing was published; "
            "--watch 0 goes on without this check"
        )
    return found
