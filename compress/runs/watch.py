"""The running check: held-out windows go through compressed blocks and through the original's, and are compared."""

from __future__ import annotations

from collections.abc import Sequence

from compress.blockwise.stream import Stream
from compress.errors import CalibrationError


def difference(watched: Sequence[Stream], block: int, limit: float) -> float:
    """How far hidden states after a compressed block are from those after the original's, over the norm of the latter.

    Raises CalibrationError where that is above a limit: the model has broken.
    """
    mine, original = (stream.states.read(0).double() for stream in watched)
    found = float((mine - original).norm() / original.norm().clamp_min(1e-30))
    if not found <= limit:  # also where it is not a number
        raise CalibrationError(
            f"block {block}: on held-out windows the compressed model's hidden states differ from the original's by "
            f"{found:.3g} of their norm; expected at most {limit:g} (watch.limit). The model has broken: use more "
            "bits or another method for this block, or look for activations that overflow. Nothing was published; "
            "--watch 0 goes on without this check"
        )
    return found
