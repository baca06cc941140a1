"""`compress run`: from a plan to a finished checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from compress import card, distributed, memory, packed, published, report, retraining, seal, students
from compress import recipe as recipes
from compress._version import __version__
from compress.biases import filled
from compress.calibration.skeleton import Skeleton
from compress.errors import CalibrationError, CheckpointError, RecipeError, VerificationError
from compress.estimate import Estimate, check_disk, predictions
from compress.evaluate import recorded, reload, verify
from compress.evaluate.streamed import last_hidden, token_losses
from compress.files import write_json, write_text
from compress.job import Job, differ, flatten, remove_leftover
from compress.pipeline import Run, Settings, Work, rows_of
from compress.prepare import Plan, calibration, effective, identity
from compress.students import Student

CHECK_TOKENS = 128  # of the batch whose result is recorded
Listen = Callable[[int, int, str, float], None]


@dataclass(frozen=True)
class Summary:
    """What a run gave."""

    out: Path
    values: dict[str, Any]
    rows: list[report.SiteRow] = field(default_factory=list)
    resumed: bool = False  # a finished checkpoint of the same job was there already


def run(
    plan: Plan,
    ids: Tensor,
    out: Path,
    settings: Settings,
    listen: Listen,
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
    skeleton = Skeleton(
        plan.source, plan.claims, plan.dtype, device
    )  # before the folder: a config that builds no model leaves none
    text = recipes.dump(effective(plan, ids))
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
    through = Run(skeleton, work, calibrated, plan.recipe.batch_tokens, job, settings, listen)
    end = through.all_blocks()
    if plan.retraining:
        parts = [job.parts / name for record in job.records for name in sorted(record.parts)]
        end = _retrained(skeleton, plan, calibrated, job, Student.of_parts(parts), rows_of(job), 0, listen)
    summary = None
    if leader:
        assert end is not None, "rank 0 has the first batch"
        with reload.fresh_process() if settings.reload else reload.not_at_all() as ask:
            batch, last = calibrated[:1, :CHECK_TOKENS], end[:1, :CHECK_TOKENS].cpu()
            summary = finish(plan, job, mine, text, batch, last, out, started, listen, ask, predictions(expected), through.cached)
        if not keep_job:
            job.remove()
    distributed.barrier()
    return summary or Summary(out, {}, rows_of(job))


def retrain(
    plan: Plan,
    ids: Tensor,
    start: packed.PackedSource,
    out: Path,
    listen: Listen,
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
    skeleton = Skeleton(plan.source, plan.claims, plan.dtype, plan.device)
    student = Student.of_checkpoint(start, plan.source, plan.claims)
    text = recipes.dump(effective(plan, ids))
    job = Job.open(folder, mine, text)
    rows = report.read_rows(start.folder / "report.jsonl")
    end = _retrained(skeleton, plan, ids, job, student, rows, len(plan.retraining) - 1, listen)
    with reload.fresh_process() if anew else reload.not_at_all() as ask:
        summary = finish(plan, job, mine, text, ids[:1, :CHECK_TOKENS], end.cpu(), out, started, listen, ask)
    if not keep_job:
        job.remove()
    return summary


def _retrained(
    skeleton: Skeleton,
    plan: Plan,
    ids: Tensor,
    job: Job,
    student: Student,
    rows: list[report.SiteRow],
    first: int,
    listen: Listen,
) -> Tensor:
    """Train a student in the stages from `first` on and put it into the job; return its last block's output for one batch."""
    blocks = len(skeleton.blocks)
    seed = plan.recipe.data.seed if plan.recipe.data is not None else 0

    def say(step: str, share: float) -> None:
        listen(blocks, blocks, step, share)

    wanted = effective(plan, ids).retraining
    for number in range(first, len(plan.retraining)):
        settings = wanted[number]
        given = calibration(plan, settings.data) if settings.data is not None else ids
        mine = retraining.identity_of(settings, given, student)
        with skeleton.whole_model():
            training = retraining.Training(
                skeleton, student, plan.retraining[number], settings, given, plan.recipe.batch_tokens, seed
            )
            student, notes = training.run(job.folder / f"retraining-{number}.pt", mine, say)
        job.records = students.records(student, rows, f"{settings.method} of the whole model", notes, job)
        rows = rows_of(job)
    with skeleton.outer():
        hidden = skeleton.embed(ids[:1, :CHECK_TOKENS])
    for block in range(blocks):
        sites = [site.name for site in skeleton.sites[block] if site.name in student.weights]
        skeleton.load(block, {name: student.weights[name].dequantize() for name in sites})
        skeleton.put_others(block, {n: v for n, v in student.others.items() if skeleton.holds(block, n)})
        hidden = skeleton.forward(block, hidden)
        skeleton.release(block)
    return hidden


def _held(plan: Plan, ids: Tensor) -> tuple[Tensor, Tensor | None, float]:
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


def finish(
    plan: Plan,
    job: Job,
    mine: dict[str, Any],
    text: str,
    ids: Tensor,
    last: Tensor,
    out: Path,
    started: float,
    listen: Listen,
    ask: reload.Ask | None = None,
    predicted: dict[str, Any] | None = None,
    cached: dict[str, int] | None = None,
) -> Summary:
    """Write the checkpoint inside the job folder, read it back by two ways, load it anew, and give it its name."""
    blocks = len(job.records)
    listen(blocks, blocks, "writing", 0.0)
    folder = job.checkpoint
    folder.mkdir()
    specs, made = seal.collect(job.parts / name for record in job.records for name in sorted(record.parts))
    entries = filled(plan.source, made, job.parts)
    tensors, guard = seal.plan(plan.source, plan.claims, specs, entries)
    seal.write_shards(folder, tensors, recipes.parse_size(plan.recipe.max_shard_size))
    seal.carry(plan.source, folder)
    rows = rows_of(job)
    report.write_rows(folder / "report.jsonl", rows)
    text = yaml.safe_dump(published.cleaned_recipe(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    write_text(folder / "recipe.yaml", text)
    seal.write_config(folder, plan.source.config, packed.write_table(specs, guard))
    listen(blocks, blocks, "checking", 0.0)
    packed_names = {f"{site}.{leaf}" for site, spec in specs.items() for leaf in packed.layout(spec)}
    copied = [entry for entry in tensors if entry.name not in packed_names and entry.name != guard]
    second = verify.read_back(folder, {row.site: row.sha256 for row in rows}, copied, listen)
    check = _check(folder, plan, ids, last)
    after = sum(entry.nbytes for entry in tensors)
    listen(blocks, blocks, "loading anew", 0.0)
    limit = verify.TOLERANCE[check["dtype"]]
    loaded = reload.check(ask, folder, check["ids"], check["losses"], check["dtype"], plan.device.type, after, limit)
    name, revision = published.base_model(plan.source.name, plan.source.revision)
    values = {
        "tool": "compress",
        "version": __version__,
        "base_model": name,
        "base_revision": revision,
        "card": published.card_of(plan.source.folder),
        "identity": _shown(mine),
        "weights": plan.source.numel,
        "bytes_before": plan.source.stored_nbytes,
        "decoded_from": plan.source.coded,
        "bytes_after": after,
        "bits_per_weight": after * 8 / plan.source.numel,
        "bits_per_compressed_weight": report.bits_per_weight(rows),
        "sites": len(rows),
        "fallbacks": sum(row.fallback is not None for row in rows),
        "seconds": time.time() - started,
        "peak_memory": memory.peak(),
        "hardware": memory.machine() + ("" if plan.device.type != "cuda" else f", {torch.cuda.get_device_name(plan.device)}"),
        "predicted": predicted,
        "cache": cached,
        "watched": [record.difference for record in job.records if record.difference is not None],
        "compute_seconds": sum(record.seconds for record in job.records),
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "check": check,
        "read_back": second,
        "reload": loaded,
        "files": recorded.checksums(folder),
    }
    write_json(folder / seal.SUMMARY, values)
    if plan.source.revision is None:
        write_json(folder / published.LOCAL, {"base_model": str(plan.source.folder)})
    card.write(folder)
    seal.publish(folder, out)
    return Summary(out, values, rows)


def _shown(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as others may read it: a recipe names files without their folders."""
    return {**identity, "recipe": published.cleaned_recipe(identity["recipe"])}


def _check(folder: Path, plan: Plan, ids: Tensor, last: Tensor) -> dict[str, Any]:
    """Reopen what was written, stream one batch through it, compare with the run's hidden states; return what to record."""
    source = packed.PackedSource.open_packed(folder)
    skeleton, hidden = last_hidden(source, ids, plan.dtype, plan.device)
    difference = float((hidden.cpu().float() - last.float()).norm() / last.float().norm().clamp_min(1e-30))
    # The batch is smaller than the run's, so products are summed in another order; a wrong weight gives differences near 1.
    limit = 1e-3 if plan.dtype == torch.float32 else 0.1
    if not difference <= limit:
        raise VerificationError(
            f"{folder}: one batch through the written checkpoint differs by {difference:.2g} from the run; expected at "
            f"most {limit}. The result is not published; please report this"
        )
    losses = token_losses(skeleton, ids, hidden)
    dtype = str(plan.dtype).removeprefix("torch.")
    return {"ids": ids[0].tolist(), "dtype": dtype, "losses": [round(x, 6) for x in losses.tolist()], "difference": difference}
