"""What runtimes can load, as data, and what of a plan or a checkpoint they would not: known before a weight is read.

A lint looks at descriptions of sites as `quantization_config` has them, of a finished checkpoint or of one that is planned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.architecture.config import settings
from compress.architecture.family import Family, Site
from compress.architecture.inventory import take_inventory
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.errors import FormatError, RecipeError
from compress.interop import llama_cpp as _llama_cpp
from compress.interop.exporter import lookup
from compress.interop.layout import Layout
from compress.model.detect import find_family
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


Rule = Callable[[Stored, Layout[Any], int], Iterable[Finding]]  # what is stored, the layout, GPUs of tensor parallelism


@dataclass(frozen=True)
class Target:
    """A runtime: the layouts that it reads, in the order of what to take, and its rules, for all layouts and for single ones."""

    name: str
    reads: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    rules_of: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)  # by layout
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by layout, those that every build has fast kernels for
    slow_zeros: tuple[str, ...] = ()  # layouts whose zero points a slow kernel multiplies
    group_sizes: tuple[int, ...] = ()  # with fast kernels; -1: the row
    plain: bool = True  # whether it reads plain numbers, which are never chosen by themselves


def lint(target: str, stored: Stored, parallel: int = 1, formats: Sequence[str] = ()) -> list[Finding]:
    """Return what a runtime will not like. `formats` are the layouts that are wanted; if none, the best that fits is judged."""
    runtime = find_target(target)
    wanted = [name for name in formats if name in runtime.reads or (runtime.plain and lookup(name).plain)]
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
        form = lookup(name)
        if form.plain:
            continue  # as the original
        for rule in (*runtime.rules, *runtime.rules_of.get(name, ())):
            found += rule(stored, form, parallel)
        if not form.own:
            found += _kernels(runtime, stored, form)
    return list(dict.fromkeys(found))


def find_target(name: str) -> Target:
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
    return Stored(family, settings(source), take_inventory(source, family).sites, specs)


def misfits(stored: Stored, name: str) -> list[Finding]:
    """Return why a layout cannot hold sites of a checkpoint, one finding per reason."""
    form = lookup(name)
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


@dataclass(frozen=True)
class Scheme:
    """What weights must have in common where a runtime joins them."""

    codes: str  # datatype or width
    group_size: int | Literal["row"] | None
    zeros: bool  # zero points are stored
    parts: tuple[str, ...]  # roles of what is added to the base

    @classmethod
    def of(cls, spec: Spec) -> Scheme:
        """Take it from the description of a site."""
        base = spec["base"]
        size: int | Literal["row"] | None = base.get("group_size")
        if size == spec["shape"][1]:
            size = "row"
        codes = base.get("datatype") or f"{base.get('bits', base['format'])} bits"
        return cls(codes, size, bool(base.get("zero")), tuple(role for role in ROLES if role in spec and role != "base"))

    def __str__(self) -> str:
        """Say it in a finding."""
        zeros = "asymmetric" if self.zeros else "symmetric"
        return ", ".join((self.codes, f"group {self.group_size}", zeros, *self.parts))


def _groups(stored: Stored, key: Callable[[Site], Any]) -> dict[Any, dict[str, Scheme | None]]:
    """Schemes by site, for sites of one key: None for a site that stays dense; one that is not known yet is left out."""
    result: dict[Any, dict[str, Scheme | None]] = defaultdict(dict)
    for site in stored.sites:
        spec = stored.specs.get(site.name, {})
        if (place := key(site)) is not None and spec is not None:
            result[place][site.name] = Scheme.of(spec) if spec else None
    return result


def _unequal(members: Mapping[str, Scheme | None]) -> str:
    """Name one site per scheme."""
    by: dict[Scheme | None, str] = {}
    for name, scheme in members.items():
        by.setdefault(scheme, name)
    return "; ".join(f"{name} has {scheme or 'dense'}" for scheme, name in by.items())


def siblings(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """Queries, keys and values, and gate and up, become one matrix when they are loaded: one scheme for all."""
    taps = {linear: number for number, group in enumerate(stored.family.taps) if len(group) > 1 for linear in group}
    fused = _groups(stored, lambda s: (s.block, taps[s.kind]) if s.expert is None and s.kind in taps else None)
    for members in fused.values():
        if len(set(members.values())) > 1:
            what = "; expected one scheme, as they are loaded as one matrix. Give them one step of the recipe"
            more = ", or plan with --uniform-siblings"
            yield Finding("refuse", _unequal(members) + what + more)


def experts(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """The experts of a block become one tensor when they are loaded."""
    for block, members in _groups(stored, lambda s: s.block if s.expert is not None else None).items():
        if len(set(members.values())) > 1:
            what = (
                f"block {block}: {_unequal(members)}; expected one scheme for all experts of a block, which are one tensor there"
            )
            yield Finding("refuse", f"{what}. Give all experts one step of the recipe, or keep the native format")


def experts_everywhere(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """transformers takes one scheme for the experts of all blocks, and knows symmetric ones only."""
    members = _groups(stored, lambda s: "all" if s.expert is not None else None).get("all", {})
    if len(set(members.values())) > 1:
        what = f"{_unequal(members)}; expected one scheme for the experts of all blocks"
        yield Finding(
            "refuse", f"{what}, as transformers decodes them by one. Use one step for all experts, or the native format"
        )
    asymmetric = [site for site, scheme in members.items() if scheme is not None and scheme.zeros]
    if asymmetric:
        what = "experts with zero points; transformers reads none of compressed-tensors"
        yield Finding("refuse", f"{_some(asymmetric)}: {what}. Compress experts symmetric, or keep the native format")


def transformers_zeros(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """Zero points of pack-quantized are loaded only decoded, and then with one scheme for all linears."""
    known = {site: spec for site, spec in stored.specs.items() if spec is not None}
    zeros = [site for site, spec in known.items() if spec["base"].get("zero")]
    if not zeros:
        return
    if len({Scheme.of(spec) for spec in known.values()}) > 1:
        what = "zero points beside other schemes; transformers loads zero points only decoded (dequantize=True), and then "
        yield Finding(
            "refuse", f"{_some(zeros)}: {what}decodes all linears by one scheme. Use symmetric grids, or the native format"
        )
    else:
        what = "zero points, which transformers loads only with CompressedTensorsConfig(dequantize=True)"
        yield Finding("warn", f"{_some(zeros)}: {what}; use symmetric grids, or the native format, to keep them packed")


def transformers_one_scheme(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """transformers reads GPTQ and AWQ through gptqmodel and has no settings by module."""
    members = {site: Scheme.of(spec) for site, spec in stored.specs.items() if spec is not None}
    if len(set(members.values())) > 1:
        what = f"{_unequal(members)}; expected one scheme, as transformers has no settings by module for {form.name}"
        yield Finding("refuse", f"{what}. Export to compressed-tensors, or keep the native format")
    yield Finding("warn", f"{form.name}: transformers loads it only with the packages gptqmodel and optimum; install them there")


def tensor_parallel(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
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


def native_is_not_read(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """Families whose names on disk are not those of the model, which only our own reader joins."""
    if form.own:
        return
    if stored.family.transposed:
        what = "weights are stored (in, out), and readers of other layouts expect (out, in)"
        yield Finding("refuse", f"{stored.config.get('model_type')}: {what}; keep the native format and transformers")
    fused = stored.family.experts is not None and stored.family.experts.fused
    packed = [site.name for site in stored.sites if site.expert is not None and site.name in stored.specs]
    if fused and packed:
        what = "experts are one tensor in the original, for which other layouts have no place"
        yield Finding("refuse", f"{_some(packed)}: {what}; leave experts out of the recipe, or keep the native format")


def llama_cpp(stored: Stored, form: Layout[Any], parallel: int) -> Iterable[Finding]:
    """Architecture, and experts of a block as one tensor of one type."""
    try:
        notes = _llama_cpp.check(stored.config)
    except FormatError as error:
        yield Finding("refuse", str(error))
        return
    yield from (Finding("warn", note) for note in notes)
    for block, members in _groups(stored, lambda s: (s.block, s.kind) if s.expert is not None else None).items():
        dense = [site for site, scheme in members.items() if scheme is None]
        if dense and len(dense) < len(members):
            what = f"block {block[0]}: {_some(dense)} dense among {len(members)} experts; expected all or none compressed"
            yield Finding("refuse", f"{what}, as llama.cpp has them as one tensor. Compress all experts of a block")
    if parallel > 1:
        yield Finding("warn", "--tensor-parallel: llama.cpp splits by layer or row on its own; the number says nothing to it")


def _kernels(runtime: Target, stored: Stored, form: Layout[Any]) -> Iterable[Finding]:
    """Widths and group sizes beyond those that every build runs fast."""
    slow: dict[str, list[str]] = defaultdict(list)
    widths = runtime.widths.get(form.name)
    for site, spec in stored.specs.items():
        if spec is None or spec["base"]["format"] != "bitpack":
            continue
        base = spec["base"]
        bits, size = max(base["bits"], form.narrowest), base["group_size"]
        if widths and bits not in widths:
            known = ", ".join(map(str, widths))
            slow[f"{bits} bits in {form.name}: only recent builds read it; {known} bits work everywhere"].append(site)
        elif base.get("zero") and form.name in runtime.slow_zeros:
            what = f"zero points in {form.name}: a slow kernel runs it, where there is one; use symmetric grids or awq"
            slow[what].append(site)
        if runtime.group_sizes and size not in runtime.group_sizes and size != spec["shape"][1]:
            known = ", ".join(map(str, runtime.group_sizes))
            slow[f"group_size={size}: fast kernels have {known} or whole rows; others are slow or not read"].append(site)
    for reason, sites in slow.items():
        yield Finding("warn", f"{_some(sites)}: {reason}")


_SERVER_RULES = (native_is_not_read, siblings, experts, tensor_parallel)
_SERVED = ("compressed-tensors", "gptq", "awq")
_SERVED_WIDTHS = {"compressed-tensors": (4, 8), "gptq": (4, 8), "awq": (4,)}
_SLOW_ZEROS = ("gptq",)
TARGETS = {
    target.name: target
    for target in (
        Target("vllm", _SERVED, _SERVER_RULES, {}, _SERVED_WIDTHS, _SLOW_ZEROS, (32, 64, 128)),
        Target("sglang", _SERVED, _SERVER_RULES, {}, _SERVED_WIDTHS, _SLOW_ZEROS, (32, 64, 128)),
        Target(
            "transformers",
            ("native", *_SERVED),
            (native_is_not_read,),
            {
                "compressed-tensors": (experts_everywhere, transformers_zeros),
                "gptq": (transformers_one_scheme,),
                "awq": (transformers_one_scheme,),
            },
            {"gptq": (2, 3, 4, 8)},
            _SLOW_ZEROS,
        ),
        Target("llama.cpp", ("gguf",), (llama_cpp,), plain=False),
    )
}
