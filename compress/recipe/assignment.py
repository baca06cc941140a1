"""Recipes: what to do to which weights, as typed YAML. Unknown keys are refused; patterns are globs; the first match wins."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

from pydantic import ValidationError

from compress import registry
from compress.errors import RecipeError
from compress.recipe.reading import explain
from compress.recipe.schema import SHRINK, Recipe, Stage, Step


class Named(Protocol):
    """What `resolve` needs to know of a site."""

    @property
    def name(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def expert(self) -> int | None: ...


@dataclass(frozen=True)
class Assignment:
    """What is to be done to one site."""

    site: Any
    step: int
    method: Any  # an options object of the step's method
    fallback: Any  # an options object, or None for the shrunk Hessian
    min_tokens: int


@dataclass(frozen=True)
class StageAssignment:
    """What a stage does to the blocks, and the assignments whose sites match it."""

    method: Any  # an options object
    members: list[Assignment]


def within(stages: Sequence[StageAssignment], block: int) -> list[StageAssignment]:
    """Stages with their members in one block, without those that have none there."""
    found = [StageAssignment(s.method, [a for a in s.members if a.site.block == block]) for s in stages]
    return [stage for stage in found if stage.members]


def stages(found: Sequence[Stage], place: str, assignments: Sequence[Assignment]) -> list[StageAssignment]:
    """Build the options objects of stages and find their members. Raises RecipeError for one that matches nothing."""
    result = []
    for number, stage in enumerate(found):
        build = registry.method(stage.method)
        try:
            method = build(**stage.options)
        except ValidationError as error:
            raise RecipeError(explain(error, list(build.model_fields), f"{place}.{number}.options.")) from error
        inside = [a for a in assignments if a.site.block is not None]
        members = [a for a in inside if any(fnmatchcase(a.site.name, p) for p in stage.patterns)]
        if not members:
            raise RecipeError(
                f"{place}.{number}.match: {' '.join(stage.patterns)!r} takes no weight in a block that the steps compress"
            )
        for member in members:
            if problem := method.check_before(member.site.shape, member.method):
                raise RecipeError(f"{place}.{number}: {stage.method}: {member.site.name}: {problem}")
        result.append(StageAssignment(method, members))
    return result


def _methods_of(step: Step, number: int) -> tuple[Any, Any]:
    """Build the options objects of a step: the method's own, and the fallback's, which takes over the options it knows."""
    build = registry.method(step.method)
    try:
        method = build(**step.options)
    except ValidationError as error:
        raise RecipeError(explain(error, list(build.model_fields), f"steps.{number}.options.")) from error
    if method.scope == "block" and step.min_tokens is not None:
        raise RecipeError(
            f"steps.{number}.min_tokens: {step.method} sees whole blocks and counts no tokens; leave min_tokens out"
        )
    if step.fallback == SHRINK:
        return method, None
    if method.scope == "block":
        raise RecipeError(f"steps.{number}.fallback: {step.method} sees whole blocks and takes none; leave fallback out")
    other = registry.method(step.fallback)
    try:
        return method, other(**{k: v for k, v in step.options.items() if k in other.model_fields})
    except ValidationError as error:
        raise RecipeError(explain(error, list(other.model_fields), f"steps.{number}.fallback options.")) from error


def resolve(recipe: Recipe, sites: Sequence[Named]) -> list[Assignment]:
    """Give each site its step: the first whose pattern matches; a site that none matches is copied.

    Raises RecipeError for a step that matches nothing, for options a method refuses and for shapes it cannot take.
    """
    built = [_methods_of(step, number) for number, step in enumerate(recipe.steps)]
    used: set[int] = set()
    matched: set[int] = set()
    assignments = []
    problems = []
    for site in sites:
        hits = [n for n, step in enumerate(recipe.steps) if any(fnmatchcase(site.name, p) for p in step.patterns)]
        matched |= set(hits)
        if not hits:
            continue
        number = hits[0]
        used.add(number)
        step, (method, fallback) = recipe.steps[number], built[number]
        for options in (method, fallback):
            if options is not None and (problem := options.check(site.shape)):
                problems.append(f"{site.name}: {problem}")
        least = step.min_tokens if step.min_tokens is not None else (site.shape[1] if site.expert is not None else 0)
        assignments.append(Assignment(site, number, method, fallback, least))
    for number, step in enumerate(recipe.steps):
        if number not in used:
            pattern = " ".join(step.patterns)
            why = "an earlier step takes all it matches" if number in matched else _nearest(pattern, sites)
            raise RecipeError(f"steps.{number}.match: {pattern!r} takes no weight of this model; {why}")
    problems += _split_tensors(assignments, sites)
    if problems:
        more = f" ({len(problems)} weights in all)" if len(problems) > 1 else ""
        raise RecipeError(problems[0] + more)
    return assignments


def _split_tensors(assignments: Sequence[Assignment], sites: Sequence[Named]) -> list[str]:
    """Name the tensors that hold several sites of which only some are taken: what is left of them could not be stored."""
    members, taken = Counter(site.tensor for site in sites), Counter(a.site.tensor for a in assignments)
    return [
        f"{name}: one tensor of {members[name]} experts, of which the steps take {count}; match all of them or none"
        for name, count in taken.items()
        if count < members[name]
    ]


def _nearest(pattern: str, sites: Sequence[Named]) -> str:
    names = [site.name for site in sites] or ["nothing: it has none"]
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or names[:1]
    return f"names look like {close[0]!r}; `compress inspect MODEL` lists them"
