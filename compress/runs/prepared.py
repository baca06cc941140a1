"""A run from its options to its outcome, in steps: checked, compressed, measured, exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture import config
from compress.calibration.data import load_ids
from compress.errors import CalibrationError
from compress.evaluation import quality as evaluation
from compress.evaluation.quality import Quality
from compress.interop.delivery import Delivery, Exported, after_run
from compress.interop.targets import Finding, Stored
from compress.recipe import build, reading
from compress.recipe.data import Data
from compress.recipe.schema import Recipe
from compress.report import same_size
from compress.report.rows import SiteRow
from compress.runs import estimate as estimates
from compress.runs import prepare as run_prepare
from compress.runs import run as runs
from compress.runs.estimate import Estimate
from compress.runs.finish import Summary
from compress.runs.pipeline import Settings
from compress.system import distributed
from compress.system.progress import Progress


@dataclass(frozen=True)
class RunOptions:
    """How a run is done and whom its result is for: nothing here decides what comes out.

    `memory`: for statistics, as 4GB; a block that needs more is calibrated in several passes. `offload`: the calibration's hidden
    states are kept on disk. `job`: where the state of the run is kept, `OUT.job` if None; `keep_job`: also afterwards. `reload`:
    the result is loaded in a fresh process in the end. `cache`: where statistics are kept for other recipes. `evaluate`: a text
    that the result is measured on. `target`, `tensor_parallel`: a runtime that has to load the result. `formats`: layouts of
    other tools that it is exported to.
    """

    device: str = "auto"
    revision: str | None = None
    memory: str = "4GB"
    offload: bool = False
    job: str | Path | None = None
    keep_job: bool = False
    reload: bool = True
    cache: str | Path | None = None
    evaluate: str | None = None
    target: str | None = None
    tensor_parallel: int = 1
    formats: tuple[str, ...] = ()

    def delivery(self) -> Delivery:
        """Whom the result is for. Raises RecipeError for names that are not known."""
        return Delivery(self.target, self.tensor_parallel, self.formats)


DEFAULTS = RunOptions()


def path_or_none(path: str | Path | None) -> Path | None:
    """A path that may be left out."""
    return None if path is None else Path(path)


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    `summary` and `rows` are what summary.json and report.jsonl in the folder `path` hold: figures of the whole, and of each
    weight. On ranks other than 0 the summary is empty.
    """

    path: Path
    summary: dict[str, Any]
    rows: list[SiteRow]
    resumed: bool = False  # a finished checkpoint of the same job was there already
    quality: Quality | None = None  # where options.evaluate asks for it
    exports: tuple[dict[str, Any], ...] = ()  # one for each of options.formats
    warnings: tuple[str, ...] = ()  # of options.target

    def plain(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        values = {key: value for key, value in self.summary.items() if key not in ("identity", "check")}
        pruned = same_size.compare(self.rows)
        result: dict[str, Any] = {
            "output": str(self.path),
            **values,
            "pruned": pruned and pruned.plain(),
            "evaluation": self.quality and self.quality.plain(),
        }
        return result | ({"exports": [*self.exports]} if self.exports else {})


@dataclass(frozen=True)
class PreparedRun:
    """A run that is checked and not begun. Of the model, config and headers were read, and nothing else."""

    plan: run_prepare.RunPlan
    ids: Tensor  # (samples, length), on meta where the run is only estimated
    out: Path
    options: RunOptions
    held_out: Data | None  # what the result is measured on
    estimate: Estimate
    findings: Sequence[Finding]  # what the target may not like

    def compress(self, progress: Progress) -> Summary:
        """Write the checkpoint, or go on with what an earlier run left. Raises CompressError."""
        how, job, cache = self.options, path_or_none(self.options.job), path_or_none(self.options.cache)
        settings = Settings(offload=how.offload, memory=build.memory_budget(how.memory), reload=how.reload, cache=cache)
        return runs.run(self.plan, self.ids, self.out, settings, progress, self.estimate, job, how.keep_job)

    def measure(self, progress: Progress) -> Quality | None:
        """Measure the checkpoint where that is asked for, and save the figures into it; the ranks part. Raises CompressError."""
        result = None
        if self.held_out is not None and distributed.leads():
            original = str(self.plan.source.folder)
            result = evaluation.measure(str(self.out), original, self.held_out, self.options.device, "float32", True, progress)
            result = replace(result, original=self.plan.source.name)
            evaluation.save(self.out, result)
        distributed.stop()
        return result

    def export(self, progress: Progress) -> Exported:
        """Export the checkpoint as asked for; the ranks other than 0 have nothing to do. Raises CheckpointError."""
        delivery = self.options.delivery()
        return after_run(str(self.out), delivery, delivery.places(self.out) if distributed.leads() else {}, progress)

    def outcome(self, summary: Summary, quality: Quality | None, exports: Sequence[dict[str, Any]]) -> Outcome:
        """Put together what the steps gave."""
        said = tuple(finding.message for finding in self.findings)
        return Outcome(summary.out, summary.values, summary.rows, summary.resumed, quality, tuple(exports), said)


def prepare_run(
    recipe: Recipe, model: str | Path, out: str | Path, options: RunOptions = DEFAULTS, headers: bool = False
) -> PreparedRun:
    """Check everything about a run that can be known beforehand; with `headers`, weights on the Hub stay there.

    Raises CompressError.
    """
    budget, delivery = build.memory_budget(options.memory), options.delivery()
    plan = run_prepare.prepare(str(model), recipe, options.device, options.revision, headers=headers)
    findings = delivery.check(plan.source, _stored(plan), Path(out)) if delivery.target or delivery.formats else []
    ids = torch.empty(run_prepare.calibration_shape(plan), device="meta") if headers else run_prepare.calibration(plan)
    held_out = None if options.evaluate is None else reading.parse_data({"name": options.evaluate})
    if held_out is not None and not plan.source.remote:
        _check_text(held_out, plan)
    samples, length = ids.shape
    expected = estimates.estimate(plan, samples=samples, length=length, memory_budget=budget, offload=options.offload)
    expected = estimates.timed(expected, plan, samples, length, options.reload)
    return PreparedRun(plan, ids, Path(out), options, held_out, expected, findings)


def _stored(plan: run_prepare.RunPlan) -> Stored:
    """How each weight will be stored, as far as it is known before a run."""
    specs = {}
    for a in plan.assignments:
        spec, other = (made and made.describe(a.site.shape).spec for made in (a.method, a.fallback))
        specs[a.site.name] = None if other and other != spec else spec
    return Stored(plan.inventory.family, config.settings(plan.source), plan.inventory.sites, specs)


def _check_text(data: Data, plan: run_prepare.RunPlan) -> None:
    """Read the text to measure on before a long run, not after it. Raises CalibrationError."""
    try:
        load_ids(data, plan.source.folder, config.vocabulary(plan.source), config.context_length(plan.source), fewer=True)
    except CalibrationError as error:
        later = "or leave it out, and measure afterwards: compress eval OUT --data TEXT --samples N --length N --save"
        raise CalibrationError(f"--evaluate: {error.message}; {later}") from error
