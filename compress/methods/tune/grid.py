"""Grid: scales and offsets of compressed weights, and norms, trained so that the block gives what the original gave.

Problem   minimise the mean squared error of a block's outputs, with inputs taken after the compressed blocks and the original's
          outputs as targets, over the scales s and offsets o (out, groups) of all its compressed weights, codes fixed, and over
          its norms and biases. A weight is linear in them, Q = (code - zero) s + o, so only their storage needs rounding.
Step      Adam on p, with s = s0 + |s0| p, o = o0 + |s0| p and n = n0 + rms(n0) p for other vectors: one rate suits all, as it is
          relative to the initial values. Master copies are float32; the rate falls linearly to 0.
Best      the loss over all batches, with everything rounded as stored, is measured before the first round and after each; the
          least is kept, so the result is never worse than the start.
Parts     every floating-point field `scale` and `offset` of a weight's base in which its values are differentiable. Other
          parts stay as they are, and the notes name their sites.
Source    the block-wise step of decoupleQ (arXiv 2404.12759), which takes absolute steps of 1e-5.
Failures  overfits few calibration tokens; needs gradients through the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.methods.block import Block, TuningResult
from compress.methods.method import Method, StepBatches
from compress.methods.solvers.block_loss import Adam, drawn, gradients, loss
from compress.methods.solvers.trainable_fields import trainable_fields, unit_of, with_fields
from compress.weights.weight import CompressedWeight

_LEAST = 1e-3  # least unit of a vector's steps, which is its root mean square: gains of norms may start at zero


class Master:
    """The float32 master copy of a stored tensor: start + unit * p."""

    def __init__(self, start: Tensor, unit: Tensor) -> None:
        self.start, self.unit = start.float(), unit.float()
        self.p = torch.zeros_like(self.start)
        self._adam = Adam(self.p)

    def value(self) -> Tensor:
        """Return the values at the current p."""
        return self.start + self.unit * self.p

    def step(self, gradient: Tensor, rate: float) -> None:
        """Take one step of Adam, given the gradient for the values."""
        # The gradient for p has the unit as a factor, on which directions do not depend.
        self.p.sub_(self._adam.direction(gradient), alpha=rate)


class Weight:
    """A compressed weight whose scales and offsets are trained."""

    def __init__(self, weight: CompressedWeight) -> None:
        self.weight = weight
        floats = trainable_fields(weight)
        self.masters = {name: Master(value, unit_of(floats, name)) for name, value in floats.items()}

    def values(self) -> Tensor:
        """Return the weight (out, in) at the masters."""
        return with_fields(self.weight, {name: master.value() for name, master in self.masters.items()}).dequantize()

    def stored(self) -> CompressedWeight:
        """Return the weight with its fields rounded to their stored types."""
        base: Any = self.weight.base
        rounded = {name: master.value().to(getattr(base, name).dtype) for name, master in self.masters.items()}
        return with_fields(self.weight, rounded)

    def step(self, by_value: Tensor, rate: float) -> None:
        """Move the masters, given the gradient for the weight (out, in)."""
        leaves = {name: master.value().requires_grad_() for name, master in self.masters.items()}
        with torch.enable_grad():
            found = torch.autograd.grad(with_fields(self.weight, leaves).dequantize(), list(leaves.values()), by_value)
        for master, gradient in zip(self.masters.values(), found, strict=True):
            master.step(gradient, rate)


def grid(
    block: Block,
    weights: Mapping[str, CompressedWeight],
    *,
    epochs: int,
    batches: int,
    rate: float,
    norms: bool,
    biases: bool,
) -> TuningResult:
    """Train the scales and offsets of a block's weights, and its norms and biases; codes stay."""
    moving = {site: tuned for site, weight in weights.items() if (tuned := Weight(weight)).masters}
    fixed = {site: weight.dequantize() for site, weight in weights.items() if site not in moving}
    vectors = {
        name: Master(value, value.square().mean().sqrt().clamp_min(_LEAST).expand_as(value))
        for name, value in block.others().items()
        if value.ndim == 1 and (biases if name.endswith("bias") else norms)
    }

    def now() -> tuple[dict[str, CompressedWeight], dict[str, Tensor], float]:
        kept = {site: tuned.stored() for site, tuned in moving.items()}
        others = {name: block.stored(name, master.value()) for name, master in vectors.items()}
        return kept, others, loss(block, fixed | {site: weight.dequantize() for site, weight in kept.items()}, others)

    notes: dict[str, Any] = {"fixed": sorted(fixed)} if fixed else {}
    if not (moving or vectors) or not block.total_batches:
        return TuningResult(notes=notes)
    best = now()
    notes |= {"loss_before": best[2], "loss": best[2], "best_epoch": 0}
    source, per_epoch = drawn(block, batches), -(-block.total_batches // batches)
    for step in range(epochs * per_epoch):
        others = {name: master.value() for name, master in vectors.items()}
        values = {site: tuned.values() for site, tuned in moving.items()}
        _, by_weight, by_other = gradients(block, next(source), fixed | values, others)
        left = rate * (1 - step / (epochs * per_epoch))
        for site, tuned in moving.items():
            tuned.step(by_weight[site], left)
        for name, master in vectors.items():
            master.step(by_other[name], left)
        epoch, rest = divmod(step + 1, per_epoch)
        if rest == 0 and (found := now())[2] < best[2]:
            best = found
            notes |= {"loss": best[2], "best_epoch": epoch}
        block.say((step + 1) / (epochs * per_epoch))
    return TuningResult(best[0], best[1], notes) if notes["best_epoch"] else TuningResult(notes=notes)


class GridTuning(Method):
    """Options of the training of scales, offsets and norms."""

    scope: ClassVar[Literal["site", "block"]] = "block"
    compares: ClassVar[bool] = True

    epochs: Annotated[int, Field(ge=1, le=1000, description="rounds over the calibration, per block")] = 4
    batches: StepBatches = 1
    rate: Annotated[float, Field(gt=0, le=1, description="first step of Adam, relative to each scale")] = 1e-2
    norms: Annotated[bool, Field(description="train the block's norms too")] = True
    biases: Annotated[bool, Field(description="train the block's biases too")] = True

    def __call__(self, block: Block, weights: Mapping[str, CompressedWeight]) -> TuningResult:
        """Train a block's scales, offsets, norms and biases."""
        return grid(block, weights, **self.model_dump())


METHOD = GridTuning
