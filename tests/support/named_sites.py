"""Sites as a recipe sees them: a name and a shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """What `resolve` wants to know of a site."""

    name: str
    shape: tuple[int, int] = (64, 128)
    expert: int | None = None
    tensor: str = ""


SITES = [
    Named(f"model.layers.{block}.{kind}", tensor=f"{block}.{kind}")
    for block in range(2)
    for kind in ("self_attn.q_proj", "mlp.down_proj")
]
