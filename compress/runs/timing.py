"""How long a run will take: counts of the operations that dominate, over the speeds of this machine, from a short probe.

A block costs forward passes of the calibration (2 operations per token and weight), sums x x^T at each tap (tokens * in^2), the
method at each weight, and reading, packing, decoding and checking. What a method costs is timed on a few small weights and
fitted by terms in out * in, in, out * in^2 and in^3: the last two are those of the Cholesky factor and of error feedback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import nnls

from compress.architecture.config import settings
from compress.blockwise.units import Unit, units
from compress.calibration.statistics import Hessian, Stats
from compress.errors import CompressError
from compress.runs.prepare import RunPlan

_SHAPES = ((128, 256), (512, 256), (128, 768), (512, 768))
_SMALL = 256  # columns above which a weight is not probed as it is
_PASS = 1e-7  # seconds per weight for reading, packing, decoding, digests and reading back, on one core of an AMD EPYC
_START = 5.0  # of a fresh process that loads the result
_DISK = 500e6  # bytes per second, written and read back


@dataclass(frozen=True)
class Rates:
    """Operations per second of this machine."""

    matmul: float  # in the dtype of the forward passes
    single: float  # float32 products
    cholesky: float  # float32, n^3 / 3 operations


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The better of two runs after a first one."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return max(min(found[1:]), 1e-7)


def probe(device: torch.device, dtype: torch.dtype, size: int = 1024) -> Rates:
    """Time products and a Cholesky factorisation of matrices of `size`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(device)
    y = x.to(dtype)
    h = x @ x.T + size * torch.eye(size, device=device)
    flops = 2.0 * size**3
    return Rates(
        flops / _seconds(lambda: y @ y, device),
        flops / _seconds(lambda: x @ x, device),
        size**3 / 3 / _seconds(lambda: torch.linalg.cholesky_ex(h), device),
    )


def _terms(rows: int, columns: int) -> list[float]:
    return [float(rows * columns), float(columns), float(rows * columns**2), float(columns**3)]


def _stats(method: Any, columns: int, device: torch.device) -> Stats:
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(columns + 64, columns, generator=generator).to(device)
    found: Stats = {}
    for kind in method.needs:
        found[kind] = kind(columns, device)
        found[kind].add(rows)
    return found


def method_cost(method: Any, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[float] | None:
    """Return seconds per term of `_terms` for a method that sees one weight; None where no small weight fits it."""
    small = [shape for shape in dict.fromkeys(shapes) if shape[1] <= _SMALL]
    times: list[float] = []
    rows: list[list[float]] = []
    for shape in [*_SHAPES, *small[:2]]:
        if method.check(shape) is not None:
            continue
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
        stats = _stats(method, shape[1], device)
        try:
            if not rows:
                method(weight, stats)  # warms up
            taken = []
            for _ in range(2):  # other work on the machine makes single ones too long
                start = time.perf_counter()
                method(weight, stats)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken.append(time.perf_counter() - start)
        except CompressError:
            continue
        times.append(min(taken))
        rows.append(_terms(*shape))
    if not rows:
        return None
    matrix, right = torch.tensor(rows, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    scale = matrix.amax(0)
    solved, _ = nnls(((matrix / scale) / right.unsqueeze(1)).numpy(), torch.ones_like(right).numpy())
    return [float(value) / float(top) for value, top in zip(solved, scale, strict=True)]


def _active(plan: RunPlan, site: Any) -> float:
    """The share of tokens that a weight sees."""
    if site.expert is None:
        return 1.0
    config = settings(plan.source)
    each = config.get("num_experts_per_tok", config.get("num_experts_per_token", 1))
    all_ = 1 + max(s.expert for s in plan.inventory.sites if s.expert is not None)
    return float(each) / all_ if isinstance(each, int) else 1.0


def _block_method(method: Any, numel: float, tokens: int, batch: int, rate: float) -> float:
    """A method that trains a block: each step is a forward and a backward pass of a batch."""
    options = method.model_dump()
    steps = next((options[key] for key in ("steps", "iterations", "epochs") if isinstance(options.get(key), int)), 20)
    return 6.0 * numel * min(batch, tokens) * steps / rate


def predict(plan: RunPlan, samples: int, length: int, passes: int, size: int, reload: bool) -> float:
    """Return the seconds that a run over `samples` windows of `length` tokens will take, to within about a factor of two.

    `passes` are those that statistics take at a block, `size` the bytes of the result.
    """
    device, tokens = plan.device, samples * length
    widest = max((a.site.shape[1] for a in plan.assignments), default=64)
    rates = probe(device, plan.dtype, min(1024, max(64, widest)))
    costs: dict[int, list[float] | None] = {}
    seconds = 0.0
    blocks: dict[int | None, list[Any]] = {}
    for a in plan.assignments:
        blocks.setdefault(a.site.block, []).append(a)
        if a.step not in costs and a.method.scope == "site":
            shapes = [other.site.shape for other in plan.assignments if other.step == a.step]
            costs[a.step] = method_cost(a.method, shapes, device)
    numel: dict[int | None, float] = {}
    for site in plan.inventory.sites:
        numel[site.block] = numel.get(site.block, 0.0) + site.numel * _active(plan, site)
    width = min((site.shape[1] for site in plan.inventory.sites), default=1)
    forwards = (passes if plan.calibrated else 0) + 1 + (1 if plan.compares else 0) + len(plan.transforms) + len(plan.tuning)
    for block, weights in numel.items():
        if block is not None:
            attention = 4.0 * tokens * length * width
            seconds += forwards * (2.0 * weights * tokens / rates.matmul + attention / rates.single)
        members = blocks.get(block, [])
        for unit in units(members):
            seconds += _unit(plan, unit, tokens, rates, costs)
        for stage in {id(a.method): a.method for a in members if a.method.scope == "block"}.values():
            seconds += _block_method(stage, weights, tokens, plan.recipe.batch_tokens, rates.matmul)
        for tuning in plan.tuning:
            if block is not None:
                seconds += _block_method(tuning.method, weights, tokens, plan.recipe.batch_tokens, rates.matmul)
    whole = sum(site.numel for site in plan.inventory.sites)
    return seconds + whole * _PASS + size * 3 / _DISK + (_START + whole * 2.5e-8 if reload else 0.0)


def _unit(plan: RunPlan, unit: Unit, tokens: int, rates: Rates, costs: dict[int, list[float] | None]) -> float:
    columns, seconds = unit.columns, 0.0
    share = _active(plan, unit.assignments[0].site)
    rows: dict[int, int] = {}
    for a in unit.assignments:
        rows[a.step] = rows.get(a.step, 0) + a.site.shape[0]
    if Hessian in unit.kinds:
        seconds += 1.2 * tokens * share * columns**2 / rates.single
        seconds += sum(4.0 * count * columns**2 for count in rows.values()) / rates.single  # the error in the report's row
    for step, count in rows.items():
        cost = costs.get(step)
        if cost is not None:
            seconds += sum(a * b for a, b in zip(cost, _terms(count, columns), strict=True))
    return seconds + len(plan.transforms) * 20 * sum(4.0 * count * columns**2 for count in rows.values()) / rates.single
