"""What tests of exports share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import RECIPES, SIZES
from runs import compress as run

Tiny = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tiny: Tiny, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a checkpoint of a family by one of RECIPES."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def get(recipe: str, family: str = "llama", **changes: Any) -> Path:
        key = f"{family} {recipe} {changes}"
        if key not in known:
            known[key] = root / str(len(known))
            data = ids if recipe == "act-order" else None
            run(tiny(family, **{**SIZES, **changes}), known[key], data, RECIPES[recipe])
        return known[key]

    return get
