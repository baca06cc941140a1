"""AWQ: scale channels with large inputs up before rounding, and what produces them down (arXiv 2306.00978).

Problem     rounding that ignores the inputs makes errors of the same size in every column of a group. Multiplying column j
            of W by s_j and dividing input j by s_j changes nothing, but makes the error of that column 1/s_j of what it was, at
            the expense of the columns that share its group.
Places      a set of linears that read one tensor, and its producer: a norm (q, k, v; gate and up, with all experts, the
            router and whatever else reads the norm), v_proj for o_proj (heads that share values share scales), up_proj for
            down_proj, fc1 for fc2 after a ReLU. The family says where. A place with a reader that cannot be rescaled is skipped.
Candidates  a_j = mean |x_j| over tokens, per channel the largest over the columns that read it, at least 1e-4 of the largest;
            s = a^alpha, alpha = 0, 1/n, .., (n-1)/n, divided by sqrt(max s * min s). alpha = 0 is the block as it is. Where the
            producer is a norm, s is what its weight is actually divided by, given that it is rounded to its stored dtype.
Loss        L(s) = sum over the linears of the set of T tr((W - Q_s) H (W - Q_s)^T), Q_s = Q(W diag s) diag(1/s): the squared
            error of their outputs, summed over all T tokens; H is the mean of x x^T. The paper runs the attention or the MLP
            on samples for every candidate instead. H covers all tokens, costs as many multiplications as `in` tokens, takes no
            forward pass, and serves experts, each of which sees its own tokens, like any other linear. It does not see how the
            softmax changes errors in q and k.
Steps       1. mean |x| of all inputs, in one pass; candidates for every place.
            2. H input by input; the losses of all candidates, all on the original weights.
            3. The best candidate of each place is applied: norm weight (and bias) or producer rows divided, columns multiplied.
            4. `clip`: for every row and group the bound among amax (1 - i/m), i = 0 .. m/2 - 1 at `clip_points` m, of least
               (w - Q(clamp w)) H_gg (w - Q(clamp w))^T, the error of the group's part of the output; H_gg is the block of H on
               the group's columns, scaled as these are. The weight is clamped there. Only this step is not an exact rewrite: it
               runs before methods that ignore the inputs, and not before those that compensate, unless the option says so.
Shapes      W (out, in), s (in,), H (in, in), bounds (out, groups).
Grid        Q is the grid of the method that rounds the sites afterwards, or the one that the options give: `quant/gptq` rounds
            better, but its grid is the same.
Defaults    20 candidates and bounds down to half, as in the paper. Measured: on weights of a small llama under correlated inputs
            clamping takes 4 to 7 % off the output error of rounding to nearest and adds 2 to 3 % to that of GPTQ, which can
            compensate for rounding but not for a clamp.
Failures    inputs of equal size leave nothing to gain; norms in few bits take scales only to their own precision (they are
            then the exact quotient, but a router, a bias of a norm or of v_proj is rounded once more). Compensation
            (GPTQ) does more than scales at every width; before it, scales gain little where channels are of similar size.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.calibration.statistics import Hessian, Magnitude, Statistics, statistic
from compress.methods.block import Block, Scalable, TransformResult
from compress.methods.method import Bits, GroupSize, Method, group_columns, indivisible
from compress.methods.solvers.error_feedback import full_precision
from compress.methods.solvers.uniform_grid import Range, encode, fit
from compress.methods.transform._scaling import Moved, expand, gather

_FLOOR = 1e-4  # of the largest mean magnitude: quieter channels share one scale


@dataclass(frozen=True)
class Rounding:
    """The grid that scales are searched for."""

    bits: int
    group_size: GroupSize
    symmetric: bool
    range: Range

    def __call__(self, weight: Tensor) -> Tensor:
        """Return weight (out, in) rounded to its grid, in its own dtype."""
        grid = fit(weight, self.bits, self.group_size, symmetric=self.symmetric, search=self.range == "mse")
        codes = encode(weight, grid, self.group_size).to(weight.dtype).view(*grid.scale.shape, -1)
        zero = grid.levels(weight.dtype)[2]
        zero = zero.unsqueeze(2) if isinstance(zero, Tensor) else zero
        return ((codes - zero) * grid.scale.to(weight.dtype).unsqueeze(2)).view_as(weight)


def candidates(magnitude: Tensor, read: Tensor, points: int) -> Tensor:
    """Mean magnitudes (channels,) and which channels are read at all -> scales (points, channels), the first all ones.

    A channel without a reader keeps its size.
    """
    top = magnitude[read].max()
    if not bool(top > 0):
        return magnitude.new_ones(points, magnitude.numel())
    alpha = torch.arange(points, dtype=magnitude.dtype, device=magnitude.device).unsqueeze(1) / points
    scales = (magnitude / top).clamp_min(_FLOOR).pow(alpha)
    inside = scales[:, read]
    middle = (inside.amax(1) * inside.amin(1)).sqrt_().unsqueeze(1)
    return torch.where(read, scales / middle, 1.0)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) of weights (out, in) under H (in, in), in float64."""
    error = weight - rounded
    return ((error @ hessian) * error).sum(dtype=torch.float64)


def losses(weight: Tensor, hessian: Tensor, scales: Tensor, rounding: Rounding) -> Tensor:
    """Output error of weight (out, in) under H (in, in) for each row of scales (candidates, in); (candidates,) float64."""
    return torch.stack([output_error(weight, rounding(weight * s) / s, hessian) for s in scales])


def clip(weight: Tensor, hessian: Tensor, rounding: Rounding, points: int) -> Tensor:
    """Clamp every row and group of weight (out, in) at the bound that best preserves its part of the output; H is (in, in)."""
    rows, columns = weight.shape
    size = group_columns(rounding.group_size, columns)
    inner = hessian.view(columns // size, size, columns // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grouped = weight.view(rows, -1, size)
    top = grouped.abs().amax(2)  # (out, groups)
    best, bound = torch.full_like(top, torch.inf), top
    for step in range(points // 2):
        tried = top * (1 - step / points)
        limit = tried.unsqueeze(2)
        rounded = rounding(grouped.clamp(-limit, limit).view_as(weight)).view_as(grouped)
        error = (grouped - rounded).transpose(0, 1)  # (groups, out, group size)
        loss = ((error @ inner) * error).sum(2).T
        better = loss < best
        best, bound = torch.where(better, loss, best), torch.where(better, tried, bound)
    return grouped.clamp(-bound.unsqueeze(2), bound.unsqueeze(2)).view_as(weight)


class AWQ(Method):
    """Options of AWQ."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Magnitude, Hessian)
    scope: ClassVar[Literal["site", "block"]] = "block"

    scale: Annotated[bool, Field(description="move scales between tensors")] = True
    points: Annotated[int, Field(ge=2, le=1000, description="candidates of alpha, from 0 to just below 1")] = 20
    clip: Annotated[
        bool | None,
        Field(description="clamp weights to the best bound of each group; null: where the method that rounds needs no data"),
    ] = None
    clip_points: Annotated[int, Field(ge=2, le=1000, description="steps of the bound from the largest weight to 0")] = 20
    clip_skip: Annotated[tuple[str, ...], Field(description="globs of weights that are not clamped: queries and keys")] = (
        "*.q_proj",
        "*.k_proj",
        "*.qkv_proj",
        "*.c_attn",
        "*.q_a_proj",
        "*.q_b_proj",
        "*.kv_a_proj_with_mqa",
        "*.kv_b_proj",
    )
    bits: Annotated[Bits | None, Field(description="of the grid searched for; null: of the method that rounds")] = None
    group_size: Annotated[GroupSize | None, Field(description="of the grid; null: of the method that rounds")] = None
    symmetric: Annotated[bool | None, Field(description="of the grid; null: of the method that rounds")] = None
    range: Annotated[Range | None, Field(description="of the grid; null: of the method that rounds, or minmax")] = None

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.scale and self.clip is False:
            raise ValueError("scale and clip are both false: nothing is left to do")
        return self

    def grid(self, rounding: Method) -> Rounding | str:
        """The grid to search for when `rounding` follows, or what is missing to know it."""
        values: dict[str, Any] = {name: getattr(rounding, name, None) for name in ("bits", "group_size", "symmetric", "range")}
        values |= {name: value for name in values if (value := getattr(self, name)) is not None}
        if missing := [name for name in ("bits", "group_size", "symmetric") if values[name] is None]:
            return f"{rounding.path} has no {' and no '.join(missing)}, so give them to the transform, as options"
        return Rounding(values["bits"], values["group_size"], values["symmetric"], values["range"] or "minmax")

    def check_before(self, shape: tuple[int, int], rounding: Method) -> str | None:
        """Say whether the grid is unknown, or its group size does not divide the columns of a weight (out, in)."""
        found = self.grid(rounding)
        return found if isinstance(found, str) else indivisible(shape[1], found.group_size)

    def __call__(self, block: Block) -> TransformResult:
        """Move scales and clamp weights in a block."""
        with torch.no_grad(), full_precision():
            return _Search(self, block).run()


class _Search:
    """AWQ on one block."""

    def __init__(self, options: AWQ, block: Block) -> None:
        self.options, self.block = options, block
        self.moved = Moved(block)
        self.notes: dict[str, dict[str, Any]] = {}
        self.grids: dict[str, Rounding] = {}
        for site in block.sites:
            grid = options.grid(block.rounding(site))
            assert isinstance(grid, Rounding), "checked before any weight was read"
            self.grids[site] = grid
            self.notes[site] = {"scales": "what produces its input can take none"} if options.scale else {}

    def run(self) -> TransformResult:
        """Do all steps."""
        if self.options.scale:
            self.scale()
        wanted = [site for site in self.block.sites if self.clips(site)]
        if wanted:
            self.clip(set(wanted))
        return self.moved.changed(self.notes, scaled_only=not wanted)

    def scale(self) -> None:
        """Steps 1 to 3."""
        places = []
        for place in self.block.scalables:
            if place.obstacle is None:
                places.append(place)
            for site in place.sites:
                self.notes[site] = {"scales": place.obstacle}
        if not places:
            return
        wanted = self.candidates(places)
        found = [torch.zeros(self.options.points, dtype=torch.float64, device=w.device) for w in wanted]
        by_site = {site: number for number, place in enumerate(places) for site in place.sites}
        for sites, stats in self.block.observe_in_turn((Hessian,)):
            mine = [site for site in sites if site in by_site]
            if not mine:
                continue
            number = by_site[mine[0]]  # all that read one tensor are at one place
            scales = torch.stack([expand(places[number], s) for s in wanted[number]])
            hessian = statistic(stats, Hessian)
            for rounding, weight in self.joined(mine):
                found[number] += losses(weight, hessian.matrix(), scales, rounding) * hessian.tokens
        for place, scales, loss in zip(places, wanted, found, strict=True):
            best = int(loss.argmin())
            ratio = float(loss[best] / loss[0]) if float(loss[0]) > 0 else 1.0
            if best:
                self.moved.move(place, scales[best])
            for site in place.sites:
                self.notes[site] = {"alpha": best / self.options.points, "loss": round(ratio, 4)}

    def candidates(self, places: list[Scalable]) -> list[Tensor]:
        """The scales (points, channels) to try at each place, as they would be applied."""
        stats = self.block.observe((Magnitude,))
        result = []
        for place in places:
            # Tokens that reach several readers, such as experts after one norm, count at each of them.
            taps = list({id(m): m for m in (statistic(stats[site], Magnitude) for site in place.sites)}.values())
            total = sum((m.total for m in taps[1:]), taps[0].total) / max(sum(m.tokens for m in taps), 1)
            channels = gather(place, total, self.moved.number(place))
            wanted = candidates(channels, self.moved.read(place).to(total.device), self.options.points).float()
            result.append(torch.stack([self.moved.effective(place, s) for s in wanted]))
        return result

    def joined(self, sites: list[str]) -> list[tuple[Rounding, Tensor]]:
        """The original weights of sites that read one tensor, stacked along the rows where their grids are the same."""
        by_grid: dict[Rounding, list[Tensor]] = {}
        for site in sites:
            by_grid.setdefault(self.grids[site], []).append(self.block.weight(site))
        return [(rounding, torch.cat(weights)) for rounding, weights in by_grid.items()]

    def clips(self, site: str) -> bool:
        """Whether the weights of a site are to be clamped."""
        given = self.options.clip
        wanted = not self.block.rounding(site).needs if given is None else given
        return wanted and not any(fnmatchcase(site, pattern) for pattern in self.options.clip_skip)

    def clip(self, wanted: set[str]) -> None:
        """Step 4, for some sites."""
        for sites, stats in self.block.observe_in_turn((Hessian,)):
            if wanted.isdisjoint(sites):
                continue
            hessian = statistic(stats, Hessian).matrix()
            for site in wanted.intersection(sites):
                spread = self.moved.columns.get(site)
                scaled = hessian if spread is None else hessian / spread / spread.unsqueeze(1)
                before = self.moved.weight(site)
                after = clip(before, scaled, self.grids[site], self.options.clip_points)
                self.moved.weights[site] = after
                self.notes[site]["clipped"] = round(float((after != before).float().mean()), 5)


METHOD = AWQ
