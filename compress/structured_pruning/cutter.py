"""A model on the way to a smaller one: what its blocks need least, and what is left of each.

Blocks go first, those of the least influence, one after the other; then experts, by what they give to the blocks that stay; then
heads and channels, block by block, each with the inputs that come out of what was cut before it. The linears that read what is
left are repaired by least squares. A whole model is in memory where scores need gradients, else one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.architecture.config import settings
from compress.architecture.inventory import Inventory
from compress.architecture.names import matches
from compress.blockwise.stream import COMPRESSED, ORIGINAL, Stream, slices
from compress.blockwise.walk import Visit, walk
from compress.calibration.observe import Tap, observe, passes
from compress.calibration.statistics import Hessian, statistic
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.model import layer_sizes as uneven
from compress.model.expert_loop import ExpertLoop
from compress.model.streamed import StreamedModel, Weights
from compress.structured_pruning import importance
from compress.structured_pruning.coupled import Cut, Groups, Reader, cut_of
from compress.structured_pruning.sizes import CHANNELS, Wish, after, channel_step, expert_sets, sizes_of, smaller_config
from compress.system.progress import Progress

TOKENS = 8192  # that pass through a block at a time
BUDGET = 4 * 10**9  # bytes of second moments at a time: those of many experts are not formed at once
WEIGHT_BYTES = 32  # for a weight whose gradient is looked at: itself, gradient, two sums, and its value in float64


class Cutter:
    """One model on the way to a smaller one."""

    def __init__(
        self, source: Source, inventory: Inventory, wish: Wish, ids: Tensor, device: torch.device, progress: Progress
    ) -> None:
        self.source, self.inventory, self.wish, self.ids, self.progress = source, inventory, wish, ids, progress
        self.family = inventory.family
        self.before = sizes_of(source, self.family)
        self.left = after(wish, self.family, self.before)
        self.sets = expert_sets(settings(source), self.left, self.before) if wish.experts else 1
        self.streamed = StreamedModel(source, inventory, torch.float32, device)
        self.groups = Groups(self.family, self.streamed.sites, self.before, self.left)

    def _stream(self, follows: str = ORIGINAL) -> Stream:
        with self.streamed.embeddings_and_head():
            return Stream.begin(self.streamed, self.ids, slices(self.ids, TOKENS), "calibration", follows, lazy=True)

    def _walk(self, stream: Stream, kept: list[int], visit: Visit, what: str) -> None:
        def tell(block: int, step: str, share: float) -> None:
            self.progress(kept.index(block), len(kept), what, 0.0)

        walk(self.streamed, [stream], kept, visit, tell)

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
        stream, found = self._stream(), []

        def influence(block: int) -> Iterator[tuple[str, Weights]]:
            stream.peek(self.streamed, block)
            assert stream.outputs is not None
            both = zip(stream.states.batches(), stream.outputs.batches(), strict=True)
            found.append(sum(float(importance.influence(a, b)) for a, b in both) / self.ids.numel())
            return iter(())

        self._walk(stream, kept, influence, "influence of blocks")
        return found

    def scores(self, kept: list[int], experts: Mapping[int, Tensor]) -> dict[importance.Names, Tensor]:
        """Return scores (groups,) by block and site, from gradients; empty where they come from weights, block by block."""
        readers = {(n, reader.site.name): reader for n in kept for reader in self.groups.readers(n, experts.get(n))}
        if self.wish.score not in importance.GRADIENTS or not readers:
            return {}
        linears = {name: self.streamed.linear(reader.site) for name, reader in readers.items()}
        units = {name: reader.unit for name, reader in readers.items()}
        gates = {name: torch.ones(reader.site.shape[1]) for name, reader in readers.items()}
        with self.streamed.all_blocks(), self._only(kept):
            if self.wish.score == "mixed":
                portions = list(self._portions(readers))
                mixed = (self._mixed(portion, n, len(portions)) for n, portion in enumerate(portions))
                return {name: score for scores in mixed for name, score in scores.items()}
            for number in range(self.wish.rounds):
                found = importance.gate_gradients(linears, gates, self._windows(number, self.wish.rounds), self.streamed.whole)
                scores = importance.group_scores(found, units, self.wish.score)
                for name, reader in readers.items():
                    scores[name][gates[name][:: reader.unit] == 0] = -1.0  # below all that are there
                    gates[name] = self._gates(reader, scores[name], (number + 1) / self.wish.rounds)
        return scores

    def _gates(self, reader: Reader, score: Tensor, share: float) -> Tensor:
        """Return gates (in,) of 1 for the groups that are left of a reader after this share of the rounds, 0 for the others."""
        count, sets = self.groups.left_of(reader), self.groups.sets_of(reader)
        kept = importance.kept_of(score, len(score) - importance.gone_by(len(score), count, sets, share), sets)
        gates = torch.zeros(reader.site.shape[1])
        gates[importance.spread(kept, reader.unit)] = 1.0
        return gates

    def _portions(self, readers: Mapping[importance.Names, Reader]) -> Iterator[dict[importance.Names, Reader]]:
        """Cut readers up so that the gradients by the weights of their groups, and what is summed up of them, fit the budget."""
        part: dict[importance.Names, Reader] = {}
        used = 0
        for name, reader in readers.items():
            needed = WEIGHT_BYTES * sum(site.numel for site in self.groups.members(reader))
            if part and used + needed > BUDGET:
                yield part
                part, used = {}, 0
            part[name] = reader
            used += needed
        yield part

    def _mixed(self, readers: Mapping[importance.Names, Reader], part: int, parts: int) -> dict[importance.Names, Tensor]:
        """Return the scores (groups,) of readers from the gradients by all weights of their groups; needs the whole model."""
        sites = [site for reader in readers.values() for site in self.groups.members(reader)]
        device = self.streamed.device
        leaves = {site: self.streamed.weight(site).to(device, torch.float32).requires_grad_() for site in sites}
        moments = importance.weight_moments(
            list(leaves.values()), self._windows(part, parts), lambda ids: self.streamed.whole(ids, leaves)
        )
        with torch.no_grad():
            values = {site: importance.mixed(w, *m) for (site, w), m in zip(leaves.items(), moments, strict=True)}
            found = {}
            for name, reader in readers.items():
                terms = [self.groups.by_group(reader, site, values[site]) for site in self.groups.members(reader)]
                found[name] = torch.stack(terms).sum(0).cpu()
        return found

    def kept_experts(self, kept: list[int]) -> dict[int, Tensor]:
        """Return the experts that stay of every block that has some, by what each gives while all of them are there."""
        found: dict[int, Tensor] = {}
        if not self.wish.experts:
            return found
        stream = self._stream()

        def score(block: int) -> Iterator[tuple[str, Weights]]:
            sums = importance.ExpertScore(self.before.experts)
            loops = [loop for loop in self.streamed.expert_loops(block) if isinstance(loop, ExpertLoop)]
            for loop in loops:
                loop.listener = sums.add
            stream.peek(self.streamed, block)
            for loop in loops:
                loop.listener = None
                found[block] = importance.kept_of(sums.scores(), self.left.experts, self.sets)
            return iter(())

        self._walk(stream, kept, score, "experts")
        return found

    def counts(self, scores: Mapping[importance.Names, Tensor]) -> dict[importance.Names, int]:
        """Return how many groups stay by block and site, where blocks may differ; empty where all keep the same number."""
        found: dict[importance.Names, int] = {}
        if not self.wish.uneven:
            return found
        sites = {site.name: site for block in self.streamed.sites.values() for site in block}
        for kind in {sites[name].kind for _, name in scores}:
            mine = {block: score for (block, name), score in scores.items() if sites[name].kind == kind}
            names = {block: name for block, name in scores if sites[name].kind == kind}
            channels = next((c for c in self.family.channels if c.output == kind), None)
            each, step = (self.left.kv_groups, 1)
            if channels is not None:
                each, step = getattr(self.left, channels.size), channel_step(self.wish, getattr(self.before, channels.size))
            found |= {(b, names[b]): n for b, n in importance.units_of(mine, each * len(mine), step).items()}
        return found

    def _windows(self, part: int, parts: int) -> Iterator[Tensor]:
        for number in range(self.ids.shape[0]):
            self.progress(part, parts, "gradients", number / self.ids.shape[0])
            yield self.ids[number : number + 1]

    @contextmanager
    def _only(self, kept: list[int]) -> Iterator[None]:
        """Within this block of code other blocks hand on what they get."""
        gone = [module for number, module in enumerate(self.streamed.blocks) if number not in kept]
        for module in gone:
            module.forward = lambda hidden, *_, **__: hidden
        try:
            yield
        finally:
            for module in gone:
                del module.forward

    def cut_blocks(
        self,
        kept: list[int],
        scores: dict[importance.Names, Tensor],
        experts: dict[int, Tensor],
        done: Mapping[int, Cut],
        store: Callable[[int, Cut], None],
    ) -> None:
        """Give `store` what stays of every kept block but those `done` by an earlier run; the calibration runs on through it.

        Experts stay in the calibration, also those that go: what is repaired in these models lies before them.
        """
        stream = self._stream(COMPRESSED)
        counts = self.counts(scores)

        def cut(block: int) -> Iterator[tuple[str, Weights]]:
            made = done.get(block)
            if made is None:
                made = self._cut(block, scores, counts, experts.get(block), stream)
            yield COMPRESSED, Weights(made.weights)
            if block not in done:
                store(block, made)

        self._walk(stream, kept, cut, "cutting")

    def _cut(
        self,
        block: int,
        scores: dict[importance.Names, Tensor],
        counts: dict[importance.Names, int],
        experts: Tensor | None,
        stream: Stream,
    ) -> Cut:
        heads = groups = None
        channels: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        plain: list[str] = []
        # Heads go first: what channels are repaired on is what comes out of the block without them.
        for reader, matrix in self._with_hessians(block, self.groups.readers(block, experts), stream):
            site, name = reader.site, (block, reader.site.name)
            weight = self.streamed.weight(site).to(self.streamed.device).float()
            score = scores.get(name)
            if score is None:
                score = importance.weight_scores(weight, matrix if self.wish.score == "wanda" else None, reader.unit)
            if not bool((score > 0).any()):
                score = importance.weight_scores(weight, None, reader.unit)
                plain.append(site.name)
            score = score.cpu()
            if reader.channels is not None:
                channels[site.name] = columns = importance.kept_of(score, counts.get(name, self.groups.left_of(reader)))
            else:
                chosen = importance.kept_of(score, counts.get(name, self.groups.left_of(reader)), self.groups.sets_of(reader))
                columns = importance.spread(chosen, reader.unit)
                heads = importance.spread(chosen, self.before.heads // len(score))
                groups = chosen if self.groups.whole(reader) else torch.arange(self.before.kv_groups)
            made = torch.zeros_like(weight)
            repaired = self.wish.repair and matrix is not None
            made[:, columns] = (
                importance.repaired(weight, matrix, columns.to(weight.device))
                if repaired and matrix is not None
                else weight[:, columns]
            )
            # As it will be stored, so that the calibration runs on with what is on disk.
            weights[site.name] = made.cpu().to(self.source.dtype(site.tensor)).float()
            self.streamed.set_weight(site, weights[site.name])
        return Cut(heads, groups, experts, channels, weights, tuple(plain))

    def _with_hessians(self, block: int, readers: list[Reader], stream: Stream) -> Iterator[tuple[Reader, Tensor | None]]:
        """Yield readers with the second moments (in, in) of their inputs where these are needed, in as few passes as can be."""

        def run() -> None:
            stream.send(self.streamed, block)

        wanted = self.wish.repair or self.wish.score == "wanda"
        for heads in (True, False):
            mine = {reader.site.tap: reader for reader in readers if (reader.channels is None) == heads}
            taps = [Tap(t, (self.streamed.linear(r.site),), r.site.shape[1], (Hessian,)) for t, r in mine.items()]
            for group in passes(taps, BUDGET):
                found = observe(group, run, self.streamed.device) if wanted else {}
                for tap in group:
                    yield mine[tap.name], statistic(found.pop(tap.name), Hessian).matrix() if wanted else None

    def restored(self, block: int, places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Cut:
        """Return what an earlier run left of a block, given the places of what stays and the tensors that it stored."""
        cut = cut_of(places)
        for reader in self.groups.readers(block, cut.experts):
            site, stored = reader.site, tensors[reader.site.tensor]
            if site.slice is not None:
                stored = stored[site.slice if cut.experts is None else cut.experts.tolist().index(site.expert)]
            made = torch.zeros_like(self.streamed.weight(site).float())
            made[:, self.groups.columns(site, cut)] = (stored.T if site.transposed else stored).float()
            cut.weights[site.name] = made
        return cut

    def sizes(self, kept: list[int], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Return the sizes (out, in) of the linears that differ from the original's, by disk name in the smaller model."""
        found = {}
        for number, block in enumerate(kept):
            for site in (site for site in self.streamed.sites[block] if site.expert is None):
                name = site.name.replace(f"{self.family.blocks}.{block}.", f"{self.family.blocks}.{number}.", 1)
                shape = shapes[f"{name}.weight"]
                size = (shape[1], shape[0]) if site.transposed else (shape[0], shape[1])
                if size != site.shape:
                    found[name] = size
        return found

    def tensors(self, block: int, cut: Cut) -> dict[str, Tensor | None]:
        """Return the tensors of a block that are not as they were, by disk name; None: it is gone."""
        found: dict[str, Tensor | None] = {}
        fused: dict[str, list[Tensor]] = {}  # of experts that are in one tensor
        for site in self.streamed.sites[block]:
            rows, columns = self.groups.rows(site, cut), self.groups.columns(site, cut)
            if rows is None and columns is None:
                continue
            dtype = self.source.dtype(site.tensor)
            weight = cut.weights[site.name] if site.name in cut.weights else self.streamed.weight(site)
            if rows is not None:
                weight = weight[rows]
                if (bias := f"{site.name}.bias") in self.source.entries:
                    found[bias] = self.source.tensor(bias)[rows].contiguous()
                if (joined := f"{site.tensor}_bias") in self.source.entries and site.slice is not None:
                    fused.setdefault(joined, []).append(self.source.tensor(joined, site.slice)[rows])
            weight = weight if columns is None else weight[:, columns]
            weight = (weight.T if site.transposed else weight).to(dtype).contiguous()
            if site.slice is None:
                found[site.tensor] = weight
            else:
                fused.setdefault(site.tensor, []).append(weight)
        found |= {name: torch.stack(parts) for name, parts in fused.items()}
        base = f"{self.family.blocks}.{block}."
        for single in (base + name for name in self.family.heads.single) if self.family.heads is not None else ():
            if cut.heads is not None and single in self.source.entries:
                found[single] = self.source.tensor(single)[cut.heads].contiguous()
        return found if cut.experts is None else self._experts(block, cut.experts, found) | found

    def _experts(self, block: int, kept: Tensor, made: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return what changes where experts go: routers and what is stored for all of them; those that go, which are None.

        Tensors that are made already hold the experts that stay.
        """
        layout = self.family.experts
        assert layout is not None
        base = f"{self.family.blocks}.{block}."
        together = (*layout.routers, f"{layout.disk}.*_bias")  # with a row or number for each expert
        names = [n for n in self.source.entries if n.startswith(base) and matches(n.removeprefix(base), together)]
        names += sorted({site.tensor for site in self.streamed.sites[block] if site.slice is not None})
        found: dict[str, Tensor | None] = {}
        for name in (name for name in names if name not in made):
            value = self.source.tensor(name)
            if value.shape[0] != self.before.experts:
                raise RecipeError(
                    f"--experts: {name} has {value.shape[0]} rows, and the config says {self.before.experts} experts"
                )
            found[name] = value[kept].contiguous()
        if not any(name.removeprefix(base) in layout.routers for name in names):
            raise RecipeError(f"--experts: {base}{layout.routers[0]} is not there; the routers of this model are not known")
        gone = set(range(self.before.experts)) - set(kept.tolist())
        single = [site for site in self.streamed.sites[block] if site.expert in gone and site.slice is None]
        return found | {site.tensor: None for site in single}

    def renamed(self, name: str, places: Mapping[int, int], experts: Mapping[int, Tensor]) -> str | None:
        """Return the name of a tensor in the smaller model; None where its block is gone."""
        if not name.startswith(self.family.blocks + "."):
            return name
        number, _, rest = name.removeprefix(self.family.blocks + ".").partition(".")
        if int(number) not in places:
            return None
        layout = self.family.experts
        if layout is not None and int(number) in experts and rest.startswith(layout.disk + "."):
            expert, _, more = rest.removeprefix(layout.disk + ".").partition(".")
            if expert.isdigit():
                rest = f"{layout.disk}.{experts[int(number)].tolist().index(int(expert))}.{more}"
        return f"{self.family.blocks}.{places[int(number)]}.{rest}"

    def config(self, kept: list[int], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """Return config.json of what is left, given the sizes (out, in) of the linears by disk name where blocks differ."""
        before = self.before
        left = self.left
        if self.wish.uneven:  # as many heads read a group as before, and every linear's size is its own
            counts = {name: getattr(before, name) for name in CHANNELS}
            left = replace(left, heads=before.heads, kv_groups=before.kv_groups, **counts)
        return uneven.config_with(smaller_config(self.source.config, self.family, before, left, kept), sizes)
