"""What commands do around the Python API: progress while it works, then what it found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.system.progress import Progress

if TYPE_CHECKING:
    from compress.commands._options import PlanningFlags, RunFlags
    from compress.planning.budget import Budget
    from compress.recipe.data_options import DataOptions
    from compress.recipe.schema import Recipe
    from compress.runs.prepared import RunOptions


@contextmanager
def progress(quiet: bool, predicted: float | None = None) -> Iterator[Progress]:
    """Show progress until the block ends; `predicted` is the seconds that the whole of it was said to take."""
    from compress.screen.progress import show_progress

    with show_progress(quiet, predicted) as shown:
        yield shown


def run_and_show(
    recipe: Recipe,
    model: str,
    output: Path,
    options: RunOptions,
    flags: RunFlags,
    quiet: bool,
    efforts: Mapping[str, Recipe] | None = None,
) -> None:
    """Run a recipe, or say what it would do; show what came out. Raises CompressError.

    A dry run also says how long each of `efforts` would take, recipes by name. These are the steps of `api.run`, each with a
    display of its own.
    """
    from compress.recipe.build import watched
    from compress.runs.prepared import prepare_run
    from compress.screen.checkpoints import show_exports, show_findings
    from compress.screen.console import console
    from compress.screen.plans import describe_dry_run, show_dry_run
    from compress.screen.results import show_notes, show_outcome
    from compress.system import distributed

    leader, silent = distributed.leads(), quiet or flags.json_
    run = prepare_run(watched(recipe, flags.watch), model, output, options, headers=flags.dry_run)
    if leader and not flags.json_ and run.plan.calibrated and recipe.data is not None and recipe.data.said:
        console().print(recipe.data.said)
    if options.target is not None and leader:
        show_findings(options.target, run.findings)
    if flags.dry_run:
        found = describe_dry_run(run)
        if efforts:
            others = {name: prepare_run(other, model, output, options, headers=True) for name, other in efforts.items()}
            found["efforts"] = {name: other.estimate.seconds for name, other in others.items()}
        print(json.dumps(found, indent=2)) if flags.json_ else show_dry_run(found)
        return
    if leader and not silent:
        show_notes(run.plan.notes)
    with progress(silent or not leader, run.estimate.seconds) as shown:
        summary = run.compress(shown)
    with progress(silent or run.held_out is None or not leader) as shown:
        quality = run.measure(shown)
    if not leader:
        return
    with progress(silent or not options.formats) as shown:
        exported = run.export(shown)
    if options.target is not None:
        show_findings(options.target, [finding for finding in exported.findings if finding not in run.findings])
    outcome = run.outcome(summary, quality, exported.made)
    if flags.json_:
        print(json.dumps(outcome.plain(), indent=2))
    else:
        show_outcome(outcome)
        show_exports(outcome.exports)
    exported.raise_failed()


def show_what_fits(
    model: str,
    data: DataOptions,
    budget: Budget,
    methods: Sequence[str],
    candidates: Sequence[str],
    flags: RunFlags | PlanningFlags,
) -> None:
    """Show the sizes that a plan can have, from config and headers: the dry run of a budget. Raises CompressError."""
    from compress.planning.feasibility import feasibility
    from compress.planning.planner import PlanRequest
    from compress.recipe.build import memory_budget, method_lines
    from compress.screen.plans import show_feasibility

    transforms, paths = method_lines(methods, candidates)
    most = memory_budget(flags.memory)
    seen = feasibility(
        PlanRequest(model, data.values(), budget, paths, candidates, transforms, flags.dtype, flags.device, flags.revision, most)
    )
    print(json.dumps(seen, indent=2)) if flags.json_ else show_feasibility(seen)
