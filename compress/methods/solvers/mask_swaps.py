"""Exchanging kept weights for removed ones while kept values stay as they are.

With q = (1 - M) w what is removed of a row w and c = H q, its error is q H q^T. Removing the kept weight u and taking back the
removed weight p changes it by

    2 c_u w_u + H_uu w_u^2 - 2 c_p w_p + H_pp w_p^2 - 2 w_u w_p H_up

Each round every row makes the exchange that lowers its error most, among the 16 cheapest to remove and the 16 that are best to
take back; of a pattern N:M, among all pairs within a group. No exchange raises the error. The derivation is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTLIST = 16
_LEAST = 1e-6  # of a row's error, that an exchange must gain: less is rounding
_CHUNK = 1 << 22  # pairs that are looked at together


def swapped(weight: Tensor, keep: Tensor, hessian: Tensor, rounds: int, of: int | None = None) -> Tensor:
    """Return the mask (out, in) after up to `rounds` exchanges per row; `of`: within groups of so many columns.

    weight (out, in), hessian (in, in) in the same type; as many weights of every row, or group, are kept as before.
    """
    parts = max(1, weight.numel() * (of or 1) // _CHUNK)
    pieces = zip(weight.tensor_split(parts), keep.tensor_split(parts), strict=True)
    return torch.cat([_swapped(some, kept.clone(), hessian, rounds, of) for some, kept in pieces])


def _swapped(weight: Tensor, keep: Tensor, hessian: Tensor, rounds: int, of: int | None) -> Tensor:
    diagonal, row = hessian.diagonal(), torch.arange(len(weight), device=weight.device)
    removed = weight.masked_fill(keep, 0.0)
    bent = removed @ hessian  # c
    error = (removed * bent).sum(1)
    for _ in range(rounds):
        linear, square = 2 * bent * weight, diagonal * weight.square()
        out = (square + linear).masked_fill(~keep, torch.inf)
        back = (square - linear).masked_fill(keep, torch.inf)
        gain, u, p = _best(weight, hessian, out, back) if of is None else _best_in_groups(weight, hessian, out, back, of)
        better = gain < -_LEAST * error
        if not bool(better.any()):
            break
        rows, u, p, gain = row[better], u[better], p[better], gain[better]
        keep[rows, u], keep[rows, p] = False, True
        bent[rows] += weight[rows, u].unsqueeze(1) * hessian[u] - weight[rows, p].unsqueeze(1) * hessian[p]
        error[rows] += gain
    return keep


def _best(weight: Tensor, hessian: Tensor, out: Tensor, back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The change, u and p of each row's best exchange (out,)."""
    count = min(_SHORTLIST, weight.shape[1])
    (cost_u, u), (cost_p, p) = out.topk(count, 1, largest=False), back.topk(count, 1, largest=False)
    both = weight.gather(1, u).unsqueeze(2) * weight.gather(1, p).unsqueeze(1) * hessian[u.unsqueeze(2), p.unsqueeze(1)]
    change = (cost_u.unsqueeze(2) + cost_p.unsqueeze(1) - 2 * both).flatten(1)  # (out, count * count)
    gain, place = change.min(1)
    place = place.unsqueeze(1)
    return gain, u.gather(1, place // count).squeeze(1), p.gather(1, place % count).squeeze(1)


def _best_in_groups(weight: Tensor, hessian: Tensor, out: Tensor, back: Tensor, of: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of pairs within groups of `of` columns."""
    groups = weight.shape[1] // of
    inner = torch.stack([hessian[g * of : (g + 1) * of, g * of : (g + 1) * of] for g in range(groups)])  # (groups, of, of)
    w = weight.unflatten(1, (groups, of))
    both = w.unsqueeze(3) * w.unsqueeze(2) * inner
    change = out.unflatten(1, (groups, of)).unsqueeze(3) + back.unflatten(1, (groups, of)).unsqueeze(2) - 2 * both
    gain, place = change.flatten(1).min(1)  # (out, groups * of * of)
    group, u, p = place // (of * of), place // of % of, place % of
    return gain, group * of + u, group * of + p
