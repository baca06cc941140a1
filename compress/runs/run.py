"""`compress run`: from a plan to a finished checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path

from torch import Tensor

from compress.blockwise.stream import COMPRESSED, Stream, slices
from compress.blockwise.walk import walk
from compress.checkpoint import packed_source
from compress.errors import CalibrationError, CheckpointError, RecipeError
from compress.model.complete import complete
from compress.model.streamed import StreamedModel
from compress.output import seal
from compress.output.job import Job, differ, flatten, remove_leftover
from compress.recipe import reading as recipe_reading
from compress.report import rows as report
from compress.runs import retraining
from compress.runs import student as students
from compress.runs.estimate import Estimate, check_disk, predictions
from compress.runs.finish import Summary, _shown, finish
from compress.runs.pipeline import CHECK_TOKENS, Run, Settings, Work, rows_of
from compress.runs.prepare import RunPlan, calibration, effective, identity
from compress.runs.student import Student
from compress.system import distributed
from compress.system.progress import Progress
from compress.verify import fresh_process as reload


def run(
    plan: RunPlan,
    ids: Tensor,
    out: Path,
    settings: Settings,
    progress: Progress,
    expected: Estimate,
    job_folder: Path | None = None,
    keep_job: bool = False,
) -> Summary:
    """Do what is planned, or go on with what an earlier run left, and give the result its name `out`. Raises CompressError."""
    started = time.time()
    device = distributed.start(plan.device)
    mine = identity(plan, ids)
    if (before := seal.finished(out)) is not None:
        differ(flatten(before["identity"]), flatten(_shown(mine)), str(out))
        if distributed.rank() == 0 and not keep_job:
            remove_leftover(job_folder or _job_of(out), mine)
        return Summary(out, before, report.read_rows(out / "report.jsonl"), resumed=True)
    folder = job_folder or _job_of(out)
    check_disk(expected, folder)
    if plan.retraining and distributed.world() > 1:
        raise RecipeError("retraining: is done in one process; take it out, and run `compress retrain` afterwards")
    # Before the folder: a config that builds no model, or one that files do not fill, leaves none.
    streamed = complete(StreamedModel(plan.source, plan.inventory, plan.dtype, device))
    text = recipe_reading.dump(effective(plan, ids))
    leader = distributed.rank() == 0
    job = Job.open(folder, mine, text, owner=True) if leader else None
    distributed.barrier()
    job = job or Job.open(folder, mine, text, owner=False)
    if leader:
        job.check_parts()
    seed = plan.recipe.data.seed if plan.recipe.data is not None else 0
    calibrated, held, limit = _held(plan, ids)
    own = plan.recipe.inputs == "original"
    work = Work(plan.assignments, plan.transforms, plan.tuning, plan.compares, own, seed, held, limit)
    through = Run(streamed, work, calibrated, plan.recipe.batch_tokens, job, settings, progress)
    end = through.all_blocks()
    if plan.retraining:
        parts = [job.parts / name for record in job.records for name in sorted(record.parts)]
        end = _retrained(streamed, plan, calibrated, job, Student.of_parts(parts), rows_of(job), 0, progress)
    summary = None
    if leader:
        with reload.fresh_process() if settings.reload else reload.not_at_all() as ask:
            batch = calibrated[:1, :CHECK_TOKENS]
            summary = finish(
                plan, job, mine, text, batch, end, out, started, progress, ask, predictions(expected), through.cached
            )
        if not keep_job:
            job.remove()
    distributed.barrier()
    return summary or Summary(out, {}, rows_of(job))


def retrain(
    plan: RunPlan,
    ids: Tensor,
    start: packed_source.PackedSource,
    out: Path,
    progress: Progress,
    job_folder: Path | None = None,
    keep_job: bool = False,
    anew: bool = True,
) -> Summary:
    """Do the last stage of a plan's retraining to a compressed checkpoint of its source. Raises CompressError."""
    started = time.time()
    before = seal.finished(start.folder)
    if before is None:
        raise CheckpointError(f"{start.folder}: is empty; give a checkpoint that compress wrote")
    files = hashlib.sha256(json.dumps(before["files"], sort_keys=True).encode()).hexdigest()
    mine = {**identity(plan, ids), "start": files}
    folder = job_folder or _job_of(out)
    if (there := seal.finished(out)) is not None:
        differ(flatten(there["identity"]), flatten(_shown(mine)), str(out))
        if not keep_job:
            remove_leftover(folder, mine)
        return Summary(out, there, report.read_rows(out / "report.jsonl"), resumed=True)
    streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, plan.device)
    student = Student.of_checkpoint(start, plan.source, plan.inventory)
    text = recipe_reading.dump(effective(plan, ids))
    job = Job.open(folder, mine, text)
    rows = report.read_rows(start.folder / "report.jsonl")
    end = _retrained(streamed, plan, ids, job, student, rows, len(plan.retraining) - 1, progress)
    with reload.fresh_process() if anew else reload.not_at_all() as ask:
        summary = finish(plan, job, mine, text, ids[:1, :CHECK_TOKENS], end, out, started, progress, ask)
    if not keep_job:
        job.remove()
    return summary


def _retrained(
    streamed: StreamedModel,
    plan: RunPlan,
    ids: Tensor,
    job: Job,
    student: Student,
    rows: list[report.SiteRow],
    first: int,
    progress: Progress,
) -> Tensor:
    """Train a student in the stages from `first` on and put it into the job; return its last block's output for one batch."""
    blocks = len(streamed.blocks)
    seed = plan.recipe.data.seed if plan.recipe.data is not None else 0

    def say(step: str, share: float) -> None:
        progress(blocks, blocks, step, share)

    wanted = effective(plan, ids).retraining
    for number in range(first, len(plan.retraining)):
        settings = wanted[number]
        given = calibration(plan, settings.data) if settings.data is not None else ids
        mine = retraining.identity_of(settings, given, student)
        with streamed.all_blocks():
            training = retraining.Training(
                streamed, student, plan.retraining[number], settings, given, plan.recipe.batch_tokens, seed
            )
            student, notes = training.run(job.folder / f"retraining-{number}.pt", mine, say)
        job.records = students.records(student, rows, f"{settings.method} of the whole model", notes, job)
        rows = rows_of(job)
    check = ids[:1, :CHECK_TOKENS]
    with streamed.embeddings_and_head():
        stream = Stream.begin(streamed, check, slices(check, CHECK_TOKENS), "check", COMPRESSED)
    walk(streamed, [stream], range(blocks), lambda block: [(COMPRESSED, student.of_block(streamed, block))])
    return stream.states.read(0)


def _held(plan: RunPlan, ids: Tensor) -> tuple[Tensor, Tensor | None, float]:
    """Keep the last windows from the calibration where a recipe asks for the running check; return both and the limit."""
    watch = plan.recipe.watch
    if watch is None:
        return ids, None, math.inf
    if not plan.calibrated:
        return ids, ids, watch.limit  # random tokens, which nothing is fitted to
    if len(ids) <= watch.windows:
        raise CalibrationError(
            f"watch.windows: {watch.windows} of {len(ids)} windows of calibration would be kept from it; use fewer, or more data"
        )
    return ids[: -watch.windows], ids[-watch.windows :], watch.limit


def _job_of(out: Path) -> Path:
    return out.with_name(out.name + ".job")
