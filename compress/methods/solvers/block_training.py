"""Block-wise reconstruction: a block's weights, norms and biases are trained on its outputs.

Loss      the mean of |block(x) - t|^2 over outputs, x taken after the compressed blocks, t = (1 - b) f(x) + b f(y): f is the
          original block, y its input in the original model, b = `original`. With b = 1, earlier blocks' errors are corrected too.
Step      AdamW, weight decay 0; the rate rises over the first tenth of the steps and then falls linearly to 0. Gradients are
          summed over ranks, so all ranks take the same step.
Best      the loss over all batches, with everything as stored, is measured before the first round and after each; the least is
          kept, so the result is never worse than the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.calibration.statistics import MeanSquare, Statistics, statistic
from compress.methods.block import Block, TuningResult
from compress.methods.solvers.block_loss import drawn, gradients, loss
from compress.methods.solvers.trainable_weight import Trainable, Vector
from compress.weights.weight import CompressedWeight

WARM_UP = 0.1  # share of all steps
BETAS = (0.9, 0.95)
Make = Callable[[CompressedWeight, Tensor, Tensor | None, torch.Generator], Trainable | None]


@dataclass(frozen=True)
class Settings:
    """How a block is trained; see `retrain._options.Retraining`."""

    epochs: int
    batches: int
    rate: float
    relative_rate: float
    norms: bool
    biases: bool
    original: float
    statistics: tuple[type[Statistics], ...] = ()


def optimizer(moving: Sequence[Trainable | Vector], rate: float, relative_rate: float) -> torch.optim.AdamW:
    """Return AdamW over all leaves, with one rate for those that are relative and one for the others."""
    groups: list[dict[str, Any]] = []
    for relative, first in ((False, rate), (True, relative_rate)):
        leaves = [value for m in moving if m.relative == relative for value in m.leaves.values()]
        if leaves:
            groups.append({"params": leaves, "lr": first, "largest": first})
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, foreach=False)


def pace(step: int, steps: int) -> float:
    """Return the share of the largest rate that a step takes: linear warm-up, then linear decay."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def advance(adam: torch.optim.AdamW, moving: Sequence[Trainable | Vector], step: int, steps: int) -> None:
    """Take one step with the gradients of the leaves."""
    for m in moving:
        m.before_step(step / steps)
    for group in adam.param_groups:
        group["lr"] = group["largest"] * pace(step, steps)
    adam.step()
    adam.zero_grad(set_to_none=True)


def vectors_of(others: Mapping[str, Tensor], norms: bool, biases: bool) -> dict[str, Vector]:
    """Return the norms and biases among the other tensors of a block, by disk name, as trainable vectors."""
    return {n: Vector(v) for n, v in others.items() if v.ndim == 1 and (biases if n.endswith("bias") else norms)}


def reconstruct(block: Block, weights: Mapping[str, CompressedWeight], make: Make, settings: Settings) -> TuningResult:
    """Train a block's compressed weights, norms and biases; weights with transformed inputs stay, noted as fixed."""
    seen = block.observe(settings.statistics) if settings.statistics else {}
    generator = block.generator()
    moving: dict[str, Trainable] = {}
    for site, weight in weights.items():
        mean = statistic(seen[site], MeanSquare).mean() if MeanSquare in settings.statistics else None
        if not weight.transformed and (mover := make(weight, block.weight(site), mean, generator)) is not None:
            moving[site] = mover
    fixed = {site: weight.dequantize() for site, weight in weights.items() if site not in moving}
    vectors = vectors_of(block.others(), settings.norms, settings.biases)
    notes: dict[str, Any] = {"fixed": sorted(fixed)} if fixed else {}
    if not (moving or vectors) or not block.total_batches:
        return TuningResult(notes=notes)
    target = _target(block, settings.original)

    def now() -> tuple[dict[str, CompressedWeight], dict[str, Tensor], float]:
        with torch.no_grad():
            kept = {site: m.stored() for site, m in moving.items()}
            others = {name: block.stored(name, m.values()) for name, m in vectors.items()}
            return kept, others, loss(block, fixed | {s: w.dequantize() for s, w in kept.items()}, others, target)

    best = (*now()[:2], loss(block, {site: weight.dequantize() for site, weight in weights.items()}, None, target))
    notes |= {"loss_before": best[2], "loss": best[2], "best_epoch": 0}
    everything: list[Trainable | Vector] = [*moving.values(), *vectors.values()]
    adam = optimizer(everything, settings.rate, settings.relative_rate)
    source, per_epoch = drawn(block, settings.batches), -(-block.total_batches // settings.batches)
    steps = settings.epochs * per_epoch
    for step in range(steps):
        values = {site: m.values() for site, m in moving.items()}
        others = {name: m.values() for name, m in vectors.items()}
        given = {site: value.detach() for site, value in values.items()}
        _, by_weight, by_other = gradients(block, next(source), fixed | given, {n: v.detach() for n, v in others.items()}, target)
        torch.autograd.backward(
            [*values.values(), *others.values()], [*(by_weight[s] for s in values), *(by_other[n] for n in others)]
        )
        advance(adam, everything, step, steps)
        epoch, rest = divmod(step + 1, per_epoch)
        if rest == 0 and (found := now())[2] < best[2]:
            best = found
            notes |= {"loss": best[2], "best_epoch": epoch}
        block.say((step + 1) / steps)
    return TuningResult(best[0], best[1], notes) if notes["best_epoch"] else TuningResult(notes=notes)


def _target(block: Block, original: float) -> Callable[[int], Tensor] | None:
    """Return the function that gives the target of a batch; None where that is the original's output alone."""
    if original == 1:
        return None
    dense = {site: block.weight(site) for site in block.sites}
    others = block.others()

    def target(batch: int) -> Tensor:
        with torch.no_grad():
            own = block.run(block.inputs(batch), dense, others).float()
            return own if original == 0 else torch.lerp(own, block.targets(batch).float(), original)

    return target
