"""`compress cut`: whole heads, channels and blocks are taken out, and what is left is a plain checkpoint with another config.

What is cut is the same number everywhere, so that plain transformers loads the result. Blocks go first, those of the least
influence, one after the other; then heads and channels, block by block, each with the inputs that come out of what was cut before
it. The linears that read what is left are repaired by least squares. A whole model is in memory where scores need gradients,
else one block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import importance, memory, published, seal
from compress._version import __version__
from compress.calibration.claims import Claims, claim, context_length, find, vocabulary
from compress.calibration.data import fingerprint, load_ids
from compress.calibration.families import Family, Site
from compress.calibration.observe import Tap, batches, observe
from compress.calibration.skeleton import Skeleton
from compress.calibration.statistics import Hessian
from compress.checkpoint import Source
from compress.container import Entry, bytes_of, read_header, read_tensor, save
from compress.errors import RecipeError, VerificationError
from compress.evaluate import recorded, reload, verify
from compress.evaluate.streamed import last_hidden, token_losses
from compress.files import write_json, write_text
from compress.job import Job, differ, flatten, remove_leftover
from compress.prepare import pick_device
from compress.recipe_data import Data
from compress.smaller import Wish, after, sizes_of, smaller_config

CHECK_TOKENS = 128  # of the batch whose result is recorded
TOKENS = 8192  # that pass through a block at a time
SHARD = 5 * 10**9
Listen = Callable[[int, int, str, float], None]


@dataclass(frozen=True)
class Cut:
    """What stays of one block: places of heads, KV groups and channels, and the linears that were repaired, all columns."""

    heads: Tensor | None
    groups: Tensor | None
    channels: Tensor | None
    weights: dict[str, Tensor]  # by disk name of the site, (out, in), columns that go are 0


class Cutter:
    """One model on the way to a smaller one."""

    def __init__(self, source: Source, claims: Claims, wish: Wish, ids: Tensor, device: torch.device, listen: Listen) -> None:
        self.source, self.claims, self.wish, self.ids, self.listen = source, claims, wish, ids, listen
        self.family = claims.family
        self.before = sizes_of(source, self.family)
        self.left = after(wish, self.family, self.before)
        self.skeleton = Skeleton(source, claims, torch.float32, device)
        self.cuts = list(batches(ids.shape[0], ids.shape[1], TOKENS))

    def _embedded(self) -> list[Tensor]:
        with self.skeleton.outer():
            return [self.skeleton.embed(self.ids[cut.start : cut.stop]) for cut in self.cuts]

    def kept_blocks(self) -> tuple[list[int], list[float]]:
        """Return the blocks that stay and the influence of each block of the original; the least goes, one after the other."""
        kept = list(range(self.before.blocks))
        first: list[float] = []
        while len(kept) > self.left.blocks or not first:
            found = self._influences(kept)
            first = first or found
            if len(kept) > self.left.blocks:
                kept.pop(min(range(len(kept)), key=lambda n: (found[n], n)))
        return kept, first

    def _influences(self, kept: list[int]) -> list[float]:
        hidden, found = self._embedded(), []
        for number, block in enumerate(kept):
            self.listen(number, len(kept), "influence of blocks", 0.0)
            self.skeleton.load(block)
            outputs = [self.skeleton.forward(block, batch) for batch in hidden]
            total = sum(float(importance.influence(a, b)) for a, b in zip(hidden, outputs, strict=True))
            found.append(total / self.ids.numel())
            hidden = outputs
            self.skeleton.release(block)
        return found

    def _readers(self, block: int) -> dict[str, Site]:
        """The linears of a block that read heads and channels, as far as these are to be cut."""
        sites = {site.kind: site for site in self.skeleton.sites[block]}
        found = {}
        if self.left.heads < self.before.heads and self.family.heads is not None:
            found["heads"] = sites[self.family.heads.output]
        if self.left.channels < self.before.channels and self.family.channels is not None:
            found["channels"] = sites[self.family.channels.output]
        return found

    def _unit(self, what: str) -> int:
        """Neighbouring channels that go together."""
        if what == "channels":
            return 1
        per_group = self.before.heads // self.before.kv_groups
        return self.before.head_dim * (per_group if self.left.kv_groups < self.before.kv_groups else 1)

    def scores(self, kept: list[int]) -> dict[importance.Names, Tensor]:
        """Return scores (groups,) by block and kind, from gradients; empty where they come from weights, block by block."""
        if self.wish.score not in importance.GRADIENTS or not self._readers(kept[0]):
            return {}
        sites = {(block, what): site for block in kept for what, site in self._readers(block).items()}
        linears = {name: self.skeleton.linear(site) for name, site in sites.items()}
        widths = {name: site.shape[1] for name, site in sites.items()}
        with self.skeleton.whole_model(), self._only(kept):
            windows = self._windows()
            found = importance.gate_gradients(linears, widths, windows, self.skeleton.whole)
            return importance.group_scores(found, {name: self._unit(name[1]) for name in sites}, self.wish.score)

    def _windows(self) -> Iterator[Tensor]:
        for number in range(self.ids.shape[0]):
            self.listen(0, 1, "gradients", number / self.ids.shape[0])
            yield self.ids[number : number + 1]

    @contextmanager
    def _only(self, kept: list[int]) -> Iterator[None]:
        """Within this block of code other blocks hand on what they get."""
        gone = [module for number, module in enumerate(self.skeleton.blocks) if number not in kept]
        for module in gone:
            module.forward = lambda hidden, *_, **__: hidden
        try:
            yield
        finally:
            for module in gone:
                del module.forward

    def cut_blocks(self, kept: list[int], scores: dict[importance.Names, Tensor]) -> Iterator[Cut]:
        """Yield what stays of every kept block; the calibration runs on through what is left."""
        hidden = self._embedded()
        for number, block in enumerate(kept):
            self.listen(number, len(kept), "cutting", 0.0)
            self.skeleton.load(block)
            cut = self._cut(block, scores, hidden)
            sites = {site.name: site for site in self.skeleton.sites[block]}
            for name, weight in cut.weights.items():
                self.skeleton.put(sites[name], weight)
            hidden = [self.skeleton.forward(block, batch) for batch in hidden]
            self.skeleton.release(block)
            yield cut

    def _cut(self, block: int, scores: dict[importance.Names, Tensor], hidden: list[Tensor]) -> Cut:
        readers = self._readers(block)
        # Heads go first: what channels are repaired on is what comes out of the block without them.
        heads = groups = channels = None
        weights: dict[str, Tensor] = {}
        for what, site in readers.items():
            weight, size = self.skeleton.weight(site).float(), self._unit(what)
            matrix = self._hessian(block, site, hidden) if self.wish.repair or self.wish.score == "wanda" else None
            score = scores.get((block, what))
            if score is None:
                score = importance.weight_scores(weight, matrix if self.wish.score == "wanda" else None, size)
            if what == "channels":
                channels = columns = importance.kept_of(score, self.left.channels)
            else:
                whole = self.left.kv_groups < self.before.kv_groups
                chosen = importance.kept_of(
                    score, len(score) * self.left.heads // self.before.heads, 1 if whole else self.before.kv_groups
                )
                columns = importance.spread(chosen, size)
                heads = importance.spread(chosen, size // self.before.head_dim)
                groups = chosen if whole else torch.arange(self.before.kv_groups)
            made = torch.zeros_like(weight)
            repaired = self.wish.repair and matrix is not None
            made[:, columns] = (
                importance.repaired(weight, matrix, columns) if repaired and matrix is not None else weight[:, columns]
            )
            # As it will be stored, so that the calibration runs on with what is on disk.
            weights[site.name] = made.to(self.source.dtype(site.tensor)).float()
            self.skeleton.put(site, weights[site.name])
        return Cut(heads, groups, channels, weights)

    def _hessian(self, block: int, site: Site, hidden: list[Tensor]) -> Tensor:
        def run() -> None:
            for batch in hidden:
                self.skeleton.forward(block, batch)

        tap = Tap(site.tap, (self.skeleton.linear(site),), site.shape[1], (Hessian,))
        statistic = observe([tap], run, self.skeleton.device)[site.tap][Hessian]
        assert isinstance(statistic, Hessian)
        return statistic.matrix()

    def rows(self, kind: str, cut: Cut) -> Tensor | None:
        """Return the rows of a linear of this kind that stay, None if all do."""
        heads, channels, dim = self.family.heads, self.family.channels, self.before.head_dim
        if heads is not None and kind == heads.queries and cut.heads is not None:
            return importance.spread(cut.heads, dim)
        if heads is not None and kind in heads.keys and cut.groups is not None:
            return importance.spread(cut.groups, dim)
        return cut.channels if channels is not None and kind in channels.inputs else None

    def columns(self, kind: str, cut: Cut) -> Tensor | None:
        """Return the columns of a linear of this kind that stay, None if all do."""
        heads, channels = self.family.heads, self.family.channels
        if heads is not None and kind == heads.output and cut.heads is not None:
            return importance.spread(cut.heads, self.before.head_dim)
        return cut.channels if channels is not None and kind == channels.output else None

    def tensors(self, block: int, cut: Cut) -> dict[str, Tensor]:
        """Return the tensors of a block that are not as they were, by disk name."""
        found = {}
        for site in self.skeleton.sites[block]:
            rows, columns = self.rows(site.kind, cut), self.columns(site.kind, cut)
            if rows is None and columns is None:
                continue
            dtype = self.source.dtype(site.tensor)
            weight = cut.weights[site.name] if site.name in cut.weights else self.skeleton.weight(site)
            if rows is not None:
                weight = weight[rows]
                bias = f"{site.name}.bias"
                if bias in self.source.entries:
                    found[bias] = self.source.tensor(bias)[rows].contiguous()
            weight = weight if columns is None else weight[:, columns]
            found[site.tensor] = (weight.T if site.transposed else weight).to(dtype).contiguous()
        return found

    def config(self, kept: list[int]) -> dict[str, Any]:
        """Return config.json of what is left."""
        return smaller_config(self.source.config, self.family, self.before, self.left, kept)


def _renumbered(name: str, family: Family, places: dict[int, int]) -> str | None:
    """Return the name of a tensor in the smaller model; None where its block is gone."""
    if not name.startswith(family.blocks + "."):
        return name
    number, _, rest = name.removeprefix(family.blocks + ".").partition(".")
    place = places.get(int(number))
    return None if place is None else f"{family.blocks}.{place}.{rest}"


def cut(
    model: str, out: Path, wish: Wish, data: Data, device: str, listen: Listen, anew: bool = True, revision: str | None = None
) -> dict[str, Any]:
    """Write a smaller model and return its summary. Raises CompressError."""
    started = time.time()
    memory.return_large()
    source = Source.open(model, revision)
    claims = claim(source, find(source))
    _check_config(source, claims.family, wish)
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
    cutter = Cutter(source, claims, wish, ids, pick_device(device), listen)
    job = Job.open(folder, mine, "")
    with reload.fresh_process() if anew else reload.not_at_all() as ask:
        summary = _write(cutter, job, mine, out, started, ask)
    job.remove()
    return summary


def _check_config(source: Source, family: Family, wish: Wish) -> None:
    """Raise RecipeError where transformers has no model of the sizes that are left; before any work."""
    from transformers import AutoConfig

    before = sizes_of(source, family)
    left = after(wish, family, before)
    values = smaller_config(source.config, family, before, left, list(range(left.blocks)))
    try:
        AutoConfig.for_model(source.model_type, **{k: v for k, v in values.items() if k != "model_type"})
    except Exception as error:  # of code that is not ours: what it raises depends on its version
        why = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"transformers has no {source.model_type} with what would be left ({why}); cut another share"
        ) from error


def _write(cutter: Cutter, job: Job, mine: dict[str, Any], out: Path, started: float, ask: reload.Ask | None) -> dict[str, Any]:
    source, family = cutter.source, cutter.family
    kept, influences = cutter.kept_blocks() if cutter.wish.blocks else (list(range(cutter.before.blocks)), [])
    scores = cutter.scores(kept)
    made: dict[str, Entry] = {}
    for block, found in zip(kept, cutter.cut_blocks(kept, scores), strict=True):
        tensors = cutter.tensors(block, found)
        if tensors:
            save(job.parts / f"block-{block:05d}.safetensors", tensors)
            made |= read_header(job.parts / f"block-{block:05d}.safetensors")[0]
    places = {block: number for number, block in enumerate(kept)}
    entries = []
    for name in sorted(source.entries, key=seal.natural):
        new = _renumbered(name, family, places)
        if new is not None and name not in cutter.claims.dropped:
            entries.append(replace(made.get(name, source.entries[name]), name=new))
    folder = job.checkpoint
    folder.mkdir()
    seal.write_shards(folder, entries, SHARD)
    seal.carry(source, folder)
    write_json(folder / "config.json", cutter.config(kept))
    written = Source.open(folder)
    if wrong := [e.name for e in entries if bytes_of(read_tensor(e)) != bytes_of(read_tensor(written.entries[e.name]))]:
        raise VerificationError(f"{folder}: {wrong[0]} reads back otherwise than it was written; please report this")
    batch = cutter.ids[:1, :CHECK_TOKENS]
    skeleton, hidden = last_hidden(written, batch, torch.float32, cutter.skeleton.device)
    losses = [round(value, 6) for value in token_losses(skeleton, batch, hidden).tolist()]
    check = {"ids": batch[0].tolist(), "dtype": "float32", "losses": losses}
    size = sum(entry.nbytes for entry in entries)
    cutter.listen(1, 1, "loading anew", 0.0)
    loaded = reload.check(
        ask, folder, check["ids"], losses, "float32", cutter.skeleton.device.type, size, verify.TOLERANCE["float32"]
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
        "influences": influences,
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
    seal.publish(folder, out)
    return values


def card(values: dict[str, Any], source: Source) -> str:
    """Return the model card of a model that was cut."""
    name = Path(source.name).name if Path(source.name).is_dir() else source.name
    base = "" if Path(source.name).is_dir() else f"base_model: {source.name}\n"
    rows = [f"| {key.replace('_', ' ')} | {values['before'][key]} | {values['after'][key]} |" for key in values["before"]]
    rows.append(f"| weights | {values['weights']:,} | {values['weights_after']:,} |")
    wish = values["identity"]["cut"]
    gone = [b for b in range(values["before"]["blocks"]) if b not in values["blocks"]]
    lines = [
        f"---\n{base}library_name: transformers\npipeline_tag: text-generation\ntags: [compress, pruned]\n---",
        f"# {name}, cut",
        "Heads, channels or blocks of the original were taken out; what is left is a plain checkpoint that transformers loads.",
        "| | before | after |\n|---|---|---|\n" + "\n".join(rows),
        f"Scores: {wish['score']}; what reads the rest was {'fitted by least squares' if wish['repair'] else 'left alone'}.",
    ]
    if gone:
        lines.append(f"Blocks of the original that are gone: {', '.join(map(str, gone))}.")
    lines.append(f"Made with compress {values['version']}. It has not been trained afterwards.")
    return "\n\n".join(lines) + "\n"
