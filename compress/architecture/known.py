"""The families that are written down: the folder `families/` is their registry."""

from __future__ import annotations

from compress import registry
from compress.architecture.family import Experts, Family

# What holds for every family that is inferred: names on disk are those of the model, and experts have the usual layout.
INFERRED = Family("", taps=(), keep=(), experts=Experts(), blocks="", prefix="")


def _families() -> dict[str, Family]:
    return {family.model_type: family for maker in registry.names("families") for family in registry.lookup("families", maker)}


def model_types() -> list[str]:
    """Return every `model_type` of config.json that a family is written for, sorted."""
    return sorted(_families())


def family_of(model_type: str) -> Family:
    """Return the family that is written for a `model_type`, or INFERRED where there is none."""
    return _families().get(model_type, INFERRED)
