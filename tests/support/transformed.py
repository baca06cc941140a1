"""A model after a transform alone: what it answers, and what the report would know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor

from compress.architecture.inventory import claim
from compress.blockwise.hidden_states import HiddenStates
from compress.blockwise.stages import transform
from compress.blockwise.view import Surroundings
from compress.checkpoint.source import Source
from compress.model.detect import find
from compress.model.streamed import Skeleton
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.recipe.assignment import StageAssignment

IDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))


def run(
    folder: Path, method: Any, match: str | list[str] = "*.*", copy: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """Logits of a model after a transform alone, its own if it is None, and the transform's notes by site."""
    source = Source.open(folder)
    claims = claim(source, find(source), copy)
    step = {"match": match, "method": "quant/rtn", "options": {"group_size": -1}}
    assignments = recipe_assignment.resolve(recipe_reading.parse({"steps": [step]}), claims.sites)
    skeleton = Skeleton(source, claims, torch.float32, torch.device("cpu"))
    with skeleton.outer():
        hidden = skeleton.embed(IDS)
    nothing = HiddenStates([], 0, 0, torch.float32, None)
    notes: dict[str, dict[str, Any]] = {}
    for number in range(len(skeleton.blocks)):
        skeleton.load(number)
        members = [a for a in assignments if a.site.block == number]
        if method is not None:
            before = hidden

            def send(block: int = number, rows: Tensor = before) -> None:
                skeleton.forward(block, rows)

            around = Surroundings(skeleton, number, nothing, None, None, send, 1 << 30, 0, lambda *_: None)
            found = transform(around, [StageAssignment(method, members)])
            notes |= {site: values[method.path] for site, values in found.items()}
        hidden = skeleton.forward(number, hidden)
        skeleton.release(number)
    with skeleton.outer():
        return skeleton.logits(IDS, hidden), notes
