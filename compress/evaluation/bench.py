"""Speed of products with compressed weights: time, share of the machine's limit, and speedup over dense weights.

Calls rotate over copies of a weight that no cache holds, as in a model other layers run between two uses of one weight. On a GPU,
a CUDA graph of one product per copy is replayed, so that Python's overhead does not count; a path that cannot be captured is
timed by events around its calls, and its row says `eager`. Times are medians; the machine's rates are the best measured.

For activations of 8 bits or fewer, integer products are timed too: on int8 tensor cores (`int8`) and, on a GPU, from single bits
(`bit_serial`), which no model uses until this has shown where it wins; torch's product of int8 matrices is timed for comparison.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint import packed_source, packing
from compress.errors import KernelError, RecipeError
from compress.evaluation.quality import base_of
from compress.evaluation.speed import tokens_per_second
from compress.interop.foreign import open_any
from compress.kernels import bit_serial, int8
from compress.runtime.linear import CompressedLinear, round_activations
from compress.system.progress import Progress
from compress.weights.dense import Dense
from compress.weights.mask import Bitmask, Pattern
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

TOKENS = (1, 4, 16, 64, 256)
_REPEATS, _LEAST = 21, 0.05  # calls or replays per measurement, and its minimum seconds
_COPIES = 16  # most copies of one weight
Calls = Sequence[Callable[[], Tensor]]
Median = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Row:
    """One product."""

    out: int
    columns: int
    stored: str  # how the weight is stored
    tokens: int
    path: str  # kernel that multiplied
    how: str  # graph, eager or cpu
    microseconds: float
    floor: float  # fewest microseconds for the bytes or the arithmetic, at the rates measured on this machine
    dense: float  # microseconds of torch's product with a dense weight in the dtype of x
    difference: float  # |y - product with the decoded weight| over its norm
    activation_bits: int = 16
    int8: float | None = None  # microseconds of torch's product of int8 matrices, where activations have at most 8 bits

    @property
    def share(self) -> float:
        """The floor as a share of the time."""
        return self.floor / self.microseconds

    @property
    def gain(self) -> float:
        """Speedup over the dense product."""
        return self.dense / self.microseconds

    def plain(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "share": self.share, "gain": self.gain}


@dataclass(frozen=True)
class Bench:
    """Measurements on one machine."""

    device: str
    dtype: str
    torch: str
    bytes_per_second: float  # of a copy, counting reads and writes
    operations_per_second: float  # of a large dense product
    rows: list[Row]
    tokens_per_second: float | None = None  # generation speed of the model, if one was given
    tokens_per_second_before: float | None = None

    def plain(self) -> dict[str, Any]:
        """The measurements as JSON values."""
        values = asdict(self)
        rows = [row.plain() for row in self.rows]
        return {**values, "rows": rows, "bit_serial": verdict(self.rows), "measured": time.strftime("%Y-%m-%d")}


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Read 4096x4096,14336x4096 as (out, in). Raises RecipeError."""
    shapes = []
    for piece in text.split(","):
        rows, _, columns = piece.strip().partition("x")
        if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            raise RecipeError(f"--shapes {text}: {piece!r} is no shape; expected OUTxIN, as in 4096x4096,14336x4096")
        shapes.append((int(rows), int(columns)))
    return shapes


def _median(calls: Calls, device: torch.device, capture: bool, of: Median = statistics.median) -> tuple[float, str]:
    """Return the seconds per call and how they were measured; the calls run in turn, repeatedly."""
    for call in calls:
        call()
    if device.type != "cuda":
        return of(_times_cpu(calls)), "cpu"
    torch.cuda.synchronize(device)
    if not capture:
        return of(_times_events(lambda: [call() for call in calls], device)) / len(calls), "eager"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    seconds = of(_times_events(graph.replay, device)) / len(calls)
    del kept
    return seconds, "graph"


def median(calls: Calls, device: torch.device) -> float:
    """Return the median seconds per call; on a GPU, a CUDA graph of all calls is replayed."""
    return _median(calls, device, True)[0]


def _times_cpu(calls: Calls) -> list[float]:
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < _REPEATS or time.perf_counter() - begin < _LEAST:
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if len(times) >= 5 and time.perf_counter() - begin > 2:
            break
    return times


def _times_events(run: Callable[[], Any], device: torch.device) -> list[float]:
    times: list[float] = []
    for _ in range(_REPEATS + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(stop) / 1e3)
    return times[3:]


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure the bytes per second of a copy and the operations per second of a dense product."""
    count, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 25, 1024)
    one, other = torch.ones(count, device=device), torch.empty(count, device=device)
    seconds, _ = _median([lambda: other.copy_(one)], device, False, min)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product, _ = _median([lambda: torch.nn.functional.linear(a, b)], device, False, min)
    return 2 * 4 * count / seconds, 2 * side**3 / product


def copies_of(nbytes: int, device: torch.device) -> int:
    """Return how many copies of a weight are more than any cache holds, at most `_COPIES`."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    return max(1, min(_COPIES, -(-4 * cache // nbytes)))


def _cloned(linear: CompressedLinear, device: torch.device) -> CompressedLinear:
    copy = CompressedLinear(linear.spec, None, str(device))
    copy.load_state_dict({leaf: tensor.to(device) for leaf, tensor in linear.tensors.items()})
    return copy


def measure(
    weight: CompressedWeight,
    tokens: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    machine: tuple[float, float],
    activation_bits: Sequence[int] = (16,),
) -> Iterator[Row]:
    """Time products of x (tokens, in) with one weight: through `CompressedLinear`, as in a model, and integer products."""
    linear = CompressedLinear.of(weight)
    (rows, columns), nbytes = weight.shape, weight.stored_bits // 8
    decoded, stored = weight.dequantize(), packing.short(linear.spec)
    count_copies = copies_of(nbytes, device)
    dense = [decoded.to(device, dtype, copy=True) for _ in range(copies_of(rows * columns * dtype.itemsize, device))]
    exact = decoded.to(device, torch.float64)
    octets = _octets(decoded, device) if min(activation_bits) <= 8 else []
    whole = int8.rounds(linear.spec)
    for bits in activation_bits:
        ways: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        if bits == 16 or (bits == 8 and (whole or len(activation_bits) == 1)):
            copies = [_cloned(linear, device) for _ in range(count_copies)]
            round_activations(torch.nn.ModuleList(copies), bits)
            ways["linear"] = [*copies]
        if bits <= 8 and device.type == "cuda" and (planes := _bit_planes(weight, device)) is not None:
            clones = [planes, *(replace(planes, words=planes.words.clone()) for _ in range(count_copies - 1))]
            ways[f"bit_serial, {bits} bits"] = [partial(bit_serial.matmul_bits, weight=one, bits=bits) for one in clones]
        generator = torch.Generator().manual_seed(0)
        for count in tokens:
            x = torch.randn(count, columns, generator=generator).to(device, dtype)
            expected = (x.double() @ exact.T).cpu()
            for name, products in ways.items():
                first = products[0]
                with torch.no_grad():
                    y = first(x)
                    difference = float((y.cpu().double() - expected).norm() / expected.norm())
                    kernel = first.kernel(first.use(x)) if isinstance(first, CompressedLinear) else None
                    captured = kernel is None or kernel.keeps  # a kernel that decodes stored tensors cannot be captured
                    seconds, how = _median([partial(one, x) for one in products], device, captured)
                    before, _ = _median([partial(torch.nn.functional.linear, x, w) for w in dense], device, True)
                    integers = _int8_seconds(count, octets, device) if bits <= 8 else None
                moved = nbytes + count * (rows + columns) * dtype.itemsize
                floor = max(moved / machine[0], 2 * count * rows * columns / machine[1])
                path = name if kernel is None else kernel.name
                if kernel is not None and kernel.decodes_from is not None and count >= kernel.decodes_from:
                    path += ", decoded"
                times = 1e6 * seconds, 1e6 * floor, 1e6 * before, difference, bits
                yield Row(rows, columns, stored, count, path, how, *times, None if integers is None else 1e6 * integers)


def _octets(decoded: Tensor, device: torch.device) -> list[Tensor]:
    """Copies of a weight (out, in) as int8, more than any cache holds; none where torch cannot multiply the shape."""
    if any(size % 8 for size in decoded.shape):
        return []
    whole = (decoded / decoded.abs().amax().clamp_min(1e-30) * 127).round().to(torch.int8)
    return [whole.to(device, copy=True) for _ in range(copies_of(whole.numel(), device))]


def _int8_seconds(count: int, octets: Sequence[Tensor], device: torch.device) -> float | None:
    """Seconds of torch's product of int8 matrices; on a GPU, of at least 32 rows, the fewest it accepts."""
    if not octets:
        return None
    rows = max(count, 32) if device.type == "cuda" else count
    x = torch.ones(rows + -rows % 8 if device.type == "cuda" else rows, octets[0].shape[1], dtype=torch.int8, device=device)
    return _median([partial(torch._int_mm, x, one.T) for one in octets], device, True)[0]


def _bit_planes(weight: CompressedWeight, device: torch.device) -> bit_serial.Bits | None:
    """A weight as single bits, or None where no bit-serial product supports it."""
    if not isinstance(weight.base, Uniform) or len(weight.parts) > 1:
        return None
    base = weight.base
    try:
        return bit_serial.prepare(replace(base, codes=base.codes.to(device), scale=base.scale.to(device)))
    except KernelError:  # zero points, or groups that do not fit
        return None


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say for each bit-serial product whether it was faster than the int8 and dense products."""
    found = []
    for row in rows:
        if not row.path.startswith("bit_serial"):
            continue
        same = [r for r in rows if (r.out, r.columns, r.stored, r.tokens) == (row.out, row.columns, row.stored, row.tokens)]
        others = {r.path: r.microseconds for r in same if not r.path.startswith("bit_serial")} | {"dense": row.dense}
        if row.int8 is not None:
            others["dense int8"] = row.int8
        best = min(others, key=lambda name: others[name])
        ratio = others[best] / row.microseconds
        what = f"{row.out} x {row.columns}, {row.stored}, {row.activation_bits}-bit activations, {row.tokens} tokens"
        won = f"bit-serial wins, {ratio:.2f} times as fast as {best}"
        found.append(f"{what}: " + (won if ratio > 1 else f"{best} wins, {1 / ratio:.2f} times as fast"))
    return found


def random_uniform(shape: tuple[int, int], bits: int, group_size: int, zero: bool) -> Uniform:
    """A weight of random codes and scales. Raises RecipeError for a group size that does not divide its columns."""
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise RecipeError(f"--shapes {rows}x{columns}: in={columns} is not a multiple of --group-size {group_size}")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // size, generator=generator) * columns**-0.5 / (1 << bits)).to(torch.bfloat16)
    zeros = torch.randint(0, 1 << bits, tuple(scale.shape), generator=generator, dtype=torch.uint8) if zero else None
    return Uniform(codes, scale, bits, size, zeros)


def random_values(shape: tuple[int, int], dtype: torch.dtype) -> Dense:
    """A dense weight of random 16-bit values."""
    kept = dtype if dtype.itemsize == 2 else torch.bfloat16
    return Dense((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * shape[1] ** -0.5).to(kept))


def weight_of(base: Dense | Uniform, pattern: str | None, sparsity: float | None, run: int) -> CompressedWeight:
    """A weight, optionally with a random mask: N:M, or runs of columns of which a share is pruned. Raises RecipeError."""
    rows, columns = base.shape
    if pattern is None and sparsity is None:
        return CompressedWeight(base)
    generator = torch.Generator().manual_seed(1)
    if sparsity is not None or pattern is None:
        if run < 1 or columns % run:
            raise RecipeError(f"--run {run}: expected a divisor of in={columns}")
        return CompressedWeight.pruned(
            base, Bitmask(torch.rand(rows, columns // run, generator=generator) >= (sparsity or 0), run)
        )
    kept, _, of = pattern.partition(":")
    if not (kept.isdecimal() and of.isdecimal() and 0 < int(kept) < int(of) <= 8) or columns % int(of):
        raise RecipeError(f"--pattern {pattern}: expected N:M as 2:4, M at most 8 and a divisor of in={columns}")
    combinations = math.comb(int(of), int(kept))
    choice = torch.randint(0, combinations, (rows, columns // int(of)), generator=generator, dtype=torch.uint8)
    return CompressedWeight.pruned(base, Pattern(choice, int(kept), int(of)))


def of_model(folder: str) -> list[CompressedWeight]:
    """One weight of each shape and kind in a compressed checkpoint. Raises CheckpointError."""
    source = open_any(folder)
    if not isinstance(source, packed_source.PackedSource):
        raise RecipeError(f"{folder}: not compressed; give a checkpoint that compress wrote, or --shapes OUTxIN")
    first: dict[str, str] = {}
    for site, spec in source.table.items():
        first.setdefault(f"{spec['shape']} {packing.short(spec)}", site)
    return [source.compressed(site) for site in first.values()]


def bench(
    weights: Sequence[CompressedWeight],
    tokens: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    model: str | None,
    original: str | None,
    activation_bits: Sequence[int],
    progress: Progress,
) -> Bench:
    """Time products with the weights and, where a model is given, its generation against the original's."""
    machine = rates(device, dtype)
    rows: list[Row] = []
    for number, weight in enumerate(weights):
        progress(number, len(weights), f"{weight.shape[0]} x {weight.shape[1]}", 0.0)
        rows += measure(weight, tokens, device, dtype, machine, activation_bits)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    speed: list[float | None] = [None, None]
    if model is not None:
        progress(len(weights), len(weights), "generation", 0.0)
        before = original or base_of(model)
        folders = [str(open_any(of).folder) if of is not None else None for of in (model, before)]
        speed = [None if folder is None else tokens_per_second(folder, device) for folder in folders]
    return Bench(name, str(dtype).removeprefix("torch."), torch.__version__, *machine, rows, *speed)
