"""A family for a model that none is written for: what its modules show, or an error that says what they do not show.

Every linear of a block gets a tap of its own, because modules do not show which of them read the same tensor: more work, never
wrong. Tensors must have on disk the names they have in the model.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from compress.architecture.config import number_of_blocks
from compress.architecture.family import Experts, Family
from compress.architecture.known import INFERRED, family_of, model_types
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CheckpointError
from compress.model.meta import build_model

_LINEARS = ("Linear", "Conv1D")
# Small linears that decide where tokens go: routers and gates stay as they are.
_ROUTERS = ("*router*", "*.gate", "gate", "*shared_expert_gate*", "*.wg")


def infer(source: Source, blocks: int, known: str) -> Family:
    """Return the family of a source for whose model_type none is written; a CheckpointError names what is missing."""
    place = f"{source.folder}: model_type {source.model_type!r} is not a known family ({known})"
    try:
        model = build_model(source.config, str(source.folder), torch.float32)
    except CheckpointError as error:
        raise CheckpointError(f"{place}, and cannot be inferred, because {str(error).partition(': ')[2]}") from error
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == blocks and n.count(".") <= 2]
    lists = [(n, m) for n, m in lists if any(_linears(block) for block in m)]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise CheckpointError(
            f"{place}, and cannot be inferred: lists of {blocks} blocks: {found}; expected one. Write a family, with `blocks`"
        )
    path, block_list = lists[0]
    experts = _experts(source, path, block_list, place)
    taps: dict[str, None] = {}
    keep: dict[str, None] = {}
    for number, block in enumerate(block_list):
        linears = set(_linears(block))
        taps |= dict.fromkeys(name for name in sorted(linears) if f"{path}.{number}.{name}.weight" in source.entries)
        inside = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
        keep |= dict.fromkeys(sorted(name for name in inside if name.removesuffix(".weight") not in linears))
    outer = tuple(n for n, _ in (*model.named_parameters(), *model.named_buffers()) if not n.startswith(path + "."))
    strange = [n for n in source.entries if not _has(n, path, taps, keep, outer, experts)]
    if strange:
        raise CheckpointError(
            f"{place}, and cannot be inferred: {strange[0]!r} on disk is no parameter of the model. Write one, with `renames`"
        )
    head = _head(model)
    return Family(
        source.model_type,
        taps=tuple((name,) for name in taps),
        keep=tuple(keep),
        experts=experts,
        blocks=path,
        outer=tuple(name for name in outer if name != f"{head}.weight"),
        head=head,
        prefix="",
    )


def _linears(block: nn.Module) -> list[str]:
    named = [(name, module) for name, module in block.named_modules() if type(module).__name__ in _LINEARS]
    return [
        name for name, module in named if not any(fnmatchcase(name, pattern) for pattern in _ROUTERS) and module.weight.ndim == 2
    ]


def _head(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def _experts(source: Source, path: str, blocks: nn.ModuleList, place: str) -> Experts | None:
    """The usual layout of experts, if the model has experts: fused in memory, one by one on disk."""
    layout = Experts()
    fused = {n for b in blocks for n, m in b.named_modules() if any(p.ndim == 3 for p in m.parameters(recurse=False))}
    if not fused:
        return None
    usual = any(f"{path}.{n}.{layout.disk}.0.{layout.output}.weight" in source.entries for n in range(len(blocks)))
    if fused != {layout.module} or not usual:
        raise CheckpointError(
            f"{place}, and cannot be inferred: experts in {', '.join(sorted(fused))}. Write a family, with `experts`"
        )
    return layout


def _has(
    name: str, path: str, taps: dict[str, None], keep: dict[str, None], outer: tuple[str, ...], experts: Experts | None
) -> bool:
    if not name.startswith(path + "."):
        return name in outer
    _, _, inside = name.removeprefix(path + ".").partition(".")
    expert = experts is not None and inside.startswith(experts.disk + ".")
    return expert or inside in keep or inside.removesuffix(".weight") in taps


def find_family(source: Source) -> Family:
    """Return the family of a checkpoint, with the names that it has on disk. Raises CheckpointError."""
    family = family_of(source.model_type)
    if family is INFERRED:
        family = infer(source, number_of_blocks(source), f"known are {', '.join(model_types())}")
    if not isinstance(source, PackedSource) and "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{source.folder}: already compressed (quant_method {method!r}); give the original checkpoint")
    return _bare(source, family)


def _bare(source: Source, family: Family) -> Family:
    """Take a family's prefix off its names where a checkpoint leaves it out."""
    bare = family.blocks.removeprefix(family.prefix)
    if not any(n.startswith(family.blocks + ".") for n in source.entries) and any(
        n.startswith(bare + ".") for n in source.entries
    ):
        outer = tuple(name.removeprefix(family.prefix) for name in family.outer)
        family = replace(family, blocks=bare, outer=outer, renames=(*family.renames, ("", family.prefix)))
    return family
