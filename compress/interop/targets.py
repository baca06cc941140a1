"""What runtimes can load, as data, and what of a plan or a checkpoint they would not: known before a weight is read.

A lint looks at descriptions of sites as `quantization_config` has them, of a finished checkpoint or of one that is planned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compress import registry
from compress.architecture.config import settings
from compress.architecture.family import Family, Site
from compress.architecture.inventory import claim
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import FormatError, RecipeError
from compress.interop import llama_cpp as _llama_cpp
from compress.model.detect import find as find_family
from compress.weights.weight import ROLES

Spec = Mapping[str, Any]
Severity = Literal["refuse", "warn"]
_SHOWN = 3  # places in a sentence
_COLUMN_TILE = 64  # rows of a weight that fast kernels take at a time


@dataclass(frozen=True)
class Finding:
    """One thing that a runtime will not load, or load and run badly: place, what is there, what is expected, what to do."""

    severity: Severity
    message: str


@dataclass(frozen=True)
class Stored:
    """What is known of a checkpoint, or of one that is planned."""

    family: Family
    config: Mapping[str, Any]  # config.json, of the language model
    sites: Sequence[Site]
    specs: Mapping[str, Spec | None]  # of compressed sites; None: known only when it is done


@dataclass(frozen=True)
class Target:
    """A runtime: the layouts that it reads, in the order of what to take, and its rules by layout."""

    name: str
    reads: tuple[str, ...]
    rules: tuple[Callable[[Stored, str, int], Iterable[Finding]], ...] = ()
    widths: Mapping[str, tuple[int, ...]] | None = None  # by layout, those that every build has fast kernels for
    group_sizes: tuple[int, ...] = ()  # with fast kernels; -1: the row
    plain: bool = True  # whether it reads plain numbers, which are never chosen by themselves


def lint(target: str, stored: Stored, parallel: int = 1, formats: Sequence[str] = ()) -> list[Finding]:
    """Return what a runtime will not like. `formats` are the layouts that are wanted; if none, the best that fits is judged."""
    runtime = find(target)
    wanted = [name for name in formats if name in runtime.reads or (name == "dense" and runtime.plain)]
    if formats and not wanted:
        what = f"--format {' '.join(formats)}: {runtime.name} reads {', '.join(runtime.reads)}; add --format {runtime.reads[0]}"
        return [Finding("refuse", what)]
    judged = wanted or _that_fit(runtime, stored)
    if not judged:
        return [_no_format(runtime, stored)]
    found = []
    if unknown := [name for name, spec in stored.specs.items() if spec is None]:
        what = f"{_some(unknown)}: how it is stored depends on the weights; it is checked again when it is exported"
        found.append(Finding("warn", what))
    for name in judged if wanted else judged[:1]:
        found += misfits(stored, name)
        if name == "dense":
            continue  # as the original
        for rule in runtime.rules:
            found += rule(stored, name, parallel)
        if name != "native":
            found += _kernels(runtime, stored, name)
    return list(dict.fromkeys(found))


def find(name: str) -> Target:
    """Return a target by name. Raises RecipeError."""
    if name not in TARGETS:
        raise RecipeError(f"--target {name}: no such runtime; known are {', '.join(TARGETS)}")
    return TARGETS[name]


def raise_refused(option: str, found: Iterable[Finding]) -> None:
    """Raise RecipeError with what is refused, if there is something; `option` is what was asked for."""
    if refused := [finding.message for finding in found if finding.severity == "refuse"]:
        more = f"\nand {len(refused) - 10} more" if len(refused) > 10 else ""
        raise RecipeError(f"{option}: does not fit\n" + "\n".join(refused[:10]) + more)


def of_checkpoint(source: Source) -> Stored:
    """What is known of a finished checkpoint, dense or compressed. Raises CheckpointError."""
    family = find_family(source)
    specs = source.table if isinstance(source, PackedSource) else {}
    return Stored(family, settings(source), claim(source, family).sites, specs)


def misfits(stored: Stored, name: str) -> list[Finding]:
    """Return why a layout cannot hold sites of a checkpoint, one finding per reason."""
    form = registry.lookup("export", name.replace("-", "_"))
    reasons: dict[str, list[str]] = defaultdict(list)
    for site, spec in stored.specs.items():
        if spec is None:
            continue
        try:
            form.scheme(spec, form.scales[-1] if form.scales else None)
        except FormatError as error:
            reasons[str(error)].append(site)
    return [
        Finding("refuse", f"{_some(sites)}: {reason}; {name} holds {form.holds}. Change the options of these weights")
        for reason, sites in reasons.items()
    ]


def _that_fit(runtime: Target, stored: Stored) -> list[str]:
    return [name for name in runtime.reads if not misfits(stored, name)]


def _no_format(runtime: Target, stored: Stored) -> Finding:
    reasons = [f"{name}: {misfits(stored, name)[0].message}" for name in runtime.reads]
    instead = ". What it always reads are plain numbers: --format dense" if runtime.plain else ""
    return Finding("refuse", f"no layout that {runtime.name} reads holds this. " + " | ".join(reasons) + instead)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def _scheme(spec: Spec | None) -> str:
    """What fused weights must have in common, in words."""
    if spec is None:
        return "dense"
    base = spec["base"]
    zero = "asymmetric" if base.get("zero") else "symmetric"
    size = "row" if base.get("group_size") == spec["shape"][1] else base.get("group_size")
    name = base.get("datatype") or f"{base.get('bits', base['format'])} bits"
    return f"{name}, group {size}, {zero}" + ("".join(f", {role}" for role in ROLES if role in spec and role != "base"))


def _groups(stored: Stored, key: Callable[[Site], Any]) -> dict[Any, dict[str, str]]:
    """Scheme by site, for sites of one key; a site that is not compressed is dense, and one that is not known is left out."""
    result: dict[Any, dict[str, str]] = defaultdict(dict)
    for site in stored.sites:
        if (place := key(site)) is not None and stored.specs.get(site.name, {}) is not None:
            result[place][site.name] = _scheme(stored.specs.get(site.name))
    return result


def _unequal(members: Mapping[str, str]) -> str:
    """Name one site per scheme."""
    by: dict[str, str] = {}
    for name, scheme in members.items():
        by.setdefault(scheme, name)
    return "; ".join(f"{name} has {scheme}" for scheme, name in by.items())


def siblings(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """Queries, keys and values, and gate and up, become one matrix when they are loaded: one scheme for all."""
    taps = {linear: number for number, group in enumerate(stored.family.taps) if len(group) > 1 for linear in group}
    fused = _groups(stored, lambda s: (s.block, taps[s.kind]) if s.expert is None and s.kind in taps else None)
    for members in fused.values():
        if len(set(members.values())) > 1:
            what = "; expected one scheme, as they are loaded as one matrix. Give them one step of the recipe"
            more = ", or plan with --uniform-siblings"
            yield Finding("refuse", _unequal(members) + what + more)


def experts(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """The experts of a block become one tensor when they are loaded."""
    for block, members in _groups(stored, lambda s: s.block if s.expert is not None else None).items():
        if len(set(members.values())) > 1:
            what = (
                f"block {block}: {_unequal(members)}; expected one scheme for all experts of a block, which are one tensor there"
            )
            yield Finding("refuse", f"{what}. Give all experts one step of the recipe, or keep the native format")


def experts_everywhere(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """transformers takes one scheme for the experts of all blocks, and knows symmetric ones only."""
    if name != "compressed-tensors":
        return
    members = _groups(stored, lambda s: "all" if s.expert is not None else None).get("all", {})
    if len(set(members.values())) > 1:
        what = f"{_unequal(members)}; expected one scheme for the experts of all blocks"
        yield Finding(
            "refuse", f"{what}, as transformers decodes them by one. Use one step for all experts, or the native format"
        )
    asymmetric = [site for site, scheme in members.items() if "asymmetric" in scheme]
    if asymmetric:
        what = "experts with zero points; transformers reads none of compressed-tensors"
        yield Finding("refuse", f"{_some(asymmetric)}: {what}. Compress experts symmetric, or keep the native format")


def transformers_zeros(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """Zero points of pack-quantized are loaded only decoded, and then with one scheme for all linears."""
    if name != "compressed-tensors":
        return
    known = {site: spec for site, spec in stored.specs.items() if spec is not None}
    zeros = [site for site, spec in known.items() if spec["base"].get("zero")]
    if not zeros:
        return
    if len({_scheme(spec) for spec in known.values()}) > 1:
        what = "zero points beside other schemes; transformers loads zero points only decoded (dequantize=True), and then "
        yield Finding(
            "refuse", f"{_some(zeros)}: {what}decodes all linears by one scheme. Use symmetric grids, or the native format"
        )
    else:
        what = "zero points, which transformers loads only with CompressedTensorsConfig(dequantize=True)"
        yield Finding("warn", f"{_some(zeros)}: {what}; use symmetric grids, or the native format, to keep them packed")


def transformers_one_scheme(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """transformers reads GPTQ and AWQ through gptqmodel and has no settings by module."""
    if name not in ("gptq", "awq"):
        return
    members = {site: _scheme(spec) for site, spec in stored.specs.items() if spec is not None}
    if len(set(members.values())) > 1:
        what = f"{_unequal(members)}; expected one scheme, as transformers has no settings by module for {name}"
        yield Finding("refuse", f"{what}. Export to compressed-tensors, or keep the native format")
    yield Finding("warn", f"{name}: transformers loads it only with the packages gptqmodel and optimum; install them there")


def tensor_parallel(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """Shards of a weight need whole groups, and rows in tiles of kernels."""
    if parallel == 1:
        return
    rows = set(_outputs(stored.family))
    reasons: dict[tuple[Severity, str], list[str]] = defaultdict(list)
    for site in stored.sites:
        spec = stored.specs.get(site.name)
        if spec is None:
            continue
        outs, ins = site.shape
        leaf = site.kind.rpartition(".")[2]
        if leaf in rows:  # these are cut along the columns
            size = spec["base"].get("group_size", ins)
            works = [n for n in (1, 2, 4, 8, 16) if ins % n == 0 and (size == ins or ins // n % size == 0)]
            if parallel not in works and (ins % parallel or (size != ins and ins // parallel % size)):
                what = f"in={ins} over {parallel} GPUs gives {ins / parallel:g} columns each, no whole groups of {size}"
                fix = f"use a group size that divides them, or --tensor-parallel {max(works)} at most"
                reasons["refuse", f"{what}; expected whole groups. What to do: {fix}"].append(site.name)
        elif outs % parallel:
            works = [n for n in (1, 2, 4, 8, 16) if outs % n == 0]
            what = f"out={outs} is no multiple of {parallel} GPUs"
            reasons["refuse", f"{what}; use --tensor-parallel {max(works)} at most"].append(site.name)
        elif outs // parallel % _COLUMN_TILE:
            what = f"out={outs} over {parallel} GPUs gives {outs // parallel} rows each"
            reasons["warn", f"{what}; fast kernels take multiples of {_COLUMN_TILE}, others are slow"].append(site.name)
    for (severity, reason), sites in reasons.items():
        yield Finding(severity, f"{_some(sites)}: {reason}")


def _outputs(family: Family) -> list[str]:
    """Last names of linears that end attention or an MLP: they are cut along their inputs."""
    found = {"o_proj", "down_proj", "out_proj", "fc2", "c_proj", "w2"}
    return sorted(found | ({family.experts.output} if family.experts is not None else set()))


def native_is_not_read(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """Families whose names on disk are not those of the model, which only our own reader joins."""
    if name == "native":
        return
    if stored.family.transposed:
        what = "weights are stored (in, out), and readers of other layouts expect (out, in)"
        yield Finding("refuse", f"{stored.config.get('model_type')}: {what}; keep the native format and transformers")
    fused = stored.family.experts is not None and stored.family.experts.fused
    packed = [site.name for site in stored.sites if site.expert is not None and site.name in stored.specs]
    if fused and packed:
        what = "experts are one tensor in the original, for which other layouts have no place"
        yield Finding("refuse", f"{_some(packed)}: {what}; leave experts out of the recipe, or keep the native format")


def llama_cpp(stored: Stored, name: str, parallel: int) -> Iterable[Finding]:
    """Architecture, and experts of a block as one tensor of one type."""
    try:
        notes = _llama_cpp.check(stored.config)
    except FormatError as error:
        yield Finding("refuse", str(error))
        return
    yield from (Finding("warn", note) for note in notes)
    for block, members in _groups(stored, lambda s: (s.block, s.kind) if s.expert is not None else None).items():
        dense = [site for site, scheme in members.items() if scheme == "dense"]
        if dense and len(dense) < len(members):
            what = f"block {block[0]}: {_some(dense)} dense among {len(members)} experts; expected all or none compressed"
            yield Finding("refuse", f"{what}, as llama.cpp has them as one tensor. Compress all experts of a block")
    if parallel > 1:
        yield Finding("warn", "--tensor-parallel: llama.cpp splits by layer or row on its own; the number says nothing to it")


def _kernels(runtime: Target, stored: Stored, name: str) -> Iterable[Finding]:
    """Widths and group sizes beyond those that every build runs fast."""
    slow: dict[str, list[str]] = defaultdict(list)
    widths = (runtime.widths or {}).get(name)
    for site, spec in stored.specs.items():
        if spec is None or spec["base"]["format"] != "bitpack":
            continue
        base = spec["base"]
        bits, size = base["bits"], base["group_size"]
        if name == "awq":
            bits = max(bits, 4)
        if widths and bits not in widths:
            slow[f"{bits} bits in {name}: only recent builds read it; {', '.join(map(str, widths))} bits work everywhere"].append(
                site
            )
        elif widths and base.get("zero") and name == "gptq":
            slow["zero points in gptq: a slow kernel runs it, where there is one; use symmetric grids or awq"].append(site)
        if runtime.group_sizes and size not in runtime.group_sizes and size != spec["shape"][1]:
            known = ", ".join(map(str, runtime.group_sizes))
            slow[f"group_size={size}: fast kernels have {known} or whole rows; others are slow or not read"].append(site)
    for reason, sites in slow.items():
        yield Finding("warn", f"{_some(sites)}: {reason}")


_SERVER_RULES = (native_is_not_read, siblings, experts, tensor_parallel)
TARGETS = {
    target.name: target
    for target in (
        Target(
            "vllm",
            ("compressed-tensors", "gptq", "awq"),
            _SERVER_RULES,
            {"compressed-tensors": (4, 8), "gptq": (4, 8), "awq": (4,)},
            (32, 64, 128),
        ),
        Target(
            "sglang",
            ("compressed-tensors", "gptq", "awq"),
            _SERVER_RULES,
            {"compressed-tensors": (4, 8), "gptq": (4, 8), "awq": (4,)},
            (32, 64, 128),
        ),
        Target(
            "transformers",
            ("native", "compressed-tensors", "gptq", "awq"),
            (native_is_not_read, experts_everywhere, transformers_zeros, transformers_one_scheme),
            {"gptq": (2, 3, 4, 8)},
        ),
        Target("llama.cpp", ("gguf",), (llama_cpp,), plain=False),
    )
}
