"""Recipes: what to do to which weights, as typed YAML. Unknown keys are refused; patterns are globs; the first match wins."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from compress import registry
from compress.errors import RecipeError
from compress.recipe_data import Data

SHRINK = "shrink"
_STAGE_KINDS = {"transforms": ("transform",), "tuning": ("tune", "retrain"), "retraining": ("retrain",)}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Strict):
    """A method for the sites whose disk names match."""

    match: str | tuple[str, ...]
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    min_tokens: Annotated[int, Field(ge=0)] | None = None  # None: for experts as many as the weight has columns, else 0
    fallback: str = SHRINK  # below min_tokens: a method, or "shrink" towards the mean Hessian of the block's experts

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs of this step."""
        return (self.match,) if isinstance(self.match, str) else self.match

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        stages = [kind for kinds in _STAGE_KINDS.values() for kind in kinds]
        known = registry.methods(tuple(kind for kind in registry.KINDS if kind not in stages))
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"no method {value!r}; known are {', '.join(known)}{hint}")
        return value

    @field_validator("fallback")
    @classmethod
    def _known_fallback(cls, value: str) -> str:
        return value if value == SHRINK else cls._known_method(value)


class Stage(_Strict):
    """A method that works on every block before its weights are compressed, or after, on the sites whose disk names match."""

    method: str
    match: str | tuple[str, ...] = "*.*"
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs of this stage."""
        return (self.match,) if isinstance(self.match, str) else self.match


class Retrain(Stage):
    """Training of the whole compressed model on what the original predicts, on the weights whose disk names match."""

    steps: Annotated[int, Field(ge=1)] = 200
    batch: Annotated[int, Field(ge=1)] = 8  # windows of text that a step looks at
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of both models' predictions
    labels: Annotated[float, Field(ge=0)] = 0.0  # how much the cross-entropy of the text counts beside the divergence
    data: Data | None = None  # the recipe's if None


class Watch(_Strict):
    """The check while a run goes on: windows kept from the calibration pass through the original and the compressed blocks."""

    windows: Annotated[int, Field(ge=1)] = 4
    limit: Annotated[float, Field(gt=0)] = 1.0  # |compressed - original| / |original| of hidden states that stops the run


class Recipe(_Strict):
    """Everything that decides the bytes of a result, apart from the source."""

    description: str = ""
    transforms: tuple[Stage, ...] = ()  # of a block before it is calibrated, in this order
    steps: tuple[Step, ...]
    tuning: tuple[Stage, ...] = ()  # adjustments of a block's compressed weights, in this order
    retraining: tuple[Retrain, ...] = ()  # training of the whole compressed model, in this order
    data: Data | None = None
    # What statistics are of: what compressed blocks give, or the original's own inputs, which hold for any recipe.
    inputs: Literal["compressed", "original"] = "compressed"
    copy_: tuple[str, ...] = Field(default=(), alias="copy")  # globs of tensors to copy although no family rule names them
    drop: tuple[str, ...] = ()  # globs of tensors to leave out
    watch: Watch | None = None  # stop early when the model has broken
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the calibration's forward passes
    batch_tokens: Annotated[int, Field(ge=1)] = 8192  # tokens that pass through a block at a time
    max_shard_size: str = "5GB"

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @field_validator("transforms", "tuning", "retraining")
    @classmethod
    def _right_kind(cls, value: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        known = registry.methods(_STAGE_KINDS[str(info.field_name)])
        for stage in value:
            if stage.method not in known:
                close = difflib.get_close_matches(stage.method, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"no method {stage.method!r} here; known are {', '.join(known)}{hint}")
        return value

    @model_validator(mode="after")
    def _some_step(self) -> Self:
        if not self.steps:
            raise ValueError("a recipe needs at least one step")
        return self


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as 5GB, 500MB or 4GiB. Raises ValueError."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    digits = text.strip().rstrip("aAbBiIgGkKmMtT ").strip()
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        size = int(float(digits) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write it as 5GB, 500MB or 4GiB") from None
    if size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return size


class _UniqueKeys(yaml.SafeLoader):
    """YAML without silent overwriting: a key twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


# What PyYAML raises: its own errors, and whatever Python says to a value that does not fit its tag, as in `!!int x`.
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def folder() -> Path:
    """Where the shipped recipes are: in the package, or beside it in a source tree."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def presets() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def locate(name: str) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped one. Raises RecipeError."""
    path = Path(name)
    if path.is_file():
        return path
    if name in presets():
        return folder() / f"{name}.yaml"
    close = difflib.get_close_matches(name, presets(), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RecipeError(f"{name}: neither a file nor a shipped recipe; shipped are {', '.join(presets())}{hint}")


def read(name: str) -> dict[str, Any]:
    """Read a recipe, a file or the name of a shipped one, as plain values. Raises RecipeError."""
    path = locate(name)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, *_BAD_YAML) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: holds a {type(value).__name__}; expected keys such as data: and steps:")
    return value


def change(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` settings to a recipe's plain values; numbers address list elements. Raises RecipeError."""
    result = copy.deepcopy(values)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {setting}: expected a path and a value, as in steps.0.options.bits=3")
        try:
            value = yaml.load(text, _UniqueKeys)
        except _BAD_YAML as error:
            raise RecipeError(f"--set {setting}: the value is not YAML ({error})") from error
        place: Any = result
        try:
            for key in keys[:-1]:
                if isinstance(place, dict) and place.get(key) is None:
                    place[key] = {}
                place = place[int(key)] if isinstance(place, list) else place[key]
            target: Any = int(keys[-1]) if isinstance(place, list) else keys[-1]
            place[target] = value
        except (IndexError, TypeError, ValueError) as error:
            raise RecipeError(f"--set {setting}: the recipe has no such place ({error})") from error
    return result


_CHOICES = ("str", "tuple[str, ...]")  # what pydantic adds to a place where either is allowed
_WORDS = {"a valid tuple": "a list", "a valid dictionary": "a mapping", " or instance of Data": "", " or instance of Step": ""}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    places: dict[str, Any] = {"data": Data, "steps": Step, "retraining": Retrain}
    model: Any = places.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return [info.alias or name for name, info in model.model_fields.items()]


def explain(error: ValidationError, known: Sequence[str] | None = None, prefix: str = "") -> str:
    """Write what pydantic found as `place: what is wrong`, one line each, with the nearest key for a misspelt one."""
    lines = []
    for item in error.errors():
        place = prefix + ".".join(str(p) for p in item["loc"] if p not in _CHOICES or item["type"] == "extra_forbidden")
        place = place.rstrip(".")  # what is wrong with all options together
        message = item["msg"].removeprefix("Value error, ")
        for theirs, ours in _WORDS.items():
            message = message.replace(theirs, ours)
        if item["type"] == "extra_forbidden":
            keys = list(known) if known is not None else _known_keys(item["loc"])
            close = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
            message = f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known are {', '.join(keys)}"
        elif item["type"] != "missing" and not isinstance(item["input"], (dict, list)):
            message += f" (got {item['input']!r:.80})"
        lines.append(f"{place}: {message}" if place else message)
    return "\n".join(lines)


def parse(values: dict[str, Any], name: str = "recipe") -> Recipe:
    """Validate plain values. Raises RecipeError that names each wrong place."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{name}:\n{explain(error)}") from error


def parse_data(values: dict[str, Any]) -> Data:
    """Validate the values of a `data:` section. Raises RecipeError."""
    try:
        return Data.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, list(Data.model_fields), "data.")) from error


def load(name: str, settings: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or shipped name, with `a.b=c` settings applied. Raises RecipeError."""
    return parse(change(read(name), settings), name)


def dump(recipe: Recipe) -> str:
    """Write a recipe as YAML that loads to the same recipe, all defaults spelt out."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values."""
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    return values


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
