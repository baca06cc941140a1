"""The resources a run will need and the size of its result, known before a weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.architecture.config import settings, vocabulary
from compress.blockwise.units import Unit, units
from compress.calibration.statistics import Hessian
from compress.errors import OutputError
from compress.model.complete import complete
from compress.model.streamed import StreamedModel
from compress.recipe.assignment import Assignment
from compress.recipe.schema import parse_size
from compress.runs import timing
from compress.runs.prepare import RunPlan
from compress.runs.sizes import sizes
from compress.system import memory
from compress.system.files import human_bytes

_BASE = 500 << 20  # bytes that Python, torch and transformers occupy, where not measured
# Loaded during a run, and fragmentation: without it, runs of `bench/predict.py` and of experts took 26 to 140 MB over estimate.
_LATER = 64 << 20
# Copies in float32 that a method holds at its peak, measured on quant/rtn and quant/gptq: of the weight of a call, of the
# Hessian while it is factored, and of the Hessian in addition to those of the weight.
_WEIGHTS, _FACTORED, _BESIDE = 4.5, 5.0, 3.0
_CHECKED = 128  # tokens of the batch repeated at the end of a run


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes; `bytes_after` is exact for methods that know their size beforehand."""

    bytes_before: int
    bytes_after: int
    exact: bool
    block: int  # the largest block, in the dtype of the calibration
    statistics: int  # all statistics of the largest block
    passes_memory: int  # statistics of one pass
    hidden: int  # the calibration's hidden states
    disk: int  # parts, hidden states and the result, while all exist
    files_after: int = 0  # the weight files with their headers, and the index
    passes: int = 1  # calibration passes over the largest block
    outer: int = 0  # embeddings and head
    work: int = 0  # memory of the method at the largest weight
    activations: int = 0  # one batch within a block
    base: int = _BASE
    on_host: bool = True  # whether blocks are computed in the host's memory
    seconds: float | None = None
    range_after: tuple[int, int] = (0, 0)  # least and most that `bytes_after` may be, equal where it is exact
    # The whole model where it is retrained: in the compute dtype, and its weights in float32 before and during training.
    whole: int = 0

    @property
    def computing(self) -> int:
        """Peak bytes of the computation, on any device."""
        during = self.block + max(self.passes_memory + self.activations, self.passes_memory + self.work)
        return max(during, self.outer, self.whole)

    @property
    def memory(self) -> int:
        """Peak resident bytes of the run's process."""
        return self.base + self.hidden + (self.computing if self.on_host else max(self.work // 4, self.outer))

    @property
    def device_memory(self) -> int | None:
        """Peak bytes on the GPU; None without one."""
        return None if self.on_host else self.computing

    @property
    def reload_memory(self) -> int:
        """Bytes of the process that loads the result at the end."""
        return _BASE + int(1.2 * self.files_after)


def estimate(plan: RunPlan, samples: int, length: int, memory_budget: int, offload: bool) -> Estimate:
    """Estimate what a run over `samples` windows of `length` tokens needs, with `memory_budget` bytes for
    statistics at a time."""
    source, item = plan.source, plan.dtype.itemsize
    added = {a.site.name: 0 for a in plan.assignments}
    for stage in plan.tuning:
        for a in stage.members:
            added[a.site.name] += stage.method.added_bits(a.site.shape)
    changed = {a.site.name for stage in plan.transforms for a in stage.members}
    after = sizes(source, plan.inventory, plan.assignments, parse_size(plan.recipe.max_shard_size), added, changed)
    blocks: dict[int, int] = {}
    for site in plan.inventory.sites:
        number = -1 if site.block is None else site.block
        blocks[number] = blocks.get(number, 0) + site.numel * item
    outer = blocks.pop(-1, 0) + sum(
        e.numel * item for e in map(source.entries.get, plan.inventory.copied) if e and e.numel > 1 << 20
    )
    by_block: dict[int, list[Assignment]] = {}
    for a in plan.assignments:
        by_block.setdefault(-1 if a.site.block is None else a.site.block, []).append(a)
    statistics = {n: sum(sum(kind.nbytes(u.columns) for kind in u.kinds) for u in units(m)) for n, m in by_block.items()}
    for stage in plan.transforms:  # transforms observe before the methods do
        for number in {a.site.block for a in stage.members}:
            seen = units([a for a in stage.members if a.site.block == number])
            mine = sum(kind.nbytes(u.columns) for u in seen for kind in stage.method.needs)
            statistics[number] = max(statistics[number], mine)
    width = settings(source).get("hidden_size", settings(source).get("n_embd", 0))
    width = width if isinstance(width, int) else 0  # transformers reports a value that cannot be right
    if not plan.calibrated:
        samples, length = 1, 32
    # Where a method compares, the original's hidden states before and after a block are kept too.
    hidden = samples * length * width * item * (3 if plan.compares else 1)
    most = max(statistics.values(), default=0)
    kept = hidden * (2 if offload else 1)
    tokens = min(samples * length, max(plan.recipe.batch_tokens, length))
    wide = max((a.site.shape[0] for a in plan.assignments if a.site.block is not None), default=width)
    columns = max((a.site.shape[1] for a in plan.assignments if a.site.block is not None), default=width)
    logits = min(_CHECKED, length) * vocabulary(source) * 4 * 3
    return Estimate(
        source.stored_nbytes,
        after.tensors,
        after.exact,
        max(blocks.values(), default=0),
        most,
        min(most, memory_budget) * 2 // 3,  # Hessians are summed with a product of a few columns at a time
        0 if offload else hidden,
        2 * after.tensors + kept,
        after.total,
        max(1, -(-most // memory_budget)),
        outer + logits,
        max((_work(unit) for members in by_block.values() for unit in units(members)), default=0),
        tokens * (item * (4 * width + 3 * wide) + (4 * columns if most else 0)),
        on_host=plan.device.type == "cpu",
        range_after=(after.least, after.most),
        whole=source.numel * (item + 8) if plan.retraining else 0,
    )


def _work(unit: Unit) -> int:
    """Bytes that the method holds while it compresses the weights of a tap."""
    columns = unit.columns
    rows: dict[int, int] = {}
    for position, a in enumerate(unit.assignments):
        key = a.step if a.method.rows_independent else -1 - position
        rows[key] = rows.get(key, 0) + a.site.shape[0]
    weight = 4 * columns * max(rows.values())
    square = 4 * columns**2 if Hessian in unit.kinds else 0
    return int(max(_FACTORED * square + weight, _BESIDE * square + _WEIGHTS * weight))


def timed(expected: Estimate, plan: RunPlan, samples: int, length: int, reload: bool) -> Estimate:
    """Add the bytes that this process occupies now and the seconds the run will take on this machine; runs a short probe."""
    complete(
        StreamedModel(plan.source, plan.inventory, plan.dtype, torch.device("cpu"))
    )  # loads the model's code, as the run will
    base = memory.current()
    if not plan.calibrated:
        samples, length = 1, 32
    seconds = timing.predict(plan, samples, length, expected.passes, expected.files_after, reload)
    return replace(expected, base=expected.base if base is None else base + _LATER, seconds=seconds)


def check_disk(expected: Estimate, folder: Path) -> None:
    """Raise OutputError when the disk under `folder` has less free space than a run needs."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < expected.disk:
        raise OutputError(
            f"{existing}: {human_bytes(free)} free; a run needs about {human_bytes(expected.disk)} there for parts and "
            "result. Free some space or choose another place"
        )


def predictions(expected: Estimate) -> dict[str, float | int | list[int] | None]:
    """The predictions made before a run, for its summary."""
    return {
        "memory": expected.memory,
        "device_memory": expected.device_memory,
        "seconds": expected.seconds,
        "bytes_after": expected.bytes_after,
        "files_after": expected.files_after,
        "exact": expected.exact,
        "range_after": list(expected.range_after),
        "disk": expected.disk,
    }


def shortfall(expected: Estimate, devices: Sequence[int]) -> list[str]:
    """Say what will not fit into host memory, and into GPU memory (`devices`: free bytes of each)."""
    said = []
    free = memory.available()
    if free is not None and expected.memory - expected.base > free:
        need, have = human_bytes(expected.memory), human_bytes(free + expected.base)
        said.append(f"memory: about {need} needed and {have} there; use --offload, a smaller --memory, or fewer samples")
    if expected.device_memory is not None and devices and expected.device_memory > min(devices):
        need, have = human_bytes(expected.device_memory), human_bytes(min(devices))
        said.append(f"GPU memory: about {need} needed and {have} free; use a smaller --memory or batch_tokens, or --device cpu")
    return said


def free_on(device: torch.device) -> int:
    """Free bytes on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])
