"""Compressed weights whose values are trained: what moves, the weight that it makes, and how that is stored.

With W the values as they came, M the mask, c = alpha / rank, a pair of factors B (out, rank) and A (rank, in), and leaves p:

    mask_lora   W + c M (BA)         dense base; merged exactly
    scale_lora  W (1 + c BA)         dense base; merged exactly, zeros stay zeros
    lora_prune  W + c BA             dense base, no mask while it is trained; merged as c M (BA), which is another weight
    full        W + unit p M         dense base; every kept weight moves
    lora        W + c BA             any base; not merged, the factors are stored as the low-rank part
    factors     L + unit p, R + ...  a low-rank part that was there already
    fields      scale + |scale| p    scales and offsets of a base with codes, which stay

A starts uniform in +-1/sqrt(in) and B at 0 (LoRA, arXiv 2106.09685), so that the first weight is the one that came. Leaves
called p are relative to what they move, so that one rate suits all of them.

The last two kinds of factors can be bounded: with W' the original and V(t) the weight at t times the leaves (of `lora` at t B),
training sees and stores V(t) of the largest t up to 1 that bisection finds with |V(t) - W'| <= max(p |W'|, |V(0) - W'|), and
before every step the leaves are brought back to t times themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from compress.methods.solvers.trainable_fields import trainable_fields, unit_of, with_fields
from compress.weights.dense import Dense
from compress.weights.low_rank import LowRank
from compress.weights.weight import SUMMANDS, CompressedWeight

Variant = Literal["mask_lora", "scale_lora", "lora_prune", "full", "lora", "none"]
HALVINGS = 20  # of what of a step is within a bound
LEAST = 1e-3  # of the root mean square of a tensor, as the unit of its steps: gains of norms may begin at zero


def leaf(values: Tensor) -> Tensor:
    """Return what an optimizer moves, in float32."""
    return values.detach().float().clone().requires_grad_()


def size_of(values: Tensor) -> Tensor:
    """Return the root mean square of values, as what relative steps are relative to."""
    return values.float().square().mean().sqrt().clamp_min(LEAST)


class Trainable(Protocol):
    """A compressed weight with leaves that an optimizer moves."""

    leaves: dict[str, Tensor]  # float32
    relative: bool  # leaves are relative to what they move

    def values(self) -> Tensor:
        """Return the weight (out, in) at the leaves in float32, as training sees it; gradients pass to the leaves."""
        ...

    def stored(self) -> CompressedWeight:
        """Return the weight as it is stored."""
        ...

    def before_step(self, share: float) -> None:
        """Called between a gradient and the step that takes it, with the share of the training that is done."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all that moves, leaves too."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        ...


class StateOfLeaves:
    """What all moving weights have in common."""

    leaves: dict[str, Tensor]
    relative = True

    def before_step(self, share: float) -> None:
        """Nothing changes but the leaves."""

    def state(self) -> dict[str, Tensor]:
        """Return the leaves."""
        return {name: value.detach().clone() for name, value in self.leaves.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        with torch.no_grad():
            for name, value in self.leaves.items():
                value.copy_(state[name])


class Vector(StateOfLeaves):
    """A norm or bias."""

    def __init__(self, start: Tensor) -> None:
        self.start, self.unit = start.float(), size_of(start)
        self.leaves = {"p": leaf(torch.zeros_like(self.start))}

    def values(self) -> Tensor:
        """Return the values at the leaf."""
        return self.start + self.unit * self.leaves["p"]


def rest_of(weight: CompressedWeight) -> Tensor | None:
    """The sum of what is not the base (out, in)."""
    others = [part.dequantize() for role, part in weight.parts.items() if role in SUMMANDS and role != "base"]
    return sum(others[1:], others[0]) if others else None


class DenseBase(StateOfLeaves):
    """A weight with a dense base whose kept values move; what the mask removes stays exactly 0 through merging and storing."""

    def __init__(self, weight: CompressedWeight, variant: Variant, rank: int, alpha: float, generator: torch.Generator) -> None:
        assert isinstance(weight.base, Dense)
        self.weight, self.variant = weight, variant
        self.start = replace(weight, outliers=None, low_rank=None).dequantize()
        self.rest = rest_of(weight)
        self.keep = torch.ones_like(self.start, dtype=torch.bool) if weight.keep is None else weight.keep.mask()
        self.relative = variant == "full"
        if variant == "full":
            self.unit = size_of(self.start[self.keep]) if bool(self.keep.any()) else size_of(self.start)
            self.leaves = {"p": leaf(torch.zeros_like(self.start))}
        else:
            self.factor = alpha / rank
            self.leaves = factors(self.start, rank, generator)

    def merged(self, masked: bool = True) -> Tensor:
        """Return keep * base (out, in) at the leaves."""
        if self.variant == "full":
            moved = self.start + self.unit * self.leaves["p"]
            return torch.where(self.keep, moved, 0.0)
        product = self.factor * (self.leaves["up"] @ self.leaves["down"])
        if self.variant == "scale_lora":
            return self.start * (1 + product)
        return self.start + (torch.where(self.keep, product, 0.0) if masked else product)

    def values(self) -> Tensor:
        """Return the weight (out, in) at the leaves, as training sees it."""
        values = self.merged(masked=self.variant != "lora_prune")
        return values if self.rest is None else values + self.rest

    def stored(self) -> CompressedWeight:
        """Return the weight with the leaves merged into the base, in the base's own type."""
        with torch.no_grad():
            values = self.merged().to(self.weight.base.values.dtype)  # type: ignore[attr-defined]
        base = Dense(values)
        return replace(self.weight, base=base if self.weight.keep is None else base.under(self.keep))


def factors(like: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the leaves of a pair of factors for a weight (out, in), whose product is 0."""
    down = torch.rand(rank, like.shape[1], generator=generator).to(like.device)
    bound = like.shape[1] ** -0.5
    return {"up": leaf(like.new_zeros(like.shape[0], rank)), "down": leaf((2 * down - 1) * bound)}


@dataclass(frozen=True)
class Bound:
    """How far a weight may go from the original (out, in) while it is trained, in the Frobenius norm and over the original's."""

    dense: Tensor
    most: float

    def share(self, start: Tensor, step: Tensor, curve: Tensor | None = None) -> float:
        """Return a t with start + t step + t^2 curve within the bound, 1 if it is there; at 0, where it starts, it always is."""
        away = start - self.dense
        terms = [away, step] if curve is None else [away, step, curve]
        products = [[float((a * b).sum(dtype=torch.float64)) for b in terms] for a in terms]
        limit = max((self.most * float(self.dense.norm())) ** 2, products[0][0])

        def inside(t: float) -> bool:
            return sum(t ** (i + j) * value for i, row in enumerate(products) for j, value in enumerate(row)) <= limit

        low, high = 0.0, 1.0
        for _ in range(0 if inside(1.0) else HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if inside(middle) else (low, middle)
        return 1.0 if high == 1.0 and inside(1.0) else low


class LowRankAdapter(StateOfLeaves):
    """A weight to which a low-rank part is added, and which moves alone."""

    relative = False

    def __init__(
        self, weight: CompressedWeight, rank: int, alpha: float, generator: torch.Generator, bound: Bound | None = None
    ) -> None:
        self.weight, self.factor, self.start, self.bound = weight, alpha / rank, weight.dequantize(), bound
        self.leaves = factors(self.start, rank, generator)

    def _share(self) -> float:
        """How much of the added part is within the bound."""
        if self.bound is None:
            return 1.0
        with torch.no_grad():
            return self.bound.share(self.start, self.factor * (self.leaves["up"] @ self.leaves["down"]))

    def before_step(self, share: float) -> None:
        """Bring the leaves back within the bound."""
        with torch.no_grad():
            self.leaves["up"].mul_(self._share())

    def values(self) -> Tensor:
        """Return the weight (out, in) at the leaves."""
        return self.start + self._share() * self.factor * (self.leaves["up"] @ self.leaves["down"])

    def stored(self) -> CompressedWeight:
        """Return the weight with its factors in bfloat16."""
        left = (self._share() * self.factor * self.leaves["up"].detach()).bfloat16()
        return replace(self.weight, low_rank=LowRank(left, self.leaves["down"].detach().bfloat16()))


class Factors(StateOfLeaves):
    """A weight whose low-rank part moves."""

    def __init__(self, weight: CompressedWeight, bound: Bound | None) -> None:
        assert isinstance(weight.low_rank, LowRank)
        self.weight, self.part, self.bound = weight, weight.low_rank, bound
        self.rest = replace(weight, low_rank=None).dequantize()
        self.units = {name: size_of(getattr(self.part, name)) for name in ("left", "right")}
        self.leaves = {name: leaf(torch.zeros_like(getattr(self.part, name))) for name in self.units}

    def _share(self) -> float:
        """How much of the leaves is within the bound."""
        if self.bound is None:
            return 1.0
        with torch.no_grad():
            left, right = self.part.left.float(), self.part.right.float()
            more, other = (self.leaves[name] * self.units[name] for name in ("left", "right"))
            return self.bound.share(self.rest + left @ right, more @ right + left @ other, more @ other)

    def before_step(self, share: float) -> None:
        """Bring the leaves back within the bound."""
        t = self._share()
        with torch.no_grad():
            for value in self.leaves.values():
                value.mul_(t)

    def _factor(self, name: str, t: float) -> Tensor:
        return torch.addcmul(getattr(self.part, name).float(), self.leaves[name], self.units[name], value=t)

    def values(self) -> Tensor:
        """Return the weight (out, in) at the leaves."""
        t = self._share()
        return self.rest + self._factor("left", t) @ self._factor("right", t)

    def stored(self) -> CompressedWeight:
        """Return the weight with its factors in their own type."""
        t = self._share()
        moved: dict[str, Any] = {name: self._factor(name, t).detach().to(self.part.left.dtype) for name in self.units}
        return replace(self.weight, low_rank=replace(self.part, **moved))


class Fields(StateOfLeaves):
    """A weight whose scales and offsets move, while its codes stay."""

    def __init__(self, weight: CompressedWeight, floats: Mapping[str, Tensor]) -> None:
        self.weight = weight
        self.floats = {name: value.float() for name, value in floats.items()}
        self.units = {name: unit_of(floats, name) for name in floats}
        self.leaves = {name: leaf(torch.zeros_like(value)) for name, value in self.floats.items()}

    def _fields(self) -> dict[str, Tensor]:
        return {name: torch.addcmul(value, self.leaves[name], self.units[name]) for name, value in self.floats.items()}

    def values(self) -> Tensor:
        """Return the weight (out, in) at the leaves."""
        return with_fields(self.weight, self._fields()).dequantize()

    def stored(self) -> CompressedWeight:
        """Return the weight with its fields in their own types."""
        base: Any = self.weight.base
        return with_fields(self.weight, {n: v.detach().to(getattr(base, n).dtype) for n, v in self._fields().items()})


def trainable(
    weight: CompressedWeight,
    variant: Variant,
    rank: int,
    alpha: float,
    fields: bool,
    generator: torch.Generator,
    bound: Bound | None = None,
) -> Trainable | None:
    """Return what moves of a weight, None if nothing does: the variant's factors, or without them scales and offsets.

    The bound is for factors that are stored.
    """
    if variant == "lora":
        if isinstance(weight.low_rank, LowRank):
            return Factors(weight, bound)
        return None if weight.low_rank is not None else LowRankAdapter(weight, rank, alpha, generator, bound)
    if isinstance(weight.base, Dense):
        return None if variant == "none" else DenseBase(weight, variant, rank, alpha, generator)
    floats = trainable_fields(weight) if fields else {}
    return Fields(weight, floats) if floats else None
