"""The native container: how a site's parts become named tensors, and the table in config.json that tells how to read them.

A site `S` owns the tensors of its parts: those of the base are `S.codes`, `S.scale`, ..., those of any other role `S.<role>_...`.
`quantization_config` is `{quant_method, format_version, specs, sites, guard}`: distinct descriptions once, and for each the sites
that have it, with runs of numbers folded: `model.layers.{0-31}.mlp.experts.{0-2,5}.up_proj`. `guard` names a tensor of the
original that is stored empty: a loader that does not know the format meets a tensor of the wrong shape and fails, instead of
filling the model with random weights.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from compress.checkpoint.packing import FORMAT_VERSION, METHOD, Spec, _whole, layout
from compress.checkpoint.tensor_file import MAX_NAME
from compress.errors import FormatError

# The weight file that config.json names: there is none, so a loader that does not know the format stops and says this name. Ours
# takes the entry out before files are looked for; older checkpoints have the older name.
IMPORT_FIRST = "pip-install-compress-llm-and-import-compress-first.safetensors"
ABSENT_FILES = (IMPORT_FIRST, "import-compress-first.safetensors")
FILE_KEY = "transformers_weights"
_MAX_SITES = 500_000  # what a table may unfold to, so that a hostile one cannot fill the memory
_DIGITS = 7  # of the longest number that is folded
_RUN = re.compile(rf"([0-9]{{1,{_DIGITS}}})(?:-([0-9]{{1,{_DIGITS}}}))?")


def _fold(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _is_number(piece: str) -> bool:
    return len(piece) <= _DIGITS and piece.isascii() and piece.isdecimal() and str(int(piece)) == piece


def fold(names: Iterable[str]) -> list[str]:
    """Fold runs of numbers in dotted names into patterns whose unfolding gives the names back, each once. Raises FormatError."""
    shapes: dict[tuple[str | None, ...], set[tuple[int, ...]]] = {}
    for name in names:
        if "{" in name or "}" in name:
            raise FormatError(f"{name}: a name with braces cannot be written into quantization_config; rename the tensor")
        pieces = name.split(".")
        numbers = tuple(int(p) for p in pieces if _is_number(p))
        shapes.setdefault(tuple(None if _is_number(p) else p for p in pieces), set()).add(numbers)
    patterns = []
    for shape, tuples in shapes.items():
        for ranges in _products(tuples):
            fill = iter(ranges)
            patterns.append(".".join("{" + next(fill) + "}" if p is None else p for p in shape))
    return patterns


def _products(tuples: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Write a set of number tuples as products of ranges: last axis first, equal tails joined over the axis before."""
    if not next(iter(tuples)):
        return [()]
    tails: dict[int, set[tuple[int, ...]]] = {}
    for head, *tail in tuples:
        tails.setdefault(head, set()).add(tuple(tail))
    heads: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for head, tail_set in sorted(tails.items()):
        heads.setdefault(frozenset(tail_set), []).append(head)
    return [(_fold(group), *product) for tail_key, group in heads.items() for product in _products(set(tail_key))]


def _ranges(text: str) -> list[range]:
    result: list[range] = []
    for run in text.split(","):
        match = _RUN.fullmatch(run)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise FormatError(f"quantization_config: {text!r:.80} is not a list of numbers such as 0-3,5; the config is damaged")
        result.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return result


def unfold(pattern: str, limit: int = _MAX_SITES) -> list[str]:
    """Return the names that a folded pattern stands for, at most `limit`. Raises FormatError."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    ranges = [_ranges(piece) for piece in pieces[1::2]]
    total = 1
    for choice in ranges:  # counted before anything is made, and not beyond what is needed to refuse
        total = min(total * sum(map(len, choice)), limit + 1)
    fixed = pieces[::2]
    longest = sum(map(len, fixed)) + _DIGITS * len(ranges)
    if total > limit or longest > MAX_NAME or not {"{", "}"}.isdisjoint("".join(fixed)):
        raise FormatError(f"quantization_config: {pattern!r:.80} is no pattern, or one for too many sites; the config is damaged")
    numbers = ([str(n) for run in choice for n in run] for choice in ranges)
    return [
        fixed[0] + "".join(number + piece for number, piece in zip(combination, fixed[1:], strict=True))
        for combination in itertools.product(*numbers)
    ]


def write_table(specs: Mapping[str, Spec], guard: str | None) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint, given the description of each of its sites."""
    distinct: list[Spec] = []
    members: list[list[str]] = []
    for name, spec in specs.items():
        if spec not in distinct:
            distinct.append(spec)
            members.append([])
        members[distinct.index(spec)].append(name)
    sites = {pattern: number for number, names in enumerate(members) for pattern in fold(names)}
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "guard": guard, "specs": distinct, "sites": sites}


def config_with(config: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a checkpoint in the native format, given that of the original and the table of its sites."""
    return {**config, FILE_KEY: IMPORT_FIRST, "quantization_config": dict(table)}


def _belongs(tensor: str, table: Mapping[str, Spec]) -> bool:
    """Whether a site is made of a tensor of the original: a linear's own weight, or one tensor of all experts."""
    owner, _, leaf = tensor.rpartition(".")
    return (owner in table and leaf == "weight") or f"{owner}.0.{leaf}" in table


def read_table(config: Mapping[str, Any]) -> dict[str, Spec]:
    """Return the description of each compressed site of a `quantization_config`, all of them valid. Raises FormatError."""
    version = config.get("format_version")
    if not _whole(version, 1, FORMAT_VERSION):
        raise FormatError(
            f"quantization_config: format_version is {version!r:.80}; this compress reads up to {FORMAT_VERSION}: upgrade it"
        )
    specs, sites, guard = config.get("specs"), config.get("sites"), config.get("guard")
    if not isinstance(specs, list) or not isinstance(sites, dict) or not all(isinstance(spec, dict) for spec in specs):
        raise FormatError("quantization_config: no specs and sites; the config is damaged, fetch the checkpoint again")
    for spec in specs:
        layout(spec)
    table: dict[str, Spec] = {}
    for pattern, number in sites.items():
        if not isinstance(pattern, str) or not _whole(number, 0, len(specs) - 1):
            raise FormatError(f"quantization_config: {pattern!r:.80} has spec {number!r:.80}; expected 0 to {len(specs) - 1}")
        for name in unfold(pattern, _MAX_SITES - len(table)):
            if name in table:
                raise FormatError(f"quantization_config: {name!r:.80} is described twice; the config is damaged")
            table[name] = specs[number]
    if guard is not None and not (isinstance(guard, str) and _belongs(guard, table)):
        raise FormatError(f"quantization_config: guard is {guard!r:.80}; expected the tensor of a site. The config is damaged")
    return table
