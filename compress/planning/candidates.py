"""Candidates of a plan: methods with options, as the command line gives them or as they are by default."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compress import registry
from compress.architecture.family import Site
from compress.errors import CheckpointError, RecipeError
from compress.recipe import reading as recipe_reading
from compress.system.side_files import read_text

_LONGEST = 1 << 20  # bytes of a file of candidates
WIDTHS = (2, 3, 4, 5, 6, 8)
FINE = (2, 3)  # bits at which smaller groups pay
GROUP, FINE_GROUPS = 128, (64, 32)


@dataclass(frozen=True)
class Candidate:
    """A method with options."""

    method: str
    options: dict[str, Any]
    build: Any = field(compare=False, repr=False)  # the options object

    @property
    def label(self) -> str:
        """The candidate in a word or two."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.method.removeprefix('quant/')}({options})"

    def plain(self) -> dict[str, Any]:
        """As JSON values, all defaults spelt out."""
        return {"method": self.method, "options": self.build.model_dump(mode="json")}


def candidate(method: str, options: dict[str, Any]) -> Candidate:
    """A candidate, its options validated. Raises RecipeError."""
    path = method if "/" in method else f"quant/{method}"
    build = registry.method(path)
    if not path.startswith(("quant/", "prune/")) or build.scope != "site":
        raise RecipeError(f"candidate {path}: works on whole blocks; a candidate compresses one weight at a time")
    try:
        return Candidate(path, options, build(**options))
    except ValidationError as error:
        raise RecipeError(recipe_reading.explain(error, list(build.model_fields), f"candidate {path}: ")) from error


def parse_candidates(texts: Sequence[str]) -> list[Candidate]:
    """Read candidates: `gptq:bits=2,group_size=64`, or a YAML file with a list of `method` and `options`. Raises RecipeError."""
    found = []
    for text in texts:
        if Path(text).suffix in (".yaml", ".yml"):
            found += _from_file(Path(text))
            continue
        method, _, settings = text.partition(":")
        options: dict[str, Any] = {}
        for setting in filter(None, settings.split(",")):
            key, equals, value = setting.partition("=")
            if not equals:
                raise RecipeError(f"--candidates {text}: expected METHOD:option=value,option=value, or a YAML file")
            try:
                options[key.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise RecipeError(f"--candidates {text}: {key} is not a YAML value ({error})") from error
        found.append(candidate(method.strip(), options))
    return found


def _from_file(path: Path) -> list[Candidate]:
    try:
        values = yaml.safe_load(read_text(path, _LONGEST))
    except CheckpointError as error:
        raise RecipeError(error.message) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, list) or not values:
        raise RecipeError(f"{path}: expected a list of candidates, each with a method: and options:")
    found = []
    for value in values:
        if not isinstance(value, dict) or set(value) - {"method", "options"} or not isinstance(value.get("method"), str):
            raise RecipeError(f"{path}: {value!r}: expected method: and options: and nothing else")
        options = value.get("options") or {}
        if not isinstance(options, dict):
            raise RecipeError(f"{path}: options: {options!r}; expected a mapping")
        found.append(candidate(value["method"], options))
    return found


def default_candidates(methods: Sequence[str], sites: Sequence[Site]) -> list[Candidate]:
    """2 to 8 bits, groups of 128 and at 2 and 3 bits of 64 and 32; whole rows too where 128 does not divide every weight."""
    settings = [(bits, GROUP) for bits in WIDTHS] + [(bits, group) for bits in FINE for group in FINE_GROUPS]
    if any(site.shape[1] % GROUP for site in sites):
        settings += [(bits, -1) for bits in WIDTHS]
    found: dict[str, Candidate] = {}
    for method in methods:
        known = registry.method(method if "/" in method else f"quant/{method}").model_fields
        for bits, group in sorted(settings):
            options = {k: v for k, v in (("bits", bits), ("group_size", group)) if k in known}
            one = candidate(method, options)
            if any(one.build.check(site.shape) is None for site in sites):
                found.setdefault(one.label, one)
    return list(found.values())


def check_candidates(candidates: Sequence[Candidate], sites: Sequence[Site]) -> None:
    """Raise RecipeError for a candidate that fits nothing, for two that are the same, and for a weight that none fits."""
    if not candidates:
        raise RecipeError("--candidates: none is left; give some")
    seen: set[str] = set()
    for one in candidates:
        key = json.dumps(one.plain(), sort_keys=True)
        if key in seen:
            raise RecipeError(f"--candidates: {one.label} is there twice")
        seen.add(key)
        problems = [one.build.check(site.shape) for site in sites]
        if all(problems):
            raise RecipeError(f"--candidates: {one.label} fits no weight of this model; {sites[0].name}: {problems[0]}")
    for site in sites:
        if all(one.build.check(site.shape) for one in candidates):
            what = candidates[0].build.check(site.shape)
            raise RecipeError(f"--candidates: none fits {site.name}, {site.shape[0]} x {site.shape[1]}; the first: {what}")
