"""`compress run`: from a recipe and a source to a finished checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import distributed, packed, recipe as recipes, report, seal
from compress._version import __version__
from compress.calibration.data import fingerprint, load_ids
from compress.calibration.families import Claims, claim, find
from compress.calibration.skeleton import Skeleton
from compress.checkpoint import Source
from compress.errors import OutputError, RecipeError, VerificationError
from compress.files import human_bytes, sha256, write_json, write_text
from compress.job import Job, differ, flatten
from compress.pipeline import Run, Settings, rows_of
from compress.recipe import Assignment, Recipe

logger = logging.getLogger(__name__)
CHECK_TOKENS = 128  # of the batch whose result is recorded
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Listen = Callable[[int, int, str, float], None]


@dataclass(frozen=True)
class Plan:
    """What a run will do: everything that is known before a weight is read."""

    source: Source
    claims: Claims
    recipe: Recipe
    assignments: list[Assignment]
    dtype: torch.dtype
    device: torch.device

    @property
    def calibrated(self) -> bool:
        """Whether a method needs to see data."""
        return any(o.needs for a in self.assignments for o in (a.method, a.fallback) if o is not None)


@dataclass(frozen=True)
class Summary:
    """What a run gave."""

    out: Path
    values: dict[str, Any]
    rows: list[report.SiteRow] = field(default_factory=list)
    resumed: bool = False  # a finished checkpoint of the same job was there already


def pick_device(name: str) -> torch.device:
    """Return the device of a name such as auto, cpu, cuda or cuda:1. Raises RecipeError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: not a device; expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    return device


def pick_dtype(name: str, source: Source, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward passes: for auto the checkpoint's own, or float32 where the CPU has no bfloat16 arithmetic."""
    if name != "auto":
        return _DTYPES[name]
    own = _DTYPES.get(str(source.config.get("dtype", source.config.get("torch_dtype"))), torch.float32)
    if device.type == "cpu" and (own == torch.float16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.float32
    return own


def prepare(model: str, recipe: Recipe, device: str = "auto", revision: str | None = None) -> Plan:
    """Open the source, give every tensor its disposition and every site its step. Raises CheckpointError, RecipeError."""
    source = Source.open(model, revision)
    claims = claim(source, find(source), recipe.copy_, recipe.drop)
    assignments = recipes.resolve(recipe, claims.sites)
    chosen = pick_device(device)
    return Plan(source, claims, recipe, assignments, pick_dtype(recipe.dtype, source, chosen), chosen)


def calibration(plan: Plan) -> Tensor:
    """Return the token ids (samples, length) that run through the model: the recipe's data, or for data-free methods a few at random."""
    vocabulary = int(plan.source.config.get("vocab_size", 0))
    if not plan.calibrated:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (1, 32), generator=generator)
    if plan.recipe.data is None:
        raise RecipeError("data: missing, but a method needs calibration data; give --data FILE, a dataset's name, or a data: section")
    context = plan.source.config.get("max_position_embeddings", plan.source.config.get("n_positions"))
    return load_ids(plan.recipe.data, plan.source.folder, vocabulary, context if isinstance(context, int) else None)


def identity(plan: Plan, ids: Tensor) -> dict[str, Any]:
    """Every field that decides the result."""
    return {
        "recipe": recipes.plain(effective(plan, ids)),
        "source": plan.source.fingerprint(),
        "calibration": fingerprint(ids),
        "run": {"dtype": str(plan.dtype).removeprefix("torch."), "device": plan.device.type, "compress": __version__, "torch": torch.__version__},
    }


def effective(plan: Plan, ids: Tensor) -> Recipe:
    """The recipe with the shape of the data as it was in the end."""
    data = plan.recipe.data
    if data is None or not plan.calibrated:
        return plan.recipe
    used = data.model_copy(update={"samples": ids.shape[0], "length": ids.shape[1]})
    return plan.recipe.model_copy(update={"data": used})


def run(plan: Plan, out: Path, settings: Settings, listen: Listen, job_folder: Path | None = None, keep_job: bool = False) -> Summary:
    """Do what is planned, or go on with what an earlier run left, and give the result its name `out`. Raises CompressError."""
    started = time.time()
    device = distributed.start(plan.device)
    ids = calibration(plan)
    mine = identity(plan, ids)
    if (before := seal.finished(out)) is not None:
        differ(flatten(before["identity"]), flatten(mine), str(out))
        return Summary(out, before, report.read_rows(out / "report.jsonl"), resumed=True)
    folder = job_folder or out.with_name(out.name + ".job")
    text = recipes.dump(effective(plan, ids))
    leader = distributed.rank() == 0
    job = Job.open(folder, mine, text, owner=True) if leader else None
    distributed.barrier()
    job = job or Job.open(folder, mine, text, owner=False)
    if leader:
        job.check_parts()
    skeleton = Skeleton(plan.source, plan.claims, plan.dtype, device)
    hidden = Run(skeleton, plan.assignments, ids, plan.recipe.batch_tokens, job, settings, listen).all_blocks()
    summary = None
    if leader:
        last = hidden.read(0)[:1, :CHECK_TOKENS]
        summary = finish(plan, job, mine, text, ids[:1, :CHECK_TOKENS], last, out, started, listen)
        if not keep_job:
            job.remove()
    distributed.barrier()
    return summary or Summary(out, {}, rows_of(job))


def finish(
    plan: Plan, job: Job, mine: dict[str, Any], text: str, ids: Tensor, last: Tensor, out: Path, started: float, listen: Listen
) -> Summary:
    """Write the checkpoint inside the job folder, read it back, and give it its name."""
    blocks = len(job.records)
    listen(blocks, blocks, "writing", 0.0)
    folder = job.checkpoint
    folder.mkdir()
    specs, entries = seal.collect(job.parts / name for record in job.records for name in sorted(record.parts))
    tensors, guard = seal.plan(plan.source, plan.claims, specs, entries)
    files = seal.write_shards(folder, tensors, recipes.parse_size(plan.recipe.max_shard_size))
    seal.carry(plan.source, folder)
    rows = rows_of(job)
    report.write_rows(folder / "report.jsonl", rows)
    write_text(folder / "recipe.yaml", text)
    seal.write_config(folder, plan.source.config, packed.write_table(specs, guard))
    listen(blocks, blocks, "checking", 0.0)
    check = _check(folder, plan, ids, last)
    after = sum(entry.nbytes for entry in tensors)
    values = {
        "tool": "compress",
        "version": __version__,
        "base_model": plan.source.name,
        "base_revision": plan.source.revision,
        "identity": mine,
        "weights": plan.source.numel,
        "bytes_before": plan.source.nbytes,
        "bytes_after": after,
        "bits_per_weight": after * 8 / plan.source.numel,
        "bits_per_compressed_weight": report.bits_per_weight(rows),
        "sites": len(rows),
        "fallbacks": sum(row.fallback is not None for row in rows),
        "seconds": time.time() - started,
        "compute_seconds": sum(record.seconds for record in job.records),
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "check": check,
        "files": {name: sha256(folder / name) for name in files},
    }
    write_json(folder / seal.SUMMARY, values)
    seal.publish(folder, out)
    return Summary(out, values, rows)


def _check(folder: Path, plan: Plan, ids: Tensor, last: Tensor) -> dict[str, Any]:
    """Reopen what was written, stream one batch through it and compare with the hidden states of the run; return what to record."""
    from compress.evaluate.streamed import last_hidden, token_losses

    source = packed.PackedSource.open_packed(folder)
    skeleton, hidden = last_hidden(source, ids, plan.dtype, plan.device)
    difference = float((hidden.cpu().float() - last.float()).norm() / last.float().norm().clamp_min(1e-30))
    # The batch is smaller than the run's, so products are summed in another order; a wrong weight gives differences near 1.
    limit = 1e-3 if plan.dtype == torch.float32 else 0.1
    if not difference <= limit:
        raise VerificationError(
            f"{folder}: one batch through the written checkpoint differs by {difference:.2g} from the run; expected at most {limit}. "
            "The result is not published; please report this"
        )
    losses = token_losses(skeleton, ids, hidden)
    dtype = str(plan.dtype).removeprefix("torch.")
    return {"ids": ids[0].tolist(), "dtype": dtype, "losses": [round(x, 6) for x in losses.tolist()], "difference": difference}
