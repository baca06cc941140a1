"""AST: weights learn which of them to lose (Adaptive Sparse Trainer, Huang et al., arXiv 2407.20584).

Problem   minimise the loss over weights W (out, in) and masks M of a given kind and size.
Forward   M W, with M the highest scores of every group of the given mask: N of M, or as many as it keeps per row or in the
          matrix. The score is |W|, or with `score: activations` |W| times the root mean square of the input's channel. M is
          recomputed every `interval` steps.
Backward  straight through: the gradient g with respect to M W goes to all of W, so that pruned weights can come back.
Decay     annealed SR-STE: g + l min(1, t / T) u (1 - M) W, t the share of the training that is done, T = `anneal`. Pruned weights
          shrink more and more, so masks first explore and then settle. u is the root mean square of g over that of W, so that l
          has no unit and is the same for losses of every size; the paper's is absolute. 1 - M is of booleans: the published code
          negates integers there, and decays what is kept.
SLoRB     with `group` > 0, P sums every `group` neighbouring inputs and S (out, in / group) maps the sums. Both are factors of a
          low-rank part, and both are trained. S starts as the best for a fixed P, least squares of what the mask removes:
          S = D H P^T (P H P^T)^-1, D = W - M W, H diagonal: the mean squares of the input's channels.
Start     the given weight's values where they are kept, and the original's elsewhere.
Defaults  interval 10 (paper). Decay, anneal and settle are ours and have been tried on small blocks only.
Failures  every weight is trained, which needs far more text than `retrain/perp`. Needs dense bases and masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import MeanSquare, Statistics
from compress.methods.retrain._options import Retraining
from compress.methods.solvers.mask_selection import highest
from compress.methods.solvers.trainable_weight import Trainable, leaf, rest_of, size_of, trainable
from compress.weights.dense import Dense
from compress.weights.kept_values import same_in_rows
from compress.weights.low_rank import LowRank, low_rank_bits
from compress.weights.mask import Bitmask, Pattern
from compress.weights.weight import CompressedWeight, Keep


def reselected(score: Tensor, like: Keep) -> Keep:
    """Return the mask of the highest scores (out, in), with the kind and counts of `like`."""
    rows, columns = score.shape
    if isinstance(like, Pattern):
        return Pattern.from_mask(highest(score.reshape(-1, like.of), like.kept).view(rows, columns), like.kept, like.of)
    assert isinstance(like, Bitmask)
    runs = score.unflatten(1, (-1, like.size)).square().sum(2) if like.size > 1 else score
    count = same_in_rows(like.kept)
    if count is not None:
        return replace(like, kept=highest(runs, count))
    return replace(like, kept=highest(runs.reshape(1, -1), int(like.kept.sum())).view_as(like.kept))


def group_sums(columns: int, group: int) -> Tensor:
    """Return P (in / group, in), whose row g sums the inputs of group g."""
    return torch.eye(columns // group).repeat_interleave(group, 1)


def best_left(removed: Tensor, square: Tensor, group: int) -> Tensor:
    """Return the S (out, in / group) of least |removed - S P|^2, weighted by the mean squares of the inputs' channels (in,)."""
    weight = square.clamp_min(float(square.mean()) * 1e-6 + torch.finfo(square.dtype).tiny)
    above: Tensor = (removed * weight).unflatten(1, (-1, group)).sum(2)
    below: Tensor = weight.unflatten(0, (-1, group)).sum(1)
    return above / below


class Adapting:
    """A weight whose values are all trained, and its mask with them."""

    relative = True

    def __init__(self, weight: CompressedWeight, dense: Tensor, square: Tensor | None, options: Ast) -> None:
        assert isinstance(weight.base, Dense)
        assert weight.keep is not None
        self.weight, self.options = weight, options
        self.keep: Keep = weight.keep
        self.mask = weight.keep.mask()
        self.start = torch.where(self.mask, weight.base.dequantize(), dense)
        self.unit = size_of(self.start)
        self.loudness = None if square is None or options.score == "magnitude" else square.float().clamp_min(0).sqrt()
        self.leaves = {"p": leaf(torch.zeros_like(self.start))}
        self.rest = rest_of(weight)
        self.factors: dict[str, Tensor] = {}
        if options.group:
            even = torch.ones(dense.shape[1], device=dense.device) if square is None else square.float()
            left = best_left(self.start.masked_fill(self.mask, 0.0), even, options.group)
            self.factors = {"left": left, "right": group_sums(dense.shape[1], options.group).to(dense.device)}
            self.leaves |= {name: leaf(torch.zeros_like(value)) for name, value in self.factors.items()}
        self.steps = 0
        self.flipped = 0.0  # share of the mask that the last search changed

    def all_values(self) -> Tensor:
        """Return W (out, in), including pruned weights."""
        return self.start + self.unit * self.leaves["p"]

    def _factor(self, name: str) -> Tensor:
        return self.factors[name] + size_of(self.factors[name]) * self.leaves[name]

    def values(self) -> Tensor:
        """Return M W plus the weight's other parts (out, in); gradients pass to all of W."""
        whole = self.all_values()
        sparse = whole - whole.detach().masked_fill(self.mask, 0.0)
        if self.rest is not None:
            sparse = sparse + self.rest
        return sparse + self._factor("left") @ self._factor("right") if self.factors else sparse

    def before_step(self, share: float) -> None:
        """Add the decay of pruned weights to the gradient, and recompute the mask when it is due."""
        gradient = self.leaves["p"].grad
        with torch.no_grad():
            whole = self.all_values()
            if gradient is not None:
                rate = self.options.decay * min(1.0, share / self.options.anneal)
                size = gradient.square().mean().sqrt() / size_of(whole)
                gradient.add_(whole.masked_fill(self.mask, 0.0) * (rate * size))
            if self.steps % self.options.interval == 0 and share < self.options.settle:
                score = whole.abs() if self.loudness is None else whole.abs() * self.loudness
                before, self.keep = self.mask, reselected(score, self.keep)
                self.mask = self.keep.mask()
                self.flipped = float((before != self.mask).double().mean())
            self.steps += 1

    def stored(self) -> CompressedWeight:
        """Return the kept values in the base's own type, under the current mask."""
        with torch.no_grad():
            base = Dense(self.all_values().to(self.weight.base.values.dtype))  # type: ignore[attr-defined]
            pruned = CompressedWeight.pruned(base, self.keep)
            part = self.weight.low_rank
            if self.factors:
                part = LowRank(self._factor("left").bfloat16(), self._factor("right").bfloat16())
        return replace(pruned, outliers=self.weight.outliers, low_rank=part, input=self.weight.input)

    def state(self) -> dict[str, Tensor]:
        """Return the leaves, the mask and the number of steps."""
        leaves = {name: value.detach().clone() for name, value in self.leaves.items()}
        return leaves | {"mask": self.mask.clone(), "steps": torch.tensor(self.steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        with torch.no_grad():
            for name, value in self.leaves.items():
                value.copy_(state[name])
        self.mask, self.steps = state["mask"].clone(), int(state["steps"])
        self.keep = reselected(self.mask.float(), self.keep)


class Ast(Retraining):
    """Options of the adaptive sparse trainer."""

    decay: Annotated[float, Field(ge=0, description="of what is pruned, relative to the gradient")] = 0.3
    anneal: Annotated[float, Field(gt=0, le=1, description="share of the training in which the decay rises")] = 0.25
    interval: Annotated[int, Field(ge=1, description="steps between searches of the mask")] = 10
    settle: Annotated[float, Field(ge=0, le=1, description="share of the training after which masks stay")] = 0.75
    score: Annotated[Literal["magnitude", "activations"], Field(description="what masks go by")] = "activations"
    group: Annotated[int, Field(ge=0, description="inputs that are summed for the factors beside the weight; 0: none")] = 0

    def statistics(self) -> tuple[type[Statistics], ...]:
        """The mean squares of inputs, for scores and the start of the factors."""
        return (MeanSquare,) if self.score == "activations" or self.group else ()

    def check(self, shape: tuple[int, int]) -> str | None:
        """Say whether `group` does not divide the columns of a weight (out, in)."""
        if self.group and shape[1] % self.group:
            return f"in={shape[1]} is not a multiple of group={self.group}; use one that divides it, or 0"
        return None

    def added_bits(self, shape: tuple[int, int]) -> int:
        """Bits that are added to a weight of this shape (out, in)."""
        return low_rank_bits(shape, shape[1] // self.group) if self.group else 0

    def trainable(
        self, weight: CompressedWeight, dense: Tensor, square: Tensor | None, generator: torch.Generator
    ) -> Trainable | None:
        """Return the trainable part of a weight: all of it under a mask, else scales and offsets."""
        # An existing low-rank part stays as it is; there is no place for a second one.
        if isinstance(weight.base, Dense) and weight.keep is not None and not (self.group and weight.low_rank is not None):
            return Adapting(weight, dense, square, self)
        return trainable(weight, "none", 1, 1.0, True, generator)


METHOD = Ast
