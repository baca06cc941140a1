"""`compress cut`: heads, channels, experts and blocks are taken out, and what is left is a plain checkpoint with another config.

What is cut is the same number everywhere, so that plain transformers loads the result; with `--uneven` blocks differ, and it
loads after `import compress`. What was found out and every block that is done are in the job's journal, so that a run that was
stopped goes on, to the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress._version import __version__
from compress.architecture.config import context_length, settings, vocabulary
from compress.architecture.inventory import take_inventory
from compress.blockwise.forward import last_hidden, token_losses
from compress.calibration.data import fingerprint, load_ids
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import Entry, bytes_of, load, read_header, read_tensor, save
from compress.errors import RecipeError, VerificationError
from compress.model import layer_sizes as uneven
from compress.model.detect import find_family
from compress.output import seal
from compress.output.job import Job, Record, differ, flatten, remove_leftover
from compress.recipe.data import Data
from compress.report import redaction as published
from compress.report.templating import escaped
from compress.structured_pruning.coupled import Cut
from compress.structured_pruning.cutter import Cutter
from compress.structured_pruning.sizes import Wish, after, expert_sets, sizes_of, smaller_config
from compress.system import memory
from compress.system.device import pick_device
from compress.system.files import sha256, write_json, write_text
from compress.system.progress import Progress
from compress.verify import checksums as recorded
from compress.verify import fresh_process as reload
from compress.verify import verify

CHECK_TOKENS = 128  # of the batch whose result is recorded
SHARD = 5 * 10**9
SCORES = -1  # in the journal, in front of all blocks
PLACE = "places"  # of what stays, in the file of a block


def cut(
    model: str, out: Path, wish: Wish, data: Data, device: str, progress: Progress, anew: bool = True, revision: str | None = None
) -> dict[str, Any]:
    """Write a smaller model and return its summary. Raises CompressError."""
    started = time.time()
    memory.be_sparing()
    source = Source.open(model, revision)
    inventory = take_inventory(source, find_family(source))
    _check_config(source, wish)
    ids = load_ids(data, source.folder, vocabulary(source), context_length(source))
    mine = {
        "cut": {**wish.__dict__},
        "source": source.fingerprint(),
        "calibration": fingerprint(ids),
        "run": {"compress": __version__, "torch": torch.__version__},
    }
    folder = out.with_name(out.name + ".job")
    if (before := seal.finished(out)) is not None:
        differ(flatten(before["identity"]), flatten(mine), str(out))
        remove_leftover(folder, mine)
        return {**before, "resumed": True}
    cutter = Cutter(source, inventory, wish, ids, pick_device(device), progress)
    job = Job.open(folder, mine, "")
    job.check_parts()
    with reload.fresh_process() if anew else reload.not_at_all() as ask:
        summary = _write(cutter, job, mine, out, started, ask)
    job.remove()
    return summary


def _check_config(source: Source, wish: Wish) -> None:
    """Raise RecipeError where transformers has no model of the sizes that are left; before any work."""
    from transformers import AutoConfig

    family = find_family(source)
    if uneven.sizes_of(source.config):
        raise RecipeError(f"{source.folder}: its blocks differ in size already; cut the model that it was made from")
    before = sizes_of(source, family)
    left = after(wish, family, before)
    if wish.experts:
        expert_sets(settings(source), left, before)
    values = smaller_config(source.config, family, before, before if wish.uneven else left, list(range(left.blocks)))
    try:
        AutoConfig.for_model(source.model_type, **{k: v for k, v in values.items() if k != "model_type"})
    except Exception as error:  # of code that is not ours: what it raises depends on its version
        why = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"transformers has no {source.model_type} with what would be left ({why}); cut another share"
        ) from error


class ModelScores:
    """What was found out about a whole model before anything is cut: blocks, their influences, scores and experts that stay."""

    def __init__(self, cutter: Cutter, job: Job) -> None:
        path = job.parts / "scores.safetensors"
        record = next((r for r in job.records if r.block == SCORES), None)
        if record is None:
            everything = list(range(cutter.before.blocks))
            self.kept, self.influences = cutter.kept_blocks() if cutter.wish.blocks else (everything, [])
            self.experts = cutter.kept_experts(self.kept)
            self.scores = cutter.scores(self.kept, self.experts)
            tensors = {f"scores.{what}.{block}": score for (block, what), score in self.scores.items()}
            save(path, tensors | {f"experts.{block}": places for block, places in self.experts.items()})
            row = {"kept": self.kept, "influences": self.influences}
            job.commit(Record(SCORES, {path.name: sha256(path)}, rows=[row]))
            return
        self.kept, self.influences = record.rows[0]["kept"], record.rows[0]["influences"]
        self.scores, self.experts = {}, {}
        for name, value in load(path)[0].items():
            kind, _, rest = name.partition(".")
            what, _, block = rest.rpartition(".")
            if kind == "experts":
                self.experts[int(block)] = value
            else:
                self.scores[int(block), what] = value


def _part(job: Job, block: int) -> Path:
    return job.parts / f"block-{block:05d}.safetensors"


def _done(cutter: Cutter, job: Job) -> dict[int, Cut]:
    """Return what an earlier run has cut, by block."""
    found = {}
    for record in job.records:
        if record.block != SCORES:
            tensors = load(_part(job, record.block))[0]
            places = {n.removeprefix(f"{PLACE}."): value for n, value in tensors.items() if n.startswith(f"{PLACE}.")}
            found[record.block] = cutter.restored(record.block, places, tensors)
    return found


def _store(cutter: Cutter, job: Job, block: int, made: Cut) -> None:
    """Put a block into the job: what changes of its tensors, and what stays of it."""
    tensors: Mapping[str, Tensor | None] = cutter.tensors(block, made)
    left = {name: value for name, value in tensors.items() if value is not None}
    path = _part(job, block)
    save(path, left | {f"{PLACE}.{what}": value for what, value in made.places().items()})
    gone = [name for name, value in tensors.items() if value is None]
    job.commit(Record(block, {path.name: sha256(path)}, rows=[{"gone": gone, "by_magnitude": list(made.by_magnitude)}]))


def _entries(cutter: Cutter, job: Job, found: ModelScores) -> list[Entry]:
    """Return the tensors of the smaller model under their new names, where they are now."""
    made: dict[str, Entry] = {}
    gone: set[str] = set(cutter.inventory.dropped)
    for record in job.records:
        if record.block != SCORES:
            made |= read_header(_part(job, record.block))[0]
            gone |= set(record.rows[0]["gone"])
    places = {block: number for number, block in enumerate(found.kept)}
    entries = []
    for name in sorted(cutter.source.entries, key=seal.natural):
        new = None if name in gone else cutter.renamed(name, places, found.experts)
        if new is not None:
            entries.append(replace(made.get(name, cutter.source.entries[name]), name=new))
    return sorted(entries, key=lambda entry: seal.natural(entry.name))


def _write(cutter: Cutter, job: Job, mine: dict[str, Any], out: Path, started: float, ask: reload.Ask | None) -> dict[str, Any]:
    source = cutter.source
    found = ModelScores(cutter, job)
    kept = found.kept
    done = _done(cutter, job)
    cutter.cut_blocks(kept, found.scores, found.experts, done, lambda block, made: _store(cutter, job, block, made))
    entries = _entries(cutter, job, found)
    folder = job.checkpoint
    folder.mkdir()
    seal.write_shards(folder, entries, SHARD)
    seal.carry(source, folder)
    sizes = cutter.sizes(kept, {entry.name: entry.shape for entry in entries}) if cutter.wish.uneven else {}
    write_json(folder / "config.json", cutter.config(kept, sizes))
    written = Source.open(folder)
    if wrong := [e.name for e in entries if bytes_of(read_tensor(e)) != bytes_of(read_tensor(written.entries[e.name]))]:
        raise VerificationError(f"{folder}: {wrong[0]} reads back otherwise than it was written; please report this")
    batch = cutter.ids[:1, :CHECK_TOKENS]
    streamed, hidden = last_hidden(written, batch, torch.float32, cutter.streamed.device)
    losses = [round(value, 6) for value in token_losses(streamed, batch, hidden).tolist()]
    check = {"ids": batch[0].tolist(), "dtype": "float32", "losses": losses}
    size = sum(entry.nbytes for entry in entries)
    cutter.progress(1, 1, "loading anew", 0.0)
    loaded = reload.check(
        ask, folder, check["ids"], losses, "float32", cutter.streamed.device.type, size, verify.TOLERANCE["float32"]
    )
    values = {
        "tool": "compress",
        "version": __version__,
        "base_model": published.base_model(source.name, source.revision)[0],
        "base_revision": source.revision,
        "identity": mine,
        "before": cutter.before.__dict__,
        "after": cutter.left.__dict__,
        "blocks": kept,
        "influences": found.influences,
        "experts": {str(block): places.tolist() for block, places in found.experts.items()},
        "sizes": {name: list(size) for name, size in sizes.items()},
        "by_magnitude": [site for r in job.records if r.block != SCORES for site in r.rows[0]["by_magnitude"]],
        "weights": source.numel,
        "weights_after": sum(entry.numel for entry in entries),
        "bytes_before": source.stored_nbytes,
        "bytes_after": size,
        "seconds": time.time() - started,
        "peak_memory": memory.peak(),
        "check": check,
        "reload": loaded,
    }
    write_text(folder / "README.md", card(values, source))
    values["files"] = recorded.checksums(folder)
    write_json(folder / published.LOCAL, {"base_model": str(source.folder)})
    write_json(folder / seal.SUMMARY, values)
    source.check_unchanged()
    seal.publish(folder, out)
    return values


def card(values: dict[str, Any], source: Source) -> str:
    """Return the model card of a model that was cut."""
    name = Path(source.name).name if Path(source.name).is_dir() else source.name
    base = "" if Path(source.name).is_dir() else f"base_model: {json.dumps(source.name)}\n"  # which YAML reads as a text
    sizes = {key: value for key, value in values["before"].items() if value}
    rows = [f"| {key.replace('_', ' ')} | {sizes[key]} | {values['after'][key]} |" for key in sizes]
    rows.append(f"| weights | {values['weights']:,} | {values['weights_after']:,} |")
    wish = values["identity"]["cut"]
    gone = [b for b in range(values["before"]["blocks"]) if b not in values["blocks"]]
    lines = [
        f"---\n{base}library_name: transformers\npipeline_tag: text-generation\ntags: [compress, pruned]\n---",
        f"# {escaped(name)}, cut",
        "Heads, channels, experts or blocks of the original were taken out; what is left is "
        + (
            "a checkpoint whose blocks differ in size: do `import compress` before transformers loads it. The sizes are means."
            if wish["uneven"]
            else "a plain checkpoint that transformers loads."
        ),
        "| | before | after |\n|---|---|---|\n" + "\n".join(rows),
        f"Scores: {wish['score']}; what reads the rest was {'fitted by least squares' if wish['repair'] else 'left alone'}.",
    ]
    if values["by_magnitude"]:
        names = ", ".join(map(escaped, values["by_magnitude"]))
        lines.append(f"Cut by the magnitude of weights, since no token of the calibration reached them: {names}.")
    if values["experts"]:
        lines.append(
            "Experts that stay, by block of the original:\n\n"
            + "\n".join(f"- {b}: {', '.join(map(str, e))}" for b, e in values["experts"].items())
        )
    if gone:
        lines.append(f"Blocks of the original that are gone: {', '.join(map(str, gone))}.")
    lines.append(f"Made with compress {values['version']}. It has not been trained afterwards.")
    return "\n\n".join(lines) + "\n"
