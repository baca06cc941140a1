"""What a run will do, settled before a weight is read: source, recipe, a step for every site, device and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress._version import __version__
from compress.architecture.added_biases import with_biases
from compress.architecture.config import context_length, settings, vocabulary
from compress.architecture.inventory import Inventory, take_inventory
from compress.calibration.data import fingerprint, load_ids
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.methods.method import AUTO, AUTO_SIZES, group_columns
from compress.model.detect import find_family
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.recipe.assignment import Assignment, StageAssignment
from compress.recipe.data import SELF, Data
from compress.recipe.schema import Recipe
from compress.system import memory
from compress.system.device import DTYPES, pick_device


@dataclass(frozen=True)
class RunPlan:
    """What a run will do: everything that is known before a weight is read."""

    source: Source
    inventory: Inventory
    recipe: Recipe
    assignments: list[Assignment]
    transforms: list[StageAssignment]
    tuning: list[StageAssignment]
    retraining: list[StageAssignment]
    dtype: torch.dtype
    device: torch.device

    @property
    def calibrated(self) -> bool:
        """Whether a method needs to see data."""
        if self.retraining and self.recipe.data is not None:
            return True
        needy = any(o.needs or o.scope == "block" for a in self.assignments for o in (a.method, a.fallback) if o is not None)
        return needy or bool(self.transforms) or bool(self.tuning)

    @property
    def notes(self) -> list[str]:
        """What is worth saying before the run: group sizes that were chosen because 128 does not divide the columns."""
        counts: dict[int, int] = {}
        for a in self.assignments:
            if getattr(a.method, "group_size", None) == AUTO:
                size = group_columns(AUTO, a.site.shape[1])
                counts[size] = counts.get(size, 0) + 1
        first = AUTO_SIZES[0]
        return [
            f"group_size: {size} columns for {counts[size]} weights whose number of columns {first} does not divide"
            for size in AUTO_SIZES[1:]
            if size in counts
        ]

    @property
    def compares(self) -> bool:
        """Whether a method compares with the original model's hidden states, which are then computed too."""
        methods = [a.method for a in self.assignments] + [s.method for s in (*self.transforms, *self.tuning)]
        return any(method.compares for method in methods)


def pick_dtype(name: str, source: Source, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward passes: for auto the checkpoint's own, or float32 where the CPU cannot compute in it."""
    if name != "auto":
        return DTYPES[name]
    own = DTYPES.get(str(settings(source).get("dtype", settings(source).get("torch_dtype"))), torch.float32)
    if device.type == "cpu" and (own == torch.float16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.float32
    return own


def prepare(model: str, recipe: Recipe, device: str = "auto", revision: str | None = None, headers: bool = False) -> RunPlan:
    """Open the source, give every tensor its disposition and every site its step; with `headers`, weights stay on the Hub.

    Raises CheckpointError, RecipeError.
    """
    memory.be_sparing()  # before anything is computed, including the probe of a dry run
    source = Source.headers(model, revision) if headers else Source.open(model, revision)
    if any(stage.options.get("add_biases") for stage in (*recipe.tuning, *recipe.retraining)):
        source = with_biases(source, find_family(source))
    inventory = take_inventory(source, find_family(source), recipe.copy_, recipe.drop)
    assignments = recipe_assignment.resolve(recipe, inventory.sites)
    chosen = pick_device(device)
    if chosen.type == "cuda":
        from compress.kernels import nearest, round_columns  # noqa: F401  give methods' operators their kernels
    before = recipe_assignment.stages(recipe.transforms, "transforms", assignments)
    after = recipe_assignment.stages(recipe.tuning, "tuning", assignments)
    last = recipe_assignment.stages(recipe.retraining, "retraining", assignments)
    _check_inputs(recipe, assignments, before, after)
    return RunPlan(source, inventory, recipe, assignments, before, after, last, pick_dtype(recipe.dtype, source, chosen), chosen)


def _check_inputs(
    recipe: Recipe, assignments: list[Assignment], before: list[StageAssignment], after: list[StageAssignment]
) -> None:
    """Raise RecipeError for a method that makes no sense with statistics of the original's own inputs."""
    if recipe.inputs == "compressed":
        return
    for stage in before:
        why = (
            "corrects for what compressed blocks do to inputs, and these are the original's"
            if stage.method.compares
            else "looks at every block anew, so that no statistics could be kept"
        )
        raise RecipeError(f"inputs: original does not go with transforms: {stage.method.path} {why}; leave one of them out")
    whole = [*(a.method for a in assignments if a.method.scope == "block"), *(stage.method for stage in after)]
    if whole:
        raise RecipeError(
            f"inputs: original is for methods that see one weight at a time; {whole[0].path} works on whole blocks, as they are "
            "behind compressed ones; leave one of them out"
        )


def calibration(plan: RunPlan, data: Data | None = None) -> Tensor:
    """Return the token ids (samples, length) to run through the model: the recipe's data, or random ones if none is needed.

    With `data`, return the ids of that data for the same model.
    """
    if data is not None:
        return load_ids(data, plan.source.folder, vocabulary(plan.source), context_length(plan.source))
    if not plan.calibrated:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary(plan.source), (1, 32), generator=generator)
    if plan.recipe.data is None:
        raise RecipeError(
            "data: missing, but a method needs calibration data; give --data FILE, a dataset's name, or a data: section"
        )
    return load_ids(plan.recipe.data, plan.source.folder, vocabulary(plan.source), context_length(plan.source))


def calibration_shape(plan: RunPlan) -> tuple[int, int]:
    """Return the windows, and tokens per window, of `calibration`, without the tokenizer of a model on the Hub.

    A model is not run to write its own text.
    """
    data = plan.recipe.data
    known = data is not None and (plan.source.remote or data.name == SELF) and data.suffix != ".npy"
    if not plan.calibrated or data is None or not known:
        ids = calibration(plan)
        return ids.shape[0], ids.shape[1]
    samples, length = data.shape
    return samples, min(length, context_length(plan.source) or length)


def identity(plan: RunPlan, ids: Tensor) -> dict[str, Any]:
    """Every field that determines the result."""
    return {
        "recipe": recipe_reading.plain(effective(plan, ids)),
        "source": plan.source.fingerprint(),
        "calibration": fingerprint(ids),
        "run": {
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": plan.device.type,
            "compress": __version__,
            "torch": torch.__version__,
        },
    }


def effective(plan: RunPlan, ids: Tensor) -> Recipe:
    """The recipe as it was used, with the methods' defaults and the data's actual shape filled in."""
    options = {a.step: a.method.model_dump(mode="json") for a in plan.assignments}
    steps = tuple(step.model_copy(update={"options": options[n]}) for n, step in enumerate(plan.recipe.steps))
    data = plan.recipe.data
    if data is not None and plan.calibrated:
        data = data.model_copy(update={"samples": ids.shape[0], "length": ids.shape[1]})
    changed: dict[str, Any] = {"steps": steps, "data": data if plan.calibrated else None}
    for place, found in (("transforms", plan.transforms), ("tuning", plan.tuning), ("retraining", plan.retraining)):
        spelt = [s.method.model_dump(mode="json") for s in found]
        given = zip(getattr(plan.recipe, place), spelt, strict=True)
        changed[place] = tuple(stage.model_copy(update={"options": values}) for stage, values in given)
    return plan.recipe.model_copy(update=changed)
