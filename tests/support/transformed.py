"""A model after a transform alone: what it answers, and what the report would know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor

from compress.architecture.inventory import take_inventory
from compress.blockwise.hidden_states import HiddenStates
from compress.blockwise.stages import transform
from compress.blockwise.view import BlockRun
from compress.checkpoint.source import Source
from compress.model.detect import find_family
from compress.model.streamed import StreamedModel
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.recipe.assignment import StageAssignment

IDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))


def run(
    folder: Path, method: Any, match: str | list[str] = "*.*", copy: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, dict[str, Any]]]:
    """Logits of a model after a transform alone, its own if it is None, and the transform's notes by site."""
    source = Source.open(folder)
    inventory = take_inventory(source, find_family(source), copy)
    step = {"match": match, "method": "quant/rtn", "options": {"group_size": -1}}
    assignments = recipe_assignment.resolve(recipe_reading.parse({"steps": [step]}), inventory.sites)
    streamed = StreamedModel(source, inventory, torch.float32, torch.device("cpu"))
    with streamed.embeddings_and_head():
        hidden = streamed.embed(IDS)
    nothing = HiddenStates([], 0, 0, torch.float32, None)
    notes: dict[str, dict[str, Any]] = {}
    for number in range(len(streamed.blocks)):
        streamed.load(number)
        members = [a for a in assignments if a.site.block == number]
        if method is not None:
            before = hidden

            def send(block: int = number, rows: Tensor = before) -> None:
                streamed.forward(block, rows)

            around = BlockRun(streamed, number, nothing, None, None, send, 1 << 30, 0, lambda *_: None)
            found = transform(around, [StageAssignment(method, members)])
            notes |= {site: values[method.path] for site, values in found.items()}
        hidden = streamed.forward(number, hidden)
        streamed.release(number)
    with streamed.embeddings_and_head():
        return streamed.logits(IDS, hidden), notes
