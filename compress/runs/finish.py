"""The end of a run: the checkpoint is sealed, checked by other readers and given its name."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from compress._version import __version__
from compress.architecture.added_biases import filled
from compress.blockwise.forward import last_hidden, token_losses
from compress.checkpoint import packed_source, packing, site_table
from compress.errors import VerificationError
from compress.output import seal
from compress.output.job import Job
from compress.recipe import schema as recipe_schema
from compress.report import card
from compress.report import redaction as published
from compress.report import rows as report
from compress.runs import massive
from compress.runs.pipeline import rows_of
from compress.runs.prepare import RunPlan
from compress.system import memory
from compress.system.files import write_json, write_text
from compress.system.progress import Progress
from compress.verify import checksums as recorded
from compress.verify import fresh_process as reload
from compress.verify import verify


@dataclass(frozen=True)
class Summary:
    """The result of a run."""

    out: Path
    values: dict[str, Any]
    rows: list[report.SiteRow] = field(default_factory=list)
    resumed: bool = False  # a finished checkpoint of the same job already existed


def finish(
    plan: RunPlan,
    job: Job,
    mine: dict[str, Any],
    text: str,
    ids: Tensor,
    last: Tensor,
    out: Path,
    started: float,
    progress: Progress,
    ask: reload.Ask | None = None,
    predicted: dict[str, Any] | None = None,
    cached: dict[str, int] | None = None,
) -> Summary:
    """Write the checkpoint inside the job folder, read it back in two ways, load it in a fresh process, and publish it."""
    blocks = len(job.records)
    progress(blocks, blocks, "writing", 0.0)
    folder = job.checkpoint
    folder.mkdir()
    specs, made = seal.collect(job.parts / name for record in job.records for name in sorted(record.parts))
    entries = filled(plan.source, made, job.parts)
    tensors, guard = seal.plan(plan.source, plan.inventory, specs, entries)
    seal.write_shards(folder, tensors, recipe_schema.parse_size(plan.recipe.max_shard_size))
    seal.carry(plan.source, folder)
    rows = rows_of(job)
    report.write_rows(folder / "report.jsonl", rows)
    text = yaml.safe_dump(published.cleaned_recipe(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    write_text(folder / "recipe.yaml", text)
    seal.write_config(folder, plan.source.config, site_table.write_table(specs, guard))
    progress(blocks, blocks, "checking", 0.0)
    packed_names = {f"{site}.{leaf}" for site, spec in specs.items() for leaf in packing.layout(spec)}
    copied = [entry for entry in tensors if entry.name not in packed_names and entry.name != guard]
    second = verify.read_back(folder, {row.site: row.sha256 for row in rows}, copied, progress)
    check = _check(folder, plan, ids, last)
    after = sum(entry.nbytes for entry in tensors)
    progress(blocks, blocks, "loading anew", 0.0)
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
        "massive": massive.massive(job.records) if plan.calibrated else [],
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
    plan.source.check_unchanged()
    seal.publish(folder, out)
    return Summary(out, values, rows)


def _shown(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity fit to publish: its recipe names files without their folders."""
    return {**identity, "recipe": published.cleaned_recipe(identity["recipe"])}


def _check(folder: Path, plan: RunPlan, ids: Tensor, last: Tensor) -> dict[str, Any]:
    """Reopen the written checkpoint, stream one batch through it, compare with the run's hidden states; return what to record."""
    source = packed_source.PackedSource.open_packed(folder)
    streamed, hidden = last_hidden(source, ids, plan.dtype, plan.device)
    difference = float((hidden.cpu().float() - last.float()).norm() / last.float().norm().clamp_min(1e-30))
    # The batch is smaller than the run's, so products are summed in another order; a wrong weight gives differences near 1.
    limit = 1e-3 if plan.dtype == torch.float32 else 0.1
    if not difference <= limit:
        raise VerificationError(
            f"{folder}: one batch through the written checkpoint differs by {difference:.2g} from the run; expected at "
            f"most {limit}. The result is not published; please report this"
        )
    losses = token_losses(streamed, ids, hidden)
    dtype = str(plan.dtype).removeprefix("torch.")
    return {"ids": ids[0].tolist(), "dtype": dtype, "losses": [round(x, 6) for x in losses.tolist()], "difference": difference}
