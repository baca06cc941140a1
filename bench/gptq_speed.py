"""How long GPTQ takes for one weight, against two textbook column loops written from the paper's equations.

    python bench/gptq_speed.py [--size 4096] [--bits 4] [--group-size 128] [--repeat 3] [--threads 2] [--json out.json]

All three round the same float32 weight (size, size) with the same Hessian onto the same grid (symmetric, min-max, static groups,
columns in descending order of the Hessian's diagonal) and are timed from weight and Hessian to codes, fitting the grid included.

    textbook    factor H^-1 = U^T U, then per column: W[:, j+1:] -= outer(e, U[j, j+1:])
    lazy block  the same inside blocks of 128 columns; the columns after the block get one product per block
    compress    `compress.methods.quant.gptq`
    default     the same with the ranges searched and with refinements, as a recipe gets it without options
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compress.methods.quant.gptq import GPTQ, gptq
from compress.methods.solvers.uniform_grid import Grid, fit

DAMP = 0.01


def problem(size: int) -> tuple[Tensor, Tensor]:
    """Return a weight (size, size) and the second moment (size, size) of correlated inputs with uneven channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.02
    mix = torch.randn(size, size // 8, generator=generator)
    channel = torch.exp(0.5 * torch.randn(size, generator=generator))
    inputs = (torch.randn(2 * size, size // 8, generator=generator) @ mix.T / mix.shape[1] ** 0.5) * channel
    inputs += torch.randn(2 * size, size, generator=generator) * 0.3 * channel
    return weight, inputs.T @ inputs / inputs.shape[0]


def upper_factor(hessian: Tensor) -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of the damped Hessian."""
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return upper


def expanded(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order, the permuted weight, U and the scale of every permuted column (out, in)."""
    grid: Grid = fit(weight, bits, group_size, symmetric=True, search=False)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    scale = grid.scale.float().repeat_interleave(group_size, 1)[:, order]
    return order, weight[:, order], upper_factor(hessian[order][:, order]), scale


def textbook(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Return codes (out, in), every column updating all later ones."""
    order, w, upper, scale = expanded(weight, hessian, bits, group_size)
    half, codes = 1 << (bits - 1), torch.empty_like(weight)
    for j in range(w.shape[1]):
        code = torch.clamp(torch.round(w[:, j] / scale[:, j]), -half, half - 1)
        codes[:, order[j]] = code + half
        error = (w[:, j] - code * scale[:, j]) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return codes.to(torch.uint8)


def lazy_block(weight: Tensor, hessian: Tensor, bits: int, group_size: int, block: int = 128) -> Tensor:
    """Return codes (out, in), columns after a block updated once per block."""
    order, w, upper, scale = expanded(weight, hessian, bits, group_size)
    half, codes = 1 << (bits - 1), torch.empty_like(weight)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        inside, errors = w[:, start:stop].clone(), torch.zeros(len(w), stop - start)
        for i in range(stop - start):
            j = start + i
            code = torch.clamp(torch.round(inside[:, i] / scale[:, j]), -half, half - 1)
            codes[:, order[j]] = code + half
            errors[:, i] = (inside[:, i] - code * scale[:, j]) / upper[j, j]
            inside[:, i + 1 :] -= torch.outer(errors[:, i], upper[j, j + 1 : stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes.to(torch.uint8)


def ours(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Return codes (out, in) of this project on the same grid."""
    options = GPTQ(bits=bits, group_size=group_size, range="minmax", damp=DAMP, refinements=0)
    result = gptq(weight, hessian, **options.model_dump())
    return result.weight.base.codes


def full(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Return codes (out, in) of this project with all its defaults."""
    return gptq(weight, hessian, **GPTQ(bits=bits, group_size=group_size).model_dump()).weight.base.codes


def timed(
    solve: Callable[[Tensor, Tensor, int, int], Tensor], problem: tuple[Tensor, Tensor, int, int], repeat: int
) -> tuple[float, Tensor]:
    """Return the best of `repeat` times in seconds, and the codes."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        codes = solve(*problem)
        best = min(best, time.perf_counter() - start)
    return best, codes


def main() -> None:
    """Measure and print; the slow loop runs once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 4096), ("bits", 4), ("group-size", 128), ("repeat", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = (*problem(args.size), args.bits, args.group_size)
    fast, codes = timed(ours, given, args.repeat)
    whole, _ = timed(full, given, args.repeat)
    result: dict[str, object] = {"size": args.size, "bits": args.bits, "group_size": args.group_size, "compress_seconds": fast}
    result["default_seconds"] = whole
    print(f"compress    {fast:8.2f} s\ndefault     {whole:8.2f} s   {whole / fast:5.1f} times as long", flush=True)
    for name, solve, repeat in (("lazy block", lazy_block, args.repeat), ("textbook", textbook, 1)):
        seconds, other = timed(solve, given, repeat)
        equal = (codes == other).double().mean().item()
        print(f"{name:11} {seconds:8.2f} s   {seconds / fast:5.1f} times as long, {equal:.4%} of the codes equal", flush=True)
        result[name.replace(" ", "_")] = {"seconds": seconds, "ratio": seconds / fast, "equal_codes": equal}
    result |= {"threads": args.threads, "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
