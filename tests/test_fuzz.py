"""Random damage with fixed seeds, see fuzz.py: some on every run, many with `make test-all`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

sys.path.remove(str(Path(__file__).parent))


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_some_damage(target: str) -> None:
    for seed in range(40):
        fuzz.case(seed, [target])


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_much_damage(target: str) -> None:
    for seed in range(1_000, 6_000):
        fuzz.case(seed, [target])
