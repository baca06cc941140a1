"""How far a block's outputs are from their targets, and the gradients of that for its weights.

The loss is the mean over all outputs of |block(inputs) - targets|^2, with inputs taken after the compressed blocks and targets of
the original. The batches of a step are drawn from those of all ranks by one sequence of random numbers: every rank runs those
that it has, sums are formed over ranks, and so all ranks take the same step whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from compress.methods.block import Block

Tensors = Mapping[str, Tensor]
Target = Callable[[int], Tensor]  # the wanted output of the block for a batch
_BETAS = (0.9, 0.99)


def drawn(block: Block, per_step: int) -> Iterator[list[int]]:
    """Yield this rank's batches of each step, endlessly: every round goes through all batches of all ranks in a new order."""
    generator = block.generator()
    while True:
        order = torch.randperm(block.total_batches, generator=generator).tolist()
        for start in range(0, len(order), per_step):
            step = order[start : start + per_step]
            yield [number - block.first for number in step if block.first <= number < block.first + block.batches]


def loss(block: Block, weights: Tensors, others: Tensors | None = None, target: Target | None = None) -> float:
    """Return the loss over the batches of all ranks, with weights (out, in) by site and other tensors replaced.

    `target` gives the target of a batch; None means the original's output.
    """
    total = _nothing(weights)
    with torch.no_grad():
        for batch in range(block.batches):
            lost, count = _error(block, batch, weights, others, target)
            total += torch.stack([lost.double(), total.new_tensor(count)])
    summed, count = block.total(total).tolist()
    return float(summed / max(count, 1))


def gradients(
    block: Block, batches: Iterable[int], weights: Tensors, others: Tensors | None = None, target: Target | None = None
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Return the loss of a step and its gradients for the weights (out, in) and other tensors, in float32, over all ranks.

    Tensors that no output depends on (an expert that no token was routed to) have a gradient of zeros.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    more = {name: value.detach().requires_grad_() for name, value in (others or {}).items()}
    both = [*leaves.values(), *more.values()]
    summed, total = [torch.zeros_like(leaf) for leaf in both], _nothing(weights)
    for batch in batches:
        lost, count = _error(block, batch, leaves, more, target)
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


def probe(block: Block, weights: Tensors) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of the sum of all outputs with random signs for the weights (out, in), and the number of outputs."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    summed = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    count = _nothing(weights)
    generator = block.generator()
    seed = generator.initial_seed()
    for batch in range(block.batches):
        generator.manual_seed(seed + block.first + batch)  # a batch's own signs, whichever rank has it
        with torch.enable_grad():
            output = block.run(block.inputs(batch), leaves)
        signs = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8).to(output).mul_(2).sub_(1)
        for name, gradient in zip(
            leaves, torch.autograd.grad(output, list(leaves.values()), signs, allow_unused=True), strict=True
        ):
            if gradient is not None:
                summed[name] += gradient
        count += output.numel()
    return {name: block.total(gradient) for name, gradient in summed.items()}, int(block.total(count)[0])


def moved(block: Block, weights: Tensors, changes: Tensors, batches: int) -> dict[str, float]:
    """Return by site the mean squared movement of outputs when its weight (out, in) changes, over the first `batches` batches."""
    total = {site: _nothing(weights) for site in changes}
    with torch.no_grad():
        for batch in range(max(0, min(block.batches, batches - block.first))):
            hidden = block.inputs(batch)
            output = block.run(hidden, weights).float()
            for site, change in changes.items():
                other = block.run(hidden, {**weights, site: weights[site] + change}).float()
                total[site] += torch.stack([(other - output).square().sum().double(), total[site].new_tensor(output.numel())])
    found = {site: block.total(values).tolist() for site, values in total.items()}
    return {site: float(summed / max(count, 1)) for site, (summed, count) in found.items()}


def _error(block: Block, batch: int, weights: Tensors, others: Tensors | None, target: Target | None) -> tuple[Tensor, int]:
    """Return the summed squared error of a batch in float32, and the number of its outputs."""
    wanted = block.targets(batch) if target is None else target(batch)
    with torch.enable_grad() if any(w.requires_grad for w in weights.values()) else torch.no_grad():
        output = block.run(block.inputs(batch), weights, others)
        return (output.float() - wanted.float()).square().sum(), wanted.numel()


def _nothing(weights: Tensors) -> Tensor:
    """A sum of squares and a count, both 0, on the device of the weights."""
    return torch.zeros(2, dtype=torch.float64, device=next(iter(weights.values())).device)


class Adam:
    """Directions of Adam (arXiv 1412.6980): the mean of past gradients over the root of their mean square, about 1 in size."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square, self._count = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Add a gradient and return the direction to move against; 0 where all gradients so far are 0."""
        first, second = _BETAS
        self._count += 1
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = (self._square / (1 - second**self._count)).sqrt_().clamp_min_(torch.finfo(self._square.dtype).tiny)
        return (self._mean / (1 - first**self._count)).div_(spread)
