"""Memory that libraries would hold on to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import ROOT

SHAPES = """
import sys, torch
from compress.system import memory
if sys.argv[1] == "sparing":
    memory.be_sparing()
weight = torch.randn(256, 256).bfloat16()
for tokens in range(1, 40):  # what is taken once
    torch.randn(tokens, 256).bfloat16() @ weight.T
before = memory.current()
for tokens in range(40, 900):
    torch.randn(tokens, 256).bfloat16() @ weight.T
memory.give_back()
print(memory.current() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_products_of_ever_new_shapes_take_no_more_memory() -> None:
    """Experts see other numbers of tokens in every batch."""
    grown = {}
    for how in ("as it is", "sparing"):
        environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
        command = [sys.executable, "-c", SHAPES, how]
        done = subprocess.run(
            command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=300
        )
        grown[how] = int(done.stdout)
    assert grown["sparing"] < grown["as it is"] / 2, grown


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.system import memory

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    memory.be_sparing()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "32")
