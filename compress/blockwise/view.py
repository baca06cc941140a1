"""A block as whole-block methods see it: transforms before calibration, joint compression, and tuning after compression."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.architecture.config import settings
from compress.blockwise import permutable as orders
from compress.blockwise import scalable as scalings
from compress.blockwise.hidden_states import States
from compress.calibration.observe import Tap, observe, observe_drift, passes
from compress.calibration.statistics import Drift, Hessian, Statistics, Stats, statistic
from compress.errors import CalibrationError
from compress.methods.block import Permutable, Scalable
from compress.methods.method import Method
from compress.model.streamed import StreamedModel
from compress.system import distributed, memory


@dataclass
class BlockRun:
    """A filled block and the calibration around it: what all views of it share."""

    streamed: StreamedModel
    number: int
    inputs: States  # after the compressed blocks
    originals: States | None  # after the original blocks; None unless a method compares
    targets: States | None  # the original block's output for `originals`
    send: Callable[[], None]  # sends the calibration data through the block, for hooks on it
    budget: int  # bytes of statistics at a time
    seed: int
    progress: Callable[[str, float], None]
    weights: dict[str, Tensor] = field(default_factory=dict)  # (out, in) float32, of sites changed by a transform
    others: dict[str, Tensor] = field(default_factory=dict)  # tensors stored instead of the source's, by disk name
    known: dict[str, Stats] = field(default_factory=dict)  # Hessians of taps as the block is now, over all ranks

    def weight(self, site: Any) -> Tensor:
        """Return a site's weight (out, in) in float32, after any transforms."""
        changed = self.weights.get(site.name)
        return self.streamed.weight(site).to(self.streamed.device).float() if changed is None else changed

    def divide_known(self, divided: Mapping[str, Tensor] | None, sites: Iterable[Any]) -> None:
        """Keep what is known of the inputs after some, of sites by name, were divided by (in,); None: forget it."""
        if divided is None:
            self.known.clear()
            return
        scales = {site.tap: divided[site.name] for site in sites if site.name in divided}
        for tap, scale in scales.items():
            if tap in self.known:
                self.known[tap] = {Hessian: statistic(self.known[tap], Hessian).divided(scale)}

    def replace_others(self, others: Mapping[str, Tensor]) -> None:
        """Store other tensors in the source's dtypes, and let the block run with them. Raises CalibrationError if not finite."""
        for name, value in others.items():
            if not bool(value.isfinite().all()):
                raise CalibrationError(f"{name}: is not finite after a transform or tuning; check the calibration data")
            self.others[name] = value.detach().to("cpu", self.streamed.source.dtype(name)).contiguous()
        self.streamed.set_tensors(self.number, {name: self.others[name] for name in others})


class MethodView:
    """A block as one method sees it: `compress.methods.block.Block`."""

    def __init__(self, around: BlockRun, assignments: Sequence[Any], step: str) -> None:
        self._around, self._step = around, step
        self._sites = {a.site.name: a.site for a in assignments}
        self.sites = {name: site.shape for name, site in self._sites.items()}
        self._rounding = {a.site.name: a.method for a in assignments}
        self.batches = len(around.inputs.shapes)
        counts = distributed.gather(self.batches)
        self.first, self.total_batches = sum(counts[: distributed.rank()]), sum(counts)

    def weight(self, site: str) -> Tensor:
        """Return the weight of a site (out, in) in float32, after any transforms."""
        return self._around.weight(self._sites[site])

    def others(self) -> dict[str, Tensor]:
        """Return the block's other floating-point tensors by disk name, in float32."""
        around, source = self._around, self._around.streamed.source
        names = around.streamed.others(around.number)  # only the names: the model may compute in lower precision than the source
        values = {name: around.others[name] if name in around.others else source.tensor(name) for name in names}
        return {name: value.to(around.streamed.device).float() for name, value in values.items()}

    @property
    def scalables(self) -> list[Scalable]:
        """Where scales can move between tensors of the block, and where they could but for an obstacle."""
        streamed = self._around.streamed
        return scalings.resolve(streamed.inventory, settings(streamed.source), self._around.number, self._sites)

    @property
    def permutables(self) -> list[Permutable]:
        """Where channels can change places between tensors of the block, and where they could but for an obstacle."""
        streamed = self._around.streamed
        return orders.resolve(streamed.inventory, settings(streamed.source), self._around.number, self._sites)

    def rounding(self, site: str) -> Method:
        """Return the method that compresses a site."""
        method: Method = self._rounding[site]
        return method

    def stored(self, name: str, value: Tensor) -> Tensor:
        """Return a value of one of the other tensors as rounded by storage, in float32."""
        return value.to(self._around.streamed.source.dtype(name)).float()

    def observe(self, kinds: Sequence[type[Statistics]]) -> dict[str, Stats]:
        """Return statistics of every site's inputs, over the calibration data of all ranks."""
        return {name: stats for names, stats in self.observe_in_turn(kinds) for name in names}

    def observe_in_turn(self, kinds: Sequence[type[Statistics]]) -> Iterator[tuple[tuple[str, ...], Stats]]:
        """Yield the same, one input tensor at a time with the sites that read it, observed in passes within the budget."""
        by_tap = self._by_tap()
        schedule = passes(self._taps(by_tap, tuple(kinds)), self._around.budget)
        for group in schedule:
            found = observe(group, self._around.send, self._around.streamed.device)
            for tap in [tap.name for tap in group]:
                stats = found.pop(tap)
                for each in stats.values():
                    _sum_over_ranks(each)
                if len(schedule) == 1 and Hessian in stats:  # all fit in memory at once
                    self._around.known[tap] = {Hessian: stats[Hessian]}
                yield tuple(site.name for site in by_tap[tap]), stats

    def drift_in_turn(self) -> Iterator[tuple[tuple[str, ...], Drift]]:
        """Yield each input tensor's drift from the original model's, with the sites that read it, for the block as it is now."""
        by_tap, streamed = self._by_tap(), self._around.streamed
        for group in passes(self._taps(by_tap, (Drift,)), self._around.budget):
            found = observe_drift(group, streamed.expert_loops(self._around.number), self._both, streamed.device)
            for tap in [tap.name for tap in group]:
                drift = found.pop(tap)
                _sum_over_ranks(drift)
                memory.give_back()
                yield tuple(site.name for site in by_tap[tap]), drift

    def _both(self) -> Iterator[bool]:
        """Run each batch after the compressed blocks, then after the original ones; yield before each, True for the latter."""
        around = self._around
        if around.originals is None:
            raise RuntimeError(f"{self._step} does not say that it compares")
        for batch in range(self.batches):
            self._around.progress("calibrating", batch / self.batches)
            for original, hidden in ((False, around.inputs), (True, around.originals)):
                yield original
                around.streamed.forward(around.number, hidden.read(batch).to(around.streamed.device))

    def _by_tap(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for site in self._sites.values():
            found.setdefault(site.tap, []).append(site)
        return found

    def _taps(self, by_tap: Mapping[str, list[Any]], kinds: tuple[type[Statistics], ...]) -> list[Tap]:
        linear = self._around.streamed.linear
        return [Tap(tap, (linear(sites[0]),), sites[0].shape[1], kinds) for tap, sites in by_tap.items()]

    def inputs(self, batch: int) -> Tensor:
        """Return one batch of the block's input states (samples, length, width), after the compressed blocks."""
        return self._around.inputs.read(batch).to(self._around.streamed.device)

    def targets(self, batch: int) -> Tensor:
        """Return the output of this block in the original model for a batch (samples, length, width)."""
        if self._around.targets is None:
            raise RuntimeError(f"{self._step} does not say that it compares")
        return self._around.targets.read(batch).to(self._around.streamed.device)

    def run(self, hidden: Tensor, weights: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the block's output for a batch with these weights (out, in) and other tensors; gradients pass through."""
        given = {self._sites[name]: weight for name, weight in weights.items()}
        return self._around.streamed.differentiable(self._around.number, hidden, given, others or {})

    def total(self, values: Tensor) -> Tensor:
        """Sum values over ranks, in place."""
        distributed.reduce_to([values], None)
        return values

    def generator(self) -> torch.Generator:
        """Return a random generator that is the same for this block and step on all ranks and in every run."""
        name = f"{self._step} of block {self._around.number}"
        digest = hashlib.sha256(f"{self._around.seed}: {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def say(self, share: float) -> None:
        """Report the share of the work that is done, 0 to 1."""
        self._around.progress("tuning", share)


def _sum_over_ranks(statistic: Statistics) -> None:
    """Sum a statistic over ranks, in place."""
    distributed.reduce_to(statistic.tensors(), None)
    statistic.tokens = sum(distributed.gather(statistic.tokens))
