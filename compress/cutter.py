"""A model on the way to a smaller one: what its blocks need least, and what is left of each.

Blocks go first, those of the least influence, one after the other; then experts, by what they give to the blocks that stay; then
heads and channels, block by block, each with the inputs that come out of what was cut before it. The linears that read what is
left are repaired by least squares. A whole model is in memory where scores need gradients, else one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress import importance
from compress.calibration import uneven
from compress.calibration.claims import Claims, matches, settings
from compress.calibration.experts import ExpertLoop
from compress.calibration.families import Site
from compress.calibration.observe import Tap, batches, observe
from compress.calibration.skeleton import Skeleton
from compress.calibration.statistics import Hessian
from compress.checkpoint import Source
from compress.errors import RecipeError
from compress.smaller import Wish, after, channel_step, expert_sets, sizes_of, smaller_config

TOKENS = 8192  # that pass through a block at a time
Listen = Callable[[int, int, str, float], None]


@dataclass(frozen=True)
class Cut:
    """What stays of one block: places of heads, KV groups, channels and experts, and the linears that were repaired."""

    heads: Tensor | None
    groups: Tensor | None
    channels: Tensor | None
    experts: Tensor | None
    weights: dict[str, Tensor]  # by disk name of the site, (out, in), columns that go are 0

    def places(self) -> dict[str, Tensor]:
        """The places of what stays, by what it is."""
        found = {name: getattr(self, name) for name in ("heads", "groups", "channels", "experts")}
        return {name: value for name, value in found.items() if value is not None}


class Cutter:
    """One model on the way to a smaller one."""

    def __init__(self, source: Source, claims: Claims, wish: Wish, ids: Tensor, device: torch.device, listen: Listen) -> None:
        self.source, self.claims, self.wish, self.ids, self.listen = source, claims, wish, ids, listen
        self.family = claims.family
        self.before = sizes_of(source, self.family)
        self.left = after(wish, self.family, self.before)
        self.sets = expert_sets(settings(source), self.left, self.before) if wish.experts else 1
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
        sites = {(block, what): site for block in kept for what, site in self._readers(block).items()}
        if self.wish.score not in importance.GRADIENTS or not sites:
            return {}
        linears = {name: self.skeleton.linear(site) for name, site in sites.items()}
        widths = {name: site.shape[1] for name, site in sites.items()}
        with self.skeleton.whole_model(), self._only(kept):
            windows = self._windows()
            found = importance.gate_gradients(linears, widths, windows, self.skeleton.whole)
            return importance.group_scores(found, {name: self._unit(name[1]) for name in sites}, self.wish.score)

    def kept_experts(self, kept: list[int]) -> dict[int, Tensor]:
        """Return the experts that stay of every block that has some, by what each gives while all of them are there."""
        found: dict[int, Tensor] = {}
        if not self.wish.experts:
            return found
        hidden = self._embedded()
        for number, block in enumerate(kept):
            self.listen(number, len(kept), "experts", 0.0)
            self.skeleton.load(block)
            sums = importance.ExpertScore(self.before.experts)
            loops = [loop for loop in self.skeleton.expert_loops(block) if isinstance(loop, ExpertLoop)]
            for loop in loops:
                loop.listener = sums.add
            hidden = [self.skeleton.forward(block, batch) for batch in hidden]
            for loop in loops:
                loop.listener = None
                found[block] = importance.kept_of(sums.scores(), self.left.experts, self.sets)
            self.skeleton.release(block)
        return found

    def counts(self, scores: Mapping[importance.Names, Tensor]) -> dict[importance.Names, int]:
        """Return how many groups stay by block and kind, where blocks may differ; empty where all keep the same number."""
        found: dict[importance.Names, int] = {}
        for what in {name[1] for name in scores} if self.wish.uneven else set():
            mine = {block: score for (block, kind), score in scores.items() if kind == what}
            each, step = (
                (self.left.channels, channel_step(self.wish, self.before)) if what == "channels" else (self.left.kv_groups, 1)
            )
            found |= {(block, what): count for block, count in importance.units_of(mine, each * len(mine), step).items()}
        return found

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

    def cut_blocks(
        self, kept: list[int], scores: dict[importance.Names, Tensor], experts: dict[int, Tensor], done: Mapping[int, Cut]
    ) -> Iterator[Cut]:
        """Yield what stays of every kept block; the calibration runs on through what is left. `done` are those of an earlier run.

        Experts stay in the calibration, also those that go: what is repaired in these models lies before them.
        """
        hidden = self._embedded()
        counts = self.counts(scores)
        for number, block in enumerate(kept):
            self.listen(number, len(kept), "cutting", 0.0)
            self.skeleton.load(block)
            cut = done.get(block) or self._cut(block, scores, counts, experts.get(block), hidden)
            sites = {site.name: site for site in self.skeleton.sites[block]}
            for name, weight in cut.weights.items():
                self.skeleton.put(sites[name], weight)
            hidden = [self.skeleton.forward(block, batch) for batch in hidden]
            self.skeleton.release(block)
            yield cut

    def _cut(
        self,
        block: int,
        scores: dict[importance.Names, Tensor],
        counts: dict[importance.Names, int],
        experts: Tensor | None,
        hidden: list[Tensor],
    ) -> Cut:
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
                channels = columns = importance.kept_of(score, counts.get((block, what), self.left.channels))
            else:
                whole = self.left.kv_groups < self.before.kv_groups
                keep = counts.get((block, what), len(score) * self.left.heads // self.before.heads)
                chosen = importance.kept_of(score, keep, 1 if whole else self.before.kv_groups)
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
        return Cut(heads, groups, channels, experts, weights)

    def _hessian(self, block: int, site: Site, hidden: list[Tensor]) -> Tensor:
        def run() -> None:
            for batch in hidden:
                self.skeleton.forward(block, batch)

        tap = Tap(site.tap, (self.skeleton.linear(site),), site.shape[1], (Hessian,))
        statistic = observe([tap], run, self.skeleton.device)[site.tap][Hessian]
        assert isinstance(statistic, Hessian)
        return statistic.matrix()

    def restored(self, block: int, places: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Cut:
        """Return what an earlier run left of a block, given the places of what stays and the tensors that it stored."""
        cut = Cut(places.get("heads"), places.get("groups"), places.get("channels"), places.get("experts"), {})
        for site in self._readers(block).values():
            columns = self.columns(site.kind, cut)
            weight = self.skeleton.weight(site).float()
            stored = tensors[site.tensor].float()
            made = torch.zeros_like(weight)
            made[:, columns] = stored.T if site.transposed else stored
            cut.weights[site.name] = made
        return cut

    def sizes(self, kept: list[int], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
        """Return the sizes (out, in) of the linears that differ from the original's, by disk name in the smaller model."""
        found = {}
        for number, block in enumerate(kept):
            for site in self.skeleton.sites[block]:
                name = site.name.replace(f"{self.family.blocks}.{block}.", f"{self.family.blocks}.{number}.", 1)
                shape = shapes[f"{name}.weight"]
                size = (shape[1], shape[0]) if site.transposed else (shape[0], shape[1])
                if size != site.shape:
                    found[name] = size
        return found

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

    def tensors(self, block: int, cut: Cut) -> dict[str, Tensor | None]:
        """Return the tensors of a block that are not as they were, by disk name; None: it is gone."""
        found: dict[str, Tensor | None] = {}
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
        return found if cut.experts is None else found | self._experts(block, cut.experts)

    def _experts(self, block: int, kept: Tensor) -> dict[str, Tensor | None]:
        """Return what changes where experts go: routers and what is stored for all of them; those that go, which are None."""
        layout = self.family.experts
        assert layout is not None
        base = f"{self.family.blocks}.{block}."
        together = (*layout.routers, f"{layout.disk}.*_bias")  # with a row or number for each expert
        names = [n for n in self.source.entries if n.startswith(base) and matches(n.removeprefix(base), together)]
        names += sorted({site.tensor for site in self.skeleton.sites[block] if site.slice is not None})
        found: dict[str, Tensor | None] = {}
        for name in names:
            value = self.source.tensor(name)
            if value.shape[0] != self.before.experts:
                raise RecipeError(
                    f"--experts: {name} has {value.shape[0]} rows, and the config says {self.before.experts} experts"
                )
            found[name] = value[kept].contiguous()
        if not any(name.removeprefix(base) in layout.routers for name in names):
            raise RecipeError(f"--experts: {base}{layout.routers[0]} is not there; the routers of this model are not known")
        gone = set(range(self.before.experts)) - set(kept.tolist())
        single = [site for site in self.skeleton.sites[block] if site.expert in gone and site.slice is None]
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
            left = replace(left, heads=before.heads, kv_groups=before.kv_groups, channels=before.channels)
        return uneven.config_with(smaller_config(self.source.config, self.family, before, left, kept), sizes)
