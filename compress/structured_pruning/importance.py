"""Which heads, channels and blocks a model needs least, and how to compensate for their removal.

Gates     every channel c that a head or an MLP outputs gets a factor of 1. With L the cross-entropy summed over a window's
          tokens, dL/d gate_c = sum_i w_ic dL/dw_ic for the linear that reads it: the first-order effect of setting the channel
          to 0, without a gradient of any weight. A group of channels (a head, or all heads of a KV group) has the sum of theirs.
Scores    taylor     mean over windows of |sum|                      first order
          fisher     mean over windows of (sum)^2                    second order, by the Fisher information
          lora       |sum| of the mean over windows                  what LoRAPrune (arXiv 2305.18403) estimates from factors
          mixed      sum |w g - w^2 f / 2|                           both orders, weight by weight (LLM-Pruner, arXiv 2305.11627)
          wanda      sum_c |w_:c|^2 H_cc                             what the group adds to the output, no gradient
          magnitude  sum_c |w_:c|^2                                  no data
Rounds    groups are removed in N rounds: after round k, 1 - (1 - k / N)^3 of those to remove are gone (LoRAPrune's schedule),
          their gates are 0, and the others are scored again. Removed groups do not come back.
Experts   the mean of g |y| over the tokens routed to an expert, its router weight times the norm of its output (REAP,
          arXiv 2510.13999); 0 for an expert that no token reached.
Blocks    influence 1 - cos(h_in, h_out), mean over tokens (ShortGPT, arXiv 2403.03853).
Repair    with channels K kept, V = W H_:K (H_KK + damping)^-1: least squares on the kept channels, for all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Score = Literal["fisher", "taylor", "lora", "mixed", "wanda", "magnitude"]
GATED = ("fisher", "taylor", "lora")
GRADIENTS = (*GATED, "mixed")
DAMP = 0.01
Names = tuple[int, str]  # block, and the linear that reads the channels


def gate_gradients(
    linears: Mapping[Names, nn.Module],
    gates: Mapping[Names, Tensor],
    windows: Iterable[Tensor],
    logits: Callable[[Tensor], Tensor],
) -> Iterator[dict[Names, Tensor]]:
    """Yield for each window of ids (1, length) the gradients (in,) of its summed loss with respect to gates before linears."""
    gates = {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}

    def gated(name: Names) -> Callable[..., tuple[Tensor, ...]]:
        return lambda _, given: (given[0] * gates[name].to(given[0]), *given[1:])

    handles = [linears[name].register_forward_pre_hook(gated(name)) for name in gates]
    try:
        for ids in windows:
            with torch.enable_grad():
                lost = _summed_loss(logits, ids)
            # An expert that no token of a window reached is not part of its loss.
            found = torch.autograd.grad(lost, list(gates.values()), allow_unused=True, materialize_grads=True)
            yield dict(zip(gates, found, strict=True))
    finally:
        for handle in handles:
            handle.remove()


def weight_moments(
    weights: Sequence[Tensor], windows: Iterable[Tensor], logits: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return means over windows of ids (1, length) of the mean loss's gradients with respect to weights, and of their squares."""
    sums = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    count = 0
    for ids in windows:
        count += 1
        with torch.enable_grad():
            lost = _summed_loss(logits, ids) / (ids.shape[1] - 1)
        found = torch.autograd.grad(lost, list(weights), allow_unused=True, materialize_grads=True)
        for (first, second), gradient in zip(sums, found, strict=True):
            first += gradient
            second += gradient.square()
    return [(first / max(count, 1), second / max(count, 1)) for first, second in sums]


def mixed(weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Return |w g - w^2 f / 2| of weight (out, in), given the mean g of its gradients and f of their squares, in float64."""
    weight = weight.double()
    return (weight * mean.double() - weight.square() * square.double() / 2).abs()


def _summed_loss(logits: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    rows = logits(ids).float()[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(rows, ids[:, 1:].flatten().to(rows.device), reduction="sum")


def group_scores(gradients: Iterable[dict[Names, Tensor]], sizes: Mapping[Names, int], score: Score) -> dict[Names, Tensor]:
    """Return the scores (groups,) of groups of `sizes` neighbouring channels, given their gradients (in,) window by window.

    `score` is one of `GATED`.
    """
    total: dict[Names, Tensor] = {}
    count = 0
    for found in gradients:
        count += 1
        for name, gradient in found.items():
            summed = gradient.double().unflatten(0, (-1, sizes[name])).sum(1)
            term = {"fisher": summed.square(), "taylor": summed.abs(), "lora": summed}[score]
            total[name] = total[name] + term if name in total else term
    return {name: value.abs() / max(count, 1) for name, value in total.items()}


def gone_by(groups: int, left: int, sets: int, share: float) -> int:
    """Return how many of the groups, of which `left` are to stay, are gone after this share of the rounds."""
    gone = round((groups - left) * (1 - (1 - share) ** 3))
    return -(-gone // sets) * sets


def weight_scores(weight: Tensor, hessian: Tensor | None, size: int) -> Tensor:
    """Return the scores (groups,) of groups of `size` columns of weight (out, in), with the inputs' hessian (in, in) if given."""
    squares = weight.double().square().sum(0)
    if hessian is not None:
        squares = squares * hessian.diagonal().double()
    summed: Tensor = squares.unflatten(0, (-1, size)).sum(1)
    return summed


def kept_of(scores: Tensor, count: int, sets: int = 1) -> Tensor:
    """Return the `count` groups with the highest scores (groups,), in order, the first of equals; as many of each of `sets`."""
    rows = scores.view(sets, -1)
    order = torch.argsort(rows, dim=1, descending=True, stable=True)[:, : count // sets]
    first = torch.arange(sets, device=scores.device).unsqueeze(1) * rows.shape[1]
    return (order.sort(1).values + first).flatten()


def spread(groups: Tensor, size: int) -> Tensor:
    """Return the channels of groups of `size` neighbours."""
    return (groups.unsqueeze(1) * size + torch.arange(size, device=groups.device)).flatten()


def repaired(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """Return the columns (out, kept) that best reproduce the outputs of weight (out, in) from its kept inputs."""
    full = hessian.double()
    full = full + DAMP * full.diagonal().mean().clamp_min(1e-30) * torch.eye(len(full), dtype=full.dtype, device=full.device)
    right = (weight.double() @ full)[:, kept]
    factor = torch.linalg.cholesky(full[kept][:, kept])
    return torch.cholesky_solve(right.T, factor).T.float()


def influence(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos of hidden states (samples, length, width) before and after a block, summed over tokens in float64."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return (1 - cosine).sum()


class ExpertScore:
    """Sums for the scores of a block's experts; `add` takes each expert's outputs, weighted by the router."""

    def __init__(self, experts: int) -> None:
        self.total = torch.zeros(experts, dtype=torch.float64)
        self.tokens = torch.zeros(experts, dtype=torch.float64)

    def add(self, expert: int, outputs: Tensor) -> None:
        """Add outputs (tokens, width) of one expert, each weighted by the router."""
        self.total[expert] += outputs.float().norm(dim=1).double().sum().cpu()
        self.tokens[expert] += outputs.shape[0]

    def scores(self) -> Tensor:
        """Return the scores (experts,)."""
        return self.total / self.tokens.clamp_min(1)


def units_of(scores: Mapping[int, Tensor], keep: int, step: int) -> dict[int, int]:
    """Return how many groups of each block stay if `keep` of all blocks' groups do, those with the highest scores (groups,).

    They are taken `step` at a time, the best of each block first, and at least `step` of each block.
    """
    found = dict.fromkeys(scores, step)
    pieces = []
    for block, score in scores.items():
        best = score.sort(descending=True, stable=True).values
        sums = best[: len(best) // step * step].view(-1, step).sum(1).tolist()
        pieces += [(-value, block) for value in sums[1:]]
    for _, block in sorted(pieces)[: keep // step - len(found)]:
        found[block] += step
    return found
