"""How far a block's outputs are from what they should be, and gradients of that by its weights.

The loss is the mean over all outputs of |block(inputs) - targets|^2, with inputs behind compressed blocks and targets of the
original. What a step looks at is drawn from the batches of all ranks by one sequence of random numbers: every rank runs those
that it has, sums are formed over ranks, and so all ranks take the same step whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from compress.method import Block

Tensors = Mapping[str, Tensor]
_BETAS = (0.9, 0.99)


def drawn(block: Block, per_step: int) -> Iterator[list[int]]:
    """Yield without end this rank's batches of a step: each round goes through all batches of all ranks in a new order."""
    generator = block.generator()
    while True:
        order = torch.randperm(block.everyones, generator=generator).tolist()
        for start in range(0, len(order), per_step):
            step = order[start : start + per_step]
            yield [number - block.first for number in step if block.first <= number < block.first + block.batches]


def loss(block: Block, weights: Tensors, others: Tensors | None = None) -> float:
    """Return the loss over the batches of all ranks, with weights (out, in) by site and other tensors replaced."""
    total = _nothing(weights)
    with torch.no_grad():
        for batch in range(block.batches):
            lost, count = _error(block, batch, weights, others)
            total += torch.stack([lost.double(), total.new_tensor(count)])
    summed, count = block.total(total).tolist()
    return float(summed / max(count, 1))


def gradients(
    block: Block, batches: list[int], weights: Tensors, others: Tensors | None = None
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Return the loss of a step and its gradients by the weights (out, in) and other tensors, float32, of all ranks together.

    What an output does not depend on (an expert that no token was routed to) has a gradient of zeros.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    more = {name: value.detach().requires_grad_() for name, value in (others or {}).items()}
    both = [*leaves.values(), *more.values()]
    summed, total = [torch.zeros_like(leaf) for leaf in both], _nothing(weights)
    for batch in batches:
        lost, count = _error(block, batch, leaves, more)
        total += torch.stack([lost.detach().double(), total.new_tensor(count)])
        for sum_, gradient in zip(summed, torch.autograd.grad(lost, both, allow_unused=True), strict=True):
            if gradient is not None:
                sum_ += gradient
    lost_everywhere, everything = block.total(total).tolist()
    found = [block.total(sum_).div_(max(everything, 1)) for sum_ in summed]
    return (
        float(lost_everywhere / max(everything, 1)),
        dict(zip(leaves, found, strict=False)),
        dict(zip(more, found[len(leaves) :], strict=True)),
    )


def _error(block: Block, batch: int, weights: Tensors, others: Tensors | None) -> tuple[Tensor, int]:
    """Return the summed squared error of a batch in float32, and of how many outputs."""
    target = block.targets(batch)
    with torch.enable_grad() if any(w.requires_grad for w in weights.values()) else torch.no_grad():
        output = block.run(block.inputs(batch), weights, others)
        return (output.float() - target.float()).square().sum(), target.numel()


def _nothing(weights: Tensors) -> Tensor:
    """A sum of squares and a count, both 0, where the weights are."""
    return torch.zeros(2, dtype=torch.float64, device=next(iter(weights.values())).device)


class Adam:
    """Directions of Adam (arXiv 1412.6980): the mean of past gradients over the root of their mean square, about 1 in size."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._count = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Take in a gradient and return what to move against; 0 where there was never any."""
        first, second = _BETAS
        self._count += 1
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = (self._square / (1 - second**self._count)).sqrt_().clamp_min_(torch.finfo(self._square.dtype).tiny)
        return (self._mean / (1 - first**self._count)).div_(spread)
