"""Recipes that prune: one step over the weights in scope, or a sparsity of its own for every weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import registry
from compress.errors import RecipeError
from compress.planning import sparsity_steps
from compress.recipe import build, reading
from compress.recipe.data import BUILTIN
from compress.recipe.data_options import DataOptions
from compress.recipe.schema import Recipe
from compress.system.progress import Progress

STEP_TOKENS = 2048  # that pass through a block at a time where it is trained: as many steps as the text has pieces of this size
DISTRIBUTIONS = ("uniform", "global", "owl", "measured")
_METHOD = ("sparsity", "pattern", "group", "within", "bits", "group_size", "symmetric")  # options of the method itself


@dataclass(frozen=True)
class PruningOptions:
    """What is removed, how, and from which weights; what is None is left to the method. Raises RecipeError.

    `sparsity`, or `pattern` N:M; `group` neighbouring columns go together; `within` a row or a matrix; `distribute`: how the
    sparsity is spread over weights; `scope`: globs over their names, all linears in blocks if empty; with `bits`, kept weights
    are quantized in the same pass; `retrain`: a method of training that follows.
    """

    sparsity: float | None = None
    pattern: str | None = None
    group: int | None = None
    within: str | None = None
    method: str = "alps"
    distribute: str = "uniform"
    scope: tuple[str, ...] = ()
    bits: int | None = None
    group_size: int | str | None = None
    symmetric: bool | None = None
    retrain: str | None = None

    def __post_init__(self) -> None:
        if self.bits is None and (wrong := [key for key in ("group_size", "symmetric") if getattr(self, key) is not None]):
            raise RecipeError(f"--{wrong[0].replace('_', '-')}: means something only with --bits; add --bits 4, or leave it out")
        if self.distribute not in DISTRIBUTIONS:
            raise RecipeError(f"--distribute {self.distribute}: expected one of {', '.join(DISTRIBUTIONS)}")

    def options(self) -> dict[str, Any]:
        """The options of the method that are given."""
        return {key: value for key, value in asdict(self).items() if key in _METHOD and value is not None}


@dataclass(frozen=True)
class Surveying:
    """Where a model is looked at to distribute a sparsity, and where what is measured is kept."""

    folder: Path
    device: str = "auto"
    revision: str | None = None
    memory: str = "4GB"


def make_pruning_recipe(
    model: str,
    pruning: PruningOptions,
    data: DataOptions,
    dtype: str | None,
    changes: Sequence[str],
    survey: Surveying,
    progress: Progress,
) -> Recipe:
    """Make a recipe that prunes; only where the sparsity is distributed, the model is looked at. Raises CompressError."""
    transforms, path = build.method_line(pruning.method, "prune")
    values: dict[str, Any] = {"data": {"name": BUILTIN, **data.values()}}
    if transforms:
        values["transforms"] = [{"method": transform} for transform in transforms]
    if dtype is not None:
        values["dtype"] = dtype
    if pruning.retrain is not None:
        values |= {"batch_tokens": STEP_TOKENS, "tuning": [_training(pruning.retrain)]}
    steps = _steps(model, pruning, path, values, survey, progress)
    return reading.parse(reading.change({**values, "steps": steps}, changes), build.PLACE)


def _training(method: str) -> dict[str, Any]:
    """Return the stage of a recipe that trains what was pruned. Raises RecipeError."""
    known = registry.names("retrain")
    name = method.removeprefix("retrain/")
    if name not in known:
        raise RecipeError(f"--retrain {method}: expected one of {', '.join(known)}")
    return {"method": f"retrain/{name}"}


def _steps(
    model: str, pruning: PruningOptions, path: str, values: dict[str, Any], survey: Surveying, progress: Progress
) -> list[dict[str, Any]]:
    """Return the steps of the recipe: one, or several where the sparsity is distributed."""
    method, options = registry.method(path), pruning.options()
    if not path.startswith("prune/"):
        known = ", ".join(registry.names("prune"))
        raise RecipeError(f"--method {path}: removes nothing; methods that prune are {known}")
    scope = [*pruning.scope] or [build.EVERY_BLOCK]
    step = {"match": scope[0] if len(scope) == 1 else scope, "method": path, "options": options}
    if unknown := [key for key in options if key not in method.model_fields]:
        raise RecipeError(f"--{unknown[0]}: {path} has no such option; it has {', '.join(method.model_fields)}")
    if pruning.distribute == "uniform":
        return [step]
    if pruning.pattern is not None:
        raise RecipeError(f"--distribute {pruning.distribute}: a pattern has one sparsity; leave one of the two out")
    share = options.pop("sparsity", 0.5)
    return sparsity_steps.steps(
        model=model,
        values={**values, "steps": [step]},
        distribute=pruning.distribute,
        sparsity=share,
        folder=survey.folder,
        device=survey.device,
        revision=survey.revision,
        memory_budget=build.memory_budget(survey.memory),
        progress=progress,
    )
