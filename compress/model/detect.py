"""A family for a model that none is written for: what its modules show, or an error that says what they do not show.

Which linears read one tensor, and where scales can move, is seen in one call of each kind of block (`reads`); where it cannot be
called on meta, every linear gets a tap of its own: more work, never wrong. Names on disk are those that transformers maps to the
model's parameters when it loads a checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from compress.architecture.config import number_of_blocks
from compress.architecture.family import Experts, Family, Scaling
from compress.architecture.known import INFERRED, family_of, model_types
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import CheckpointError, FamilyError
from compress.model.block_calls import Recorder, replaced
from compress.model.disk_names import DiskNames, experts_layout, fused_experts
from compress.model.meta import build_model, decoder_path, without_weights
from compress.model.reads import Reads, norm_offset, trace

# Small linears that decide where tokens go: routers and gates stay as they are.
_SMALLEST = 8  # rows or columns: smaller matrices mix streams or mark heads, and stay as they are
_ROUTERS = ("*router*", "*.gate", "gate", "*shared_expert_gate*", "*.wg")


def infer(source: Source, blocks: int, known: str) -> Family:
    """Return the family of a source for whose model_type none is written; a CheckpointError names what is missing."""
    place = f"{source.folder}: model_type {source.model_type!r} is not a known family ({known})"
    try:
        model: Any = build_model(source.config, str(source.folder), torch.float32)
    except CheckpointError as error:
        raise FamilyError(f"{place}, and cannot be inferred, because {str(error).partition(': ')[2]}") from error
    text = decoder_path(model)
    path, block_list = _block_list(model, text, blocks, place)
    names = DiskNames(model)
    parameters = {name: names.parameter(name) for name in source.entries}
    base = _on_disk(parameters, path)
    inside: dict[int, dict[str, str]] = {number: {} for number in range(blocks)}  # disk name within a block -> whole
    outside = []
    for name in source.entries:
        number, _, rest = name.removeprefix(f"{base}.").partition(".")
        place_in_list = int(number) if name.startswith(f"{base}.") and number.isdecimal() else -1
        if place_in_list in inside:
            inside[place_in_list][rest] = name
        elif not name.startswith(f"{base}."):
            outside.append(name)
    head = _head(model)
    experts: Experts | None = None
    taps: dict[str, None] = {}
    keep: dict[str, None] = {}
    of_experts: set[str] = set()
    aside = [n for n in outside if not parameters[n].startswith((text, f"{head}."))]
    for at, block in enumerate(block_list):
        experts = experts or experts_layout(names, block, f"{path}.{at}.", inside[at])
        linears = {f"{path}.{at}.{name}.weight" for name in _linears(block)}
        for rest, name in inside[at].items():
            if _is_expert(experts, rest):
                of_experts.add(name)
            elif parameters[name] in linears:
                taps[rest.removesuffix(".weight")] = None
            elif parameters[name] in names.known or _ignored(model, name):
                keep[rest] = None
            if parameters[name] not in names.known and name not in of_experts:
                aside.append(name)
    own = {n: p for n, p in parameters.items() if n != p and p in names.known and n not in of_experts}
    top = next((name.removesuffix(".weight") for name in outside if parameters[name] == f"{head}.weight"), head)
    found = _reads(model, path, block_list, list(inside.values()), parameters, taps, experts)
    return Family(
        source.model_type,
        taps=found.taps,
        alternatives=found.taps,
        scalings=found.scalings,
        norm_offset=found.norm_offset,
        keep=tuple(keep),
        experts=experts,
        blocks=base,
        outer=tuple(name for name in outside if name not in aside and name != f"{top}.weight"),
        head=top,
        aside=_globs(aside, set(source.entries) - set(aside)),
        tied=bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        transposed=any(type(module).__name__ == "Conv1D" for module in block_list.modules()),
        renames=((f"{base}.", f"{path}."),) if base != path else (),
        names={name: own[name] for name in names.in_order(own)},
        prefix="",
    )


@dataclass(frozen=True)
class _Found:
    """What the calls of all blocks showed, by names on disk."""

    taps: tuple[tuple[str, ...], ...]
    scalings: tuple[Scaling, ...] = ()
    norm_offset: float = 0.0


def _reads(
    model: Any,
    path: str,
    blocks: nn.ModuleList,
    inside: Sequence[Mapping[str, str]],
    parameters: Mapping[str, str],
    taps: Mapping[str, None],
    experts: Experts | None,
) -> _Found:
    """Call every kind of block once on meta, and put together what that shows and no block contradicts."""
    seen: list[Reads] = []
    names: list[dict[str, str]] = []  # path of a module within a block -> its name on disk
    known: dict[Any, tuple[Any, Reads]] = {}

    def outputs(number: int, args: Any, kwargs: Any, main: torch.Tensor) -> Any:
        block = blocks[number]
        mine = {parameters[whole].removeprefix(f"{path}.{number}."): rest for rest, whole in inside[number].items()}
        mine = {inner.removesuffix(".weight"): rest.removesuffix(".weight") for inner, rest in mine.items()}
        kind = tuple((name, type(module), tuple(mine)) for name, module in block.named_modules())
        if kind not in known:
            linears = {inner for inner, rest in mine.items() if rest in taps}
            fused = fused_experts(block)
            readers = {} if experts is None else {p: tuple(f"{experts.disk}.*.{n}" for n in experts.inputs) for p in fused}
            known[kind] = trace(block, linears, args, kwargs, main, {p: readers.get(p, ()) for p in fused})
        seen.append(known[kind][1])
        names.append(mine)
        return known[kind][0]

    try:
        with without_weights(model, path), torch.no_grad():
            recorder = Recorder(path, outputs)
            with replaced(blocks, recorder):
                model.get_decoder()(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    except Exception:  # models that cannot be streamed still have weights that can be rounded without text
        return _Found(tuple((name,) for name in taps))
    return _Found(_taps(seen, names, taps), *_scalings(model, path, seen, names, experts))


def _taps(seen: Sequence[Reads], names: Sequence[Mapping[str, str]], taps: Mapping[str, None]) -> tuple[tuple[str, ...], ...]:
    """Groups of linears that read one tensor in every block where two of them are."""
    together: dict[str, set[str]] = {}
    apart: set[tuple[str, str]] = set()
    for reads, known in zip(seen, names, strict=True):
        groups = [[known[inner] for inner in group] for group in reads.taps]
        for group in groups:
            for name in group:
                together.setdefault(name, set()).update(group)
            apart |= {(one, other) for one in group for rest in groups if rest is not group for other in rest}
    found: list[tuple[str, ...]] = []
    done: set[str] = set()
    for name in taps:
        if name not in done:
            group = [other for other in taps if other in together.get(name, {name}) and other not in done]
            if any((one, other) in apart for one in group for other in group):
                group = [name]
            found.append(tuple(group))
            done.update(group)
    return tuple(found)


def _scalings(
    model: Any, path: str, seen: Sequence[Reads], names: Sequence[Mapping[str, str]], experts: Experts | None
) -> tuple[tuple[Scaling, ...], float]:
    """Where scales can move, and what norms add to their weight: that of most, if not of all."""
    found: dict[tuple[str, str], set[str]] = {}  # rows, producer -> readers in all blocks
    offsets: dict[str, float | None] = {}
    wrong: set[str] = set()
    for number, (reads, known) in enumerate(zip(seen, names, strict=True)):
        block = model.get_submodule(f"{path}.{number}")
        for norm, readers in reads.norms.items():
            if norm in known:
                found.setdefault(("all", known[norm]), set()).update(known.get(reader, reader) for reader in readers)
                if known[norm] not in offsets:
                    offsets[known[norm]] = norm_offset(block.get_submodule(norm))
        wrong |= {known[inner] for inner in known if inner.endswith("norm") and inner not in reads.norms}
        for rows, pairs in (("all", reads.products), ("values", reads.values)):
            for producer, reader in pairs.items():
                found.setdefault((rows, known[producer]), set()).add(known[reader])
    common = Counter(offset for offset in offsets.values() if offset is not None).most_common(1)
    offset = common[0][0] if common else 0.0
    scalings = [
        Scaling(producer, tuple(sorted(readers)), "values" if rows == "values" else "all")
        for (rows, producer), readers in found.items()
        if producer not in wrong and offsets.get(producer, offset) == offset
    ]
    if experts is not None and len(experts.inputs) == 2:
        scalings.append(Scaling(f"{experts.disk}.*.{experts.inputs[1]}", (f"{experts.disk}.*.{experts.output}",)))
    return tuple(scalings), offset


def _block_list(model: Any, text: str, blocks: int, place: str) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, and its path."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == blocks]
    lists = [(n, m) for n, m in lists if n.startswith(text) and any(_linears(block) for block in m)]
    lists = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]  # none within a block
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise FamilyError(
            f"{place}, and cannot be inferred: lists of {blocks} blocks: {found}; expected one. Write a family, with `blocks`"
        )
    return lists[0]


def _on_disk(parameters: Mapping[str, str], path: str) -> str:
    """What precedes the number of a block on disk, where it is `path` in the model."""
    found: Counter[str] = Counter()
    for name, parameter in parameters.items():
        if parameter.startswith(f"{path}."):
            number = parameter.removeprefix(f"{path}.").partition(".")[0]
            before, dot, _ = name.partition(f".{number}.")
            if dot:
                found[before] += 1
    return found.most_common(1)[0][0] if found else path


def _ignored(model: Any, name: str) -> bool:
    """Whether the model's class knows of tensors of this name and has no use for them."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def _is_expert(experts: Experts | None, rest: str) -> bool:
    """Whether a name within a block is that of experts' matrices."""
    if experts is None:
        return False
    wholes = {f"{experts.disk}.{name}" for name in (*experts.inputs, experts.output)} | {name for _, name in experts.tensors}
    number, _, linear = rest.removeprefix(f"{experts.disk}.").partition(".")
    single = number.isdecimal() and linear.removesuffix(".weight") in (*experts.inputs, experts.output)
    return rest in wholes or (rest.startswith(f"{experts.disk}.") and single)


def _globs(names: Iterable[str], others: Collection[str]) -> tuple[str, ...]:
    """The shortest prefixes, as globs, that these names have and no others do; whole names where there is none."""
    taken = {prefix for name in others for prefix in _prefixes(name)}
    found: dict[str, None] = {}
    for name in names:
        prefix = next((prefix for prefix in _prefixes(name) if prefix not in taken), None)
        found[name if prefix is None else f"{prefix}*"] = None
    return tuple(found)


def _prefixes(name: str) -> Iterator[str]:
    pieces = name.split(".")
    return (".".join(pieces[:count]) + "." for count in range(1, len(pieces)))


def _linears(block: nn.Module) -> list[str]:
    named = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    return [n for n, m in named if not any(fnmatchcase(n, pattern) for pattern in _ROUTERS) and _multiplies(m)]


def _multiplies(linear: Any) -> bool:
    """Whether a linear is a product with a matrix of some size: some have a forward of their own, and a few are tiny."""
    if linear.weight.ndim != 2 or min(linear.weight.shape) < _SMALLEST:
        return False
    if type(linear).forward is nn.Linear.forward or type(linear).__name__ == "Conv1D":
        return True
    try:
        rows = linear(torch.empty(2, linear.in_features, device="meta", dtype=linear.weight.dtype))
    except Exception:  # whatever the code of a class raises that wants another input
        return False
    return isinstance(rows, torch.Tensor) and tuple(rows.shape) == (2, linear.out_features)


def _head(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def find_family(source: Source) -> Family:
    """Return the family of a checkpoint, with the names that it has on disk. Raises CheckpointError."""
    family = family_of(source.model_type)
    if family is INFERRED:
        family = infer(source, number_of_blocks(source), f"known are {', '.join(model_types())}")
    if not isinstance(source, PackedSource) and "quantization_config" in source.config and not _left_over(source):
        method = source.config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{source.folder}: already compressed (quant_method {method!r}); give the original checkpoint")
    return _bare(source, family)


def _left_over(source: Source) -> bool:
    """Whether a quantization_config is that of other files: every tensor is plain numbers, as after merging or decoding."""
    return all(entry.dtype in ("F64", "F32", "F16", "BF16") for entry in source.entries.values())


def _bare(source: Source, family: Family) -> Family:
    """Take a family's prefix off its names where a checkpoint leaves it out."""
    bare = family.blocks.removeprefix(family.prefix)
    if not any(n.startswith(family.blocks + ".") for n in source.entries) and any(
        n.startswith(bare + ".") for n in source.entries
    ):
        outer = tuple(name.removeprefix(family.prefix) for name in family.outer)
        family = replace(family, blocks=bare, outer=outer, renames=(*family.renames, ("", family.prefix)))
    return family
