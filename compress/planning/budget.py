"""What a plan may spend: bits per weight, bytes or divergence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.errors import RecipeError
from compress.recipe import schema as recipe_schema
from compress.system.files import human_bytes


def _check(bpw: float | None, size: int | str | None, max_kl: float | None) -> None:
    """Raise RecipeError unless exactly one is given, and it is positive."""
    given = [name for name, value in (("--bpw", bpw), ("--size", size), ("--max-kl", max_kl)) if value is not None]
    if len(given) != 1:
        what = "no budget" if not given else " and ".join(given)
        raise RecipeError(f"{what}: give one of --bpw 3.0, --size 4GB or --max-kl 0.05")
    for name, number in (("--bpw", bpw), ("--max-kl", max_kl)):
        if number is not None and not (np.isfinite(number) and number > 0):
            raise RecipeError(f"{name} {number}: expected a positive number")


@dataclass(frozen=True)
class Budget:
    """What is given: exactly one of the three. Raises RecipeError otherwise."""

    bpw: float | None = None  # bits per compressed weight, every stored bit counted
    size: int | None = None  # bytes of all tensors of the checkpoint
    max_kl: float | None = None  # nats per position

    def __post_init__(self) -> None:
        _check(self.bpw, self.size, self.max_kl)

    @classmethod
    def of(cls, bpw: float | None, size: str | None, max_kl: float | None) -> Budget:
        """Read what the command line says. Raises RecipeError."""
        _check(bpw, size, max_kl)
        try:
            return cls(bpw, None if size is None else recipe_schema.parse_size(size), max_kl)
        except ValueError as error:
            raise RecipeError(f"--size: {error}") from error

    def __str__(self) -> str:
        if self.bpw is not None:
            return f"{self.bpw:g} bits per weight"
        return human_bytes(self.size) if self.size is not None else f"KL {self.max_kl:g}"


@dataclass(frozen=True)
class Point:
    """A choice for the whole model, in numbers."""

    bits: int  # stored, of the planned weights
    bits_per_weight: float
    bytes: int  # of all tensors of the checkpoint
    kl: float  # predicted for the model, nats
