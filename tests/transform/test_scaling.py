"""Scales move between tensors without a change of function, for every family; what cannot take part is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import ids_file
from tiny import TINY, VOCABULARY

from compress.block_methods import Surroundings, View, transform
from compress.calibration.families import claim, find
from compress.calibration.hidden import Hidden
from compress.calibration.skeleton import Skeleton
from compress.checkpoint import Source
from compress.method import Changed
from compress.recipe import StageAssignment, parse, resolve
from compress.transform._scaling import Moved

Tiny = Callable[..., Path]
CPU = torch.device("cpu")


class Random:
    """A transform that moves random scales wherever it may."""

    path = "transform/random"

    def __init__(self, strength: float = 1.0) -> None:
        self.strength, self.places, self.obstacles = strength, 0, []
        self.moved = {}

    def __call__(self, block):
        moved = Moved(block)
        generator = block.generator()
        for place in block.scalables:
            if place.obstacle is not None:
                self.obstacles.append((place.producer, place.obstacle))
                continue
            scales = torch.exp(self.strength * torch.randn(moved.number(place), generator=generator))
            moved.move(place, scales)
            self.places += 1
        changed = moved.changed({})
        self.moved |= changed.weights
        return Changed(changed.weights, changed.others)


def run(folder: Path, method: Random, ids: torch.Tensor, match: str = "*.*", dtype=torch.float32):
    """Logits of a model after the transform alone; its own if it is None."""
    source = Source.open(folder)
    claims = claim(source, find(source))
    assignments = resolve(
        parse({"steps": [{"match": match, "method": "quant/rtn", "options": {"group_size": -1}}]}), claims.sites
    )
    skeleton = Skeleton(source, claims, dtype, CPU)
    with skeleton.outer():
        hidden = skeleton.embed(ids)
    for number in range(len(skeleton.blocks)):
        skeleton.load(number)
        if method is not None:
            around = Surroundings(
                skeleton, number, Hidden([], 0, 0, dtype, None), None, lambda: None, 1 << 30, 0, lambda *_: None
            )
            transform(around, [StageAssignment(method, [a for a in assignments if a.site.block == number])])
        hidden = skeleton.forward(number, hidden)
        skeleton.release(number)
    with skeleton.outer():
        return skeleton.logits(ids, hidden)


@pytest.mark.parametrize("family", TINY)
def test_logits_stay(family: str, tiny: Tiny) -> None:
    ids = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    before = run(tiny(family), None, ids)
    method = Random()
    after = run(tiny(family), method, ids)
    print(family, method.places, method.obstacles[:4], (after - before).abs().max(), before.abs().max())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
