"""What goes together where heads, KV groups, channels or experts are cut: which rows and columns of which linears of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.architecture.channels import channel_rows, rows_left
from compress.architecture.family import Channels, Family, Site
from compress.structured_pruning.importance import spread
from compress.structured_pruning.sizes import Sizes

_PLACES = ("heads", "groups", "experts")
_CHANNELS = "channels."  # in front of the linear that reads them, where what stays of a block is named


@dataclass(frozen=True)
class Cut:
    """What stays of one block: places of heads, KV groups, experts and channels, and the linears that were repaired."""

    heads: Tensor | None = None
    groups: Tensor | None = None
    experts: Tensor | None = None
    channels: Mapping[str, Tensor] = field(default_factory=dict)  # by disk name of the site that reads them
    weights: dict[str, Tensor] = field(default_factory=dict)  # by disk name of the site, (out, in), columns that go are 0
    by_magnitude: tuple[str, ...] = ()  # sites without a score, as no token reached them

    def places(self) -> dict[str, Tensor]:
        """The places of what stays, by what it is."""
        found = {name: getattr(self, name) for name in _PLACES}
        return {k: v for k, v in found.items() if v is not None} | {f"{_CHANNELS}{k}": v for k, v in self.channels.items()}


def cut_of(places: Mapping[str, Tensor]) -> Cut:
    """Return what stays of a block, given the places of it by what it is."""
    channels = {name.removeprefix(_CHANNELS): value for name, value in places.items() if name.startswith(_CHANNELS)}
    return Cut(places.get("heads"), places.get("groups"), places.get("experts"), channels)


@dataclass(frozen=True)
class Reader:
    """A linear that reads what is to be cut: heads, or channels of a kind, `unit` neighbouring columns at a time."""

    site: Site
    unit: int
    channels: Channels | None = None


@dataclass(frozen=True)
class Groups:
    """A model of a family before and after, with its sites by block."""

    family: Family
    sites: Mapping[int | None, list[Site]]
    before: Sizes
    left: Sizes

    def readers(self, block: int, experts: Tensor | None) -> list[Reader]:
        """The linears of a block that read heads and channels, as far as these are to be cut; experts that go are left alone."""
        heads, found = self.family.heads, []
        for site in self.sites[block]:
            if heads is not None and site.kind == heads.output and self.left.heads < self.before.heads:
                groups = self.before.kv_groups if self.left.kv_groups < self.before.kv_groups else self.before.heads
                found.append(Reader(site, site.shape[1] // groups))
            channels = next((c for c in self.family.channels if c.output == site.kind), None)
            stays = experts is None or site.expert is None or site.expert in experts.tolist()
            if channels is not None and stays and getattr(self.left, channels.size) < getattr(self.before, channels.size):
                found.append(Reader(site, 1, channels))
        return sorted(found, key=lambda reader: reader.channels is not None)

    def rows(self, site: Site, cut: Cut) -> Tensor | None:
        """Return the rows of a linear that stay, None if all do."""
        heads, before = self.family.heads, self.before
        if heads is not None and cut.heads is not None and cut.groups is not None:
            if site.kind in heads.queries:
                return spread(cut.heads, site.shape[0] // before.heads)
            if site.kind in heads.keys:
                return spread(cut.groups, site.shape[0] // before.kv_groups)
            if site.kind == heads.joint:
                size = site.shape[0] // (before.heads + 2 * before.kv_groups)
                shares = (cut.heads, cut.groups + before.heads, cut.groups + before.heads + before.kv_groups)
                return spread(torch.cat(shares), size)
        for channels in self.family.channels:
            if site.kind in channels.inputs:
                reader = self._reader_of(channels, site)
                if reader.name in cut.channels:
                    return rows_left(channels.rows, reader.shape[1], cut.channels[reader.name])
        return None

    def _reader_of(self, channels: Channels, site: Site) -> Site:
        """The linear that reads the channels that a site writes."""
        of_block = self.sites[site.block]
        return next(s for s in of_block if s.kind == channels.output and s.expert == site.expert)

    def columns(self, site: Site, cut: Cut) -> Tensor | None:
        """Return the columns of a linear that stay, None if all do."""
        heads = self.family.heads
        if heads is not None and site.kind == heads.output and cut.heads is not None:
            return spread(cut.heads, site.shape[1] // self.before.heads)
        return cut.channels.get(site.name)

    def members(self, reader: Reader) -> list[Site]:
        """The linears that a reader's groups have rows or columns of, itself first. Keys that other heads use are of no head."""
        heads, kinds = self.family.heads, reader.channels.inputs if reader.channels is not None else ()
        if reader.channels is None and heads is not None:
            kinds = (*heads.queries, *(heads.keys if self.whole(reader) else ()), heads.joint or "")
        found = [s for s in self.sites[reader.site.block] if s.kind in kinds and s.expert == reader.site.expert]
        return [reader.site, *found]

    def left_of(self, reader: Reader) -> int:
        """How many groups of a reader stay where every block keeps as many."""
        if reader.channels is None:
            return reader.site.shape[1] // reader.unit * self.left.heads // self.before.heads
        # An expert that sees all tokens may be as wide as several.
        left, before = (int(getattr(sizes, reader.channels.size)) for sizes in (self.left, self.before))
        return reader.site.shape[1] * left // before

    def sets_of(self, reader: Reader) -> int:
        """How many sets of neighbouring groups keep as many each: KV groups, of single heads."""
        return 1 if reader.channels is not None or self.whole(reader) else self.before.kv_groups

    def whole(self, reader: Reader) -> bool:
        """Whether a reader's groups are KV groups, with all of their heads."""
        return reader.unit * self.before.kv_groups == reader.site.shape[1]

    def by_group(self, reader: Reader, site: Site, values: Tensor) -> Tensor:
        """Return sums (groups,) of values (out, in) of a member over what each of a reader's groups has of it."""
        heads, before = self.family.heads, self.before
        if site.name == reader.site.name:
            of_columns: Tensor = values.sum(0).unflatten(0, (-1, reader.unit)).sum(1)
            return of_columns
        rows = values.sum(1)
        if reader.channels is not None:
            of_channels: Tensor = rows[channel_rows(reader.channels.rows, reader.site.shape[1]).to(rows.device)].sum(0)
            return of_channels
        groups = reader.site.shape[1] // reader.unit
        if heads is None or site.kind != heads.joint:
            return rows.view(groups, -1).sum(1)
        size = len(rows) // (before.heads + 2 * before.kv_groups)
        queries, rest = rows[: before.heads * size], rows[before.heads * size :]
        found = queries.view(groups, -1).sum(1)
        return found + rest.view(2, groups, -1).sum((0, 2)) if self.whole(reader) else found
