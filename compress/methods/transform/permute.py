"""Channels in another order before N:M, so that those worth keeping do not meet in one group (Zhang et al., ICLR 2024).

Problem     N:M keeps N of every M neighbouring columns. Where more than N of them matter, something is lost, while other groups
            keep columns that do not. Reordering changes which columns share a group: maximise K(order) = sum over rows and
            groups of the N highest scores S_ij in a group of the reordered matrix.
Places      where an order costs nothing at run time, because the rows that a column comes from can move with it: down_proj with
            rows of gate and up, every expert by itself; o_proj within a head with rows of v, one order for all heads that share a
            KV group. Inputs of q, k, v, gate and up are the residual stream and keep their order. The family says where.
Scores      ria     (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) (mean x_j^2)^(1/4), the paper's
            wanda   |W_ij| (mean x_j^2)^(1/2)
            error   W_ij^2 mean x_j^2, what removing the weight alone adds to the squared error of the outputs
Steps       1. Deal: columns by the sum of their scores, in M strips of d / M; group g gets number g of every even strip and
               number g from the end of every odd one, which mixes strong and weak. The old order stays where it keeps more.
            2. Refine: take the column at one position out of every group, and reassign these columns to the groups by a linear
               sum assignment. With t_rg the Nth highest score left in row r of group g and a_rg the sum of the N - 1 above it,
               group g keeps sum_r a_rg + max(t_rg, S_rc) with column c; max(t, s) = (t + s + |t - s|) / 2, of which only the
               last term depends on the pairing. So the assignment maximises the L1 distances of the columns of t and S. All
               positions in turn, `rounds` times, or until nothing is gained; after each round the columns of group g shift
               by g positions, so that others can be exchanged. The old order is one of the assignments, so K never falls;
               it is summed in float64, and an order that does not raise it is rejected. Of more than `together` groups, every
               n-th is in one part, and columns are exchanged within parts.
Shapes      S (sets, rows, size): heads that share an order are stacked; order (sets, size); distances (sets, groups,
            groups). A round takes out d^2 / M operations, in parts of g groups out d g.
Exactness   rows and columns move, no value changes: the block's function is the same up to the order of sums.
Defaults    `error` and 10 rounds. At 2:4 on the small dense model, KL to the original on held-out text: RIA 0.430, with an order
            for `ria` 0.407, for `error` 0.376; Wanda 0.447, with one for `ria` 0.410, `wanda` 0.404, `error` 0.394. Ten rounds
            keep all but 4e-4 of what forty do.
Failures    slow: a round of a matrix (4096, 11008) takes 42 s on one busy core of an AMD EPYC, and a single position of it
            46 s without parts; assignments are solved on the CPU even where a GPU does the rest. There is nothing to gain
            where columns are alike, and little to choose from where heads are narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compress.calibration.statistics import MeanSquare, Statistics
from compress.methods.block import Block, Permutable, TransformResult
from compress.methods.method import Method
from compress.methods.pruning import NofM, kept_of
from compress.methods.solvers.mask_scores import contribution, mean_square, relative_importance

_LEAST = 1e-6  # of what is kept: a round that gains less is the last


def kept(score: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Return the sums (sets,) in float64 of the scores (sets, rows, size) that N:M keeps."""
    count, of = pattern
    sums: Tensor = score.unflatten(2, (-1, of)).topk(count).values.sum((1, 2, 3), dtype=torch.float64)
    return sums


def reordered(score: Tensor, order: Tensor) -> Tensor:
    """Return scores (sets, rows, size) with their columns in an order (sets, size)."""
    return score.gather(2, order.unsqueeze(1).expand_as(score))


def dealt(score: Tensor, of: int) -> Tensor:
    """Return the order (sets, size) of columns of scores (sets, rows, size) that mixes strong and weak ones in groups."""
    strips: Tensor = score.sum(1, dtype=torch.float64).argsort(dim=1, stable=True).unflatten(1, (of, -1)).clone()
    strips[:, 1::2] = strips[:, 1::2].flip(2)
    return strips.transpose(1, 2).flatten(1)


def assigned(score: Tensor, order: Tensor, position: int, pattern: tuple[int, int]) -> Tensor:
    """Return the order (sets, size) with the columns at one position reassigned to the groups that keep most with them."""
    count, of = pattern
    groups = reordered(score, order).unflatten(2, (-1, of))  # (sets, rows, groups, M)
    rest = torch.cat([groups[..., :position], groups[..., position + 1 :]], 3)
    least = rest.topk(count).values[..., -1]
    distance = torch.cdist(least.transpose(1, 2), groups[..., position].transpose(1, 2), p=1)
    chosen = torch.stack([torch.from_numpy(linear_sum_assignment(d.numpy(), maximize=True)[1]) for d in distance.cpu()])
    tried: Tensor = order.unflatten(1, (-1, of)).clone()
    tried[..., position] = tried[..., position].gather(1, chosen.to(order.device))
    return tried.flatten(1)


def turned(order: Tensor, of: int) -> Tensor:
    """Return an order (sets, size) with each group's columns shifted to other positions, so that others can be exchanged."""
    groups: Tensor = order.unflatten(1, (-1, of))
    first = torch.arange(groups.shape[1], device=order.device).unsqueeze(1)
    places = (torch.arange(of, device=order.device) + first) % of
    return groups.gather(2, places.expand_as(groups)).flatten(1)


def refined(score: Tensor, order: Tensor, pattern: tuple[int, int], rounds: int) -> Tensor:
    """Return an order (sets, size) that keeps at least as much of scores (sets, rows, size)."""
    held = kept(reordered(score, order), pattern)
    idle = 0
    for _ in range(rounds):
        before = held
        for position in range(pattern[1]):
            tried = assigned(score, order, position, pattern)
            found = kept(reordered(score, tried), pattern)
            order = torch.where((found > held).unsqueeze(1), tried, order)
            held = torch.maximum(found, held)
        idle = idle + 1 if bool((held <= before * (1 + _LEAST)).all()) else 0
        if idle == pattern[1]:
            break
        order = turned(order, pattern[1])
    return order


def parts_of(groups: int, most: int) -> int:
    """Return the number of equal parts that `groups` are cut into, each of at most `most`; 1 where parts would be tiny."""
    found = next(n for n in range(-(-groups // most), groups + 1) if groups % n == 0)
    return found if groups // found * 4 >= most else 1


def refined_in_parts(score: Tensor, order: Tensor, pattern: tuple[int, int], rounds: int, parts: int) -> Tensor:
    """Return what `refined` does if only groups of the same part exchange columns; a part has every `parts`-th group."""
    sets = len(order)
    spread = order.unflatten(1, (-1, parts, pattern[1])).transpose(1, 2).flatten(2)  # (sets, parts, size / parts)
    rows = reordered(score, spread.flatten(1)).unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
    inner = refined(rows, torch.arange(rows.shape[2], device=rows.device).expand(len(rows), -1), pattern, rounds)
    found: Tensor = spread.gather(2, inner.unflatten(0, (sets, parts))).flatten(1)
    return found


def best_order(score: Tensor, pattern: tuple[int, int], rounds: int, together: int = 512) -> Tensor:
    """Return the order (sets, size), of those that the two steps find, in which N:M keeps most of scores (sets, rows, size)."""
    sets, _, size = score.shape
    first = torch.arange(size, device=score.device).expand(sets, size)
    other = dealt(score, pattern[1])
    better = kept(reordered(score, other), pattern) > kept(score, pattern)
    start = torch.where(better.unsqueeze(1), other, first)
    found = refined_in_parts(score, start, pattern, rounds, parts_of(size // pattern[1], together))
    # Neither the order within groups nor that of groups matters: take the one nearest to the old order.
    groups: Tensor = found.unflatten(1, (-1, pattern[1])).sort(2).values
    return groups.gather(1, groups[..., :1].argsort(1).expand_as(groups)).flatten(1)


def moved(values: Tensor, places: Tensor, order: Tensor) -> Tensor:
    """Return values with those at places (sets, parts, size) of the first axis reordered by order (sets, size)."""
    result = values.clone()
    result[places.flatten()] = values[places.gather(2, order.unsqueeze(1).expand_as(places)).flatten()]
    return result


class Permute(Method):
    """Options of the order of channels."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (MeanSquare,)
    scope: ClassVar[Literal["site", "block"]] = "block"

    pattern: Annotated[NofM, Field(description="N:M that it is for; null: of the method that prunes")] = None
    score: Annotated[Literal["ria", "wanda", "error"], Field(description="of which as much as can be is kept")] = "error"
    rounds: Annotated[int, Field(ge=0, le=1000, description="of refinement at most; 0: columns are only dealt")] = 10

    together: Annotated[int, Field(ge=2, description="groups of M that exchange columns with each other; fewer are faster")] = 512

    def pattern_of(self, pruning: Method) -> tuple[int, int] | str:
        """The N and M to search for when `pruning` follows, or what is missing to know them."""
        text = self.pattern or getattr(pruning, "pattern", None)
        if text is None:
            return f"{pruning.path} has no pattern here, so give it to the transform, as pattern: '2:4', or leave the weight out"
        return kept_of(text)

    def check_before(self, shape: tuple[int, int], rounding: Method) -> str | None:
        """Say whether the pattern is unknown."""
        found = self.pattern_of(rounding)
        return found if isinstance(found, str) else None

    def __call__(self, block: Block) -> TransformResult:
        """Reorder the channels of a block."""
        places = {place.reader: place for place in block.permutables}
        notes: dict[str, Any] = {site: {"order": "as it was: its input is read by all of the block"} for site in block.sites}
        weights: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        before, done = block.others(), 0
        for sites, stats in block.observe_in_turn((MeanSquare,)):
            square = mean_square(stats)
            for site in sites:
                if (place := places.get(site)) is None:
                    continue
                order, notes[site] = self.order(block, place, square)
                done += 1
                block.say(done / len(places))
                if order is None:
                    continue
                at = {name: where.to(order.device) for name, where in place.rows.items()}
                columns = place.columns.to(order.device)
                weights[site] = moved(weights.get(site, block.weight(site)).T, columns, order).T.contiguous()
                for name, where in at.items():
                    weights[name] = moved(weights.get(name, block.weight(name)), where, order)
                for name, where in place.biases.items():
                    bias = others.get(name, before[name])
                    others[name] = moved(bias.flatten(), where.to(bias.device), order.to(bias.device)).view_as(bias)
        return TransformResult(weights, others, notes)

    def order(self, block: Block, place: Permutable, square: Tensor) -> tuple[Tensor | None, Mapping[str, Any]]:
        """Return the order (sets, size) for a place, None where it stays as it is, and notes for the report."""
        if place.obstacle is not None:
            return None, {"order": f"as it was: {place.obstacle}"}
        pattern = self.pattern_of(block.rounding(place.reader))
        assert isinstance(pattern, tuple), "checked before any weight was read"
        if place.columns.shape[2] % pattern[1]:
            width = place.columns.shape[2]
            return None, {"order": f"as it was: {width} channels of a head are not a multiple of {pattern[1]}"}
        score = self.scores(block.weight(place.reader), square)
        rows = score[:, place.columns.to(score.device)]  # (out, sets, copies, size)
        rows = rows.permute(1, 0, 2, 3).flatten(1, 2)
        order = best_order(rows, pattern, self.rounds, self.together)
        total = float(rows.sum(dtype=torch.float64)) or 1.0
        shares = (float(kept(r, pattern).sum()) / total for r in (rows, reordered(rows, order)))
        notes: dict[str, Any] = dict(zip(("kept_before", "kept"), (round(share, 5) for share in shares), strict=True))
        return order, notes if bool(square.any()) else notes | {"fallback": "by weights alone: no token was seen"}

    def scores(self, weight: Tensor, square: Tensor) -> Tensor:
        """Return the scores of weight (out, in), given the mean squares (in,) of its inputs."""
        if self.score == "ria":
            return relative_importance(weight, square)
        found = contribution(weight, square)
        return found if self.score == "wanda" else found.square()


METHOD = Permute
