"""The cost of each candidate at each site, as divergence of the model's output, from one forward and one backward pass.

Problem   predict KL(original || compressed), mean over positions, when the weight W (out, in) of one site becomes Q.
Theory    for a small change of the logits, KL is the quadratic form of their Fisher matrix. With labels y drawn from the model's
          own distribution and g the gradient of -log p(y) at the site's output, that Fisher matrix is the mean of g g^T, so
              KL ~ 1/2 sum_t E (g_t^T D x_t)^2 ~ 1/2 sum_o G_o (D H D^T)_oo,   D = W - Q,
          where H is the mean of x x^T over the tokens that reach the site, and G_o the sum of g_o^2 over them per position of
          the text. Assumed independent: inputs and gradients, and errors of different outputs, tokens and sites.
Steps     1. Forward, block by block through the original weights: statistics once per tap, every candidate from the same
             statistics, and its (D H D^T)_oo. Of candidates that step 3 does not need whole, every eighth row is compressed.
            Hidden states before each block are kept for `GRADIENT_TOKENS` tokens.
          2. Labels are drawn, and the gradients go backward through the same blocks, loaded one at a time.
          3. References: whole models at one candidate, run alongside the original on windows that the statistics have not seen.
             Their divergence over the sum of their sites' costs is the candidate's factor: errors of many sites exceed that sum,
             up to twofold at 2 bits and by a quarter at 3. Rounding under H shrinks outputs (by 5 % at 2 bits), and the losses
             of gate and up projections point the same way in all blocks; those of attention add up as if independent.
Measured  42 sites x 12 candidates of a small llama, each site compressed alone, measured on held-out windows: log(predicted /
          measured) has a standard deviation of 0.16 and a mean of 0.04. The deviation is 0.15 with the full matrix g g^T, 0.13
          with the sum over tokens not factored, 0.28 with gradients summed over a window before squaring, 1.0 for the plain
          error tr(D H D^T) and 0.8 for the error relative to tr(W H W^T). Plans by the last two are 30 to 120 % worse at
          2.5 to 3.1 bits. Without the factors, plans put too much at 2 bits: 10 % worse at 3.0 and 3.1 bits, 2 % at 2.5.
          Additional factors for each kind of weight change plans by 3 % up or down, and were left out; so does using the
          measured KL of each site alone, which shows that the sum is what limits a plan.
Failures  v projections of models that attend to everything alike: their errors have a part that all tokens share.
Experts   reached by few tokens in the backward pass: G is shrunk towards the mean of the block's experts of that kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.architecture.family import Site
from compress.blockwise.stream import Stream, slices
from compress.blockwise.units import choose, observed
from compress.blockwise.walk import walk
from compress.calibration.statistics import Hessian, Statistics, Stats, statistic
from compress.errors import CalibrationError, CheckpointError
from compress.model.divergence import divergence, mean
from compress.model.streamed import StreamedModel, Weights
from compress.planning.candidates import Candidate
from compress.planning.sensitivity import Reference, Sensitivity, SiteCosts, references, sites_of, split
from compress.recipe.assignment import Assignment
from compress.runs.prepare import RunPlan
from compress.system.files import writing
from compress.system.progress import Progress
from compress.system.state_file import load_state, save_state
from compress.weights.weight import CompressedWeight

GRADIENT_TOKENS = 8192  # tokens of the backward pass
BACKWARD_TOKENS = 2048  # tokens that pass through a block at a time with their graph
SAMPLED = 8  # of so many rows of a weight, one is compressed
LEAST_ROWS = 64  # of a sample
EXPERT_TOKENS = 64  # weight of the other experts' mean gradient


@dataclass(frozen=True)
class _Asked:
    """Stands in for the method of an assignment while all candidates are tried."""

    needs: tuple[type[Statistics], ...]
    rows_independent: ClassVar[bool] = True


_FOUND = ("bits", "errors", "share", "squares", "reached", "lim", "zd", "measured")


class Measurement:
    """The two passes over one model; with a folder, an interrupted measurement resumes after the last block saved there."""

    def __init__(
        self,
        plan: RunPlan,
        ids: Tensor,
        candidates: Sequence[Candidate],
        memory_budget: int,
        progress: Progress,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.plan, self.candidates, self.memory_budget, self.progress = plan, candidates, memory_budget, progress
        self.sites = sites_of(plan)
        self.streamed = StreamedModel(plan.source, plan.inventory, plan.dtype, plan.device)
        self.blocks = len(self.streamed.blocks)
        needs = tuple(dict.fromkeys((Hessian, *(kind for c in candidates for kind in c.build.needs))))
        asked = _Asked(needs)
        self.work: dict[int, list[Assignment]] = {}
        for a in plan.assignments:
            if a.site.block is not None:
                fallback = None  # shrink the Hessian, as the recipe will
                self.work.setdefault(a.site.block, []).append(Assignment(a.site, 0, asked, fallback, a.min_tokens))
        self.fits = {site.name: [c.build.check(site.shape) is None for c in candidates] for site in self.sites}
        self.references = references(self.sites, candidates)
        self.bits: dict[str, list[int | None]] = {}
        self.errors: dict[str, list[Tensor | None]] = {}  # (D H D^T)_oo, (out,)
        self.share: dict[str, float] = {}  # share of the text's positions that reach a site
        self.squares: dict[str, Tensor] = {}  # G, (out,) float64, summed
        self.reached: dict[str, int] = {}  # number of gradient rows
        self.lim: list[float] = []
        self.zd: list[float] = []
        fit, self.probe_ids = split(ids)
        self.gradient_ids = fit[: max(GRADIENT_TOKENS // ids.shape[1], 1)]
        with self.streamed.embeddings_and_head():
            self.fit = self._stream(fit, plan.recipe.batch_tokens, "calibration", lazy=True)
            self.gradient = self._stream(self.gradient_ids, BACKWARD_TOKENS, "gradients")
            self.probe = self._stream(self.probe_ids, plan.recipe.batch_tokens, "probe")
        self.branches = {c: self.probe.branch(f"candidate {c}") for c in self.references}
        self.kept: dict[int, list[Tensor]] = {}  # inputs of each block for the backward pass, without a folder
        self.measured: dict[int, tuple[float, float | None]] = {}
        self.gradients: list[Tensor] = []
        self.before = 0.0  # seconds of earlier runs

    def _stream(self, ids: Tensor, tokens: int, name: str, lazy: bool = False) -> Stream:
        return Stream.begin(self.streamed, ids, slices(ids, tokens), name, lazy=lazy)

    def run(self) -> Sensitivity:
        """Run both passes, block by block."""
        start = time.perf_counter()
        for step in range(self._resume(), 2 * self.blocks):
            if step < self.blocks:
                walk(self.streamed, self._streams(), [step], self._forward, self._tell)
            else:
                self.progress(step, 2 * self.blocks, "gradients", 0.0)
                walk(self.streamed, [], [2 * self.blocks - 1 - step], self._backward)
            if step == self.blocks - 1:
                self.measured = self._compare()
                self.gradients = self._labels()
                for stream in self._streams():
                    stream.states.put([])
            self._save(step + 1, self.before + time.perf_counter() - start)
        costs = self._costs()
        found = []
        for c, (kl, error) in self.measured.items():
            found.append(Reference(c, sum(row.kl[c] or 0.0 for row in costs), kl, error))
        exact = all(
            c.build.describe(s.shape).exact
            for s in self.sites
            for c, ok in zip(self.candidates, self.fits[s.name], strict=True)
            if ok
        )
        return Sensitivity(costs, found, self.lim, self.zd, exact, self.before + time.perf_counter() - start)

    def _streams(self) -> list[Stream]:
        return [self.fit, self.gradient, self.probe, *self.branches.values()]

    def _resume(self) -> int:
        """Restore what an earlier run of the same measurement saved; return the number of steps done."""
        if self.folder is None or not (state := self.folder / "state.pt").exists():
            return 0
        values = load_state(state, "cpu", self._again)
        try:
            for name in _FOUND:
                setattr(self, name, values[name])
            for stream, hidden in zip(self._streams(), values["hidden"], strict=True):
                stream.states.put(hidden)
            self.gradients, self.before, done = values["gradients"], values["seconds"], int(values["done"])
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"{state}: is damaged ({type(error).__name__}); {self._again}") from error
        return done

    @property
    def _again(self) -> str:
        """What to do about a file that is damaged."""
        return f"remove {self.folder} to measure anew"

    def _save(self, done: int, seconds: float) -> None:
        """Save everything that the steps after the first `done` need."""
        if self.folder is None:
            return
        values = {name: getattr(self, name) for name in _FOUND}
        values |= {"hidden": [stream.states.batches() for stream in self._streams()], "gradients": self.gradients}
        save_state(self.folder / "state.pt", values | {"done": done, "seconds": seconds})

    def _keep(self, block: int) -> None:
        """Keep the inputs of a block for the backward pass."""
        if self.folder is None:
            self.kept[block] = self.gradient.states.batches()
            return
        save_state(self.folder / f"inputs-{block}.pt", self.gradient.states.batches())

    def _entering(self, block: int) -> list[Tensor]:
        if self.folder is None:
            return self.kept.pop(block)
        entering: list[Tensor] = load_state(self.folder / f"inputs-{block}.pt", "cpu", self._again)
        return entering

    def _tell(self, block: int, step: str, share: float) -> None:
        self.progress(block, 2 * self.blocks, step, share)

    def _forward(self, block: int) -> Iterator[tuple[str, Weights]]:
        self._keep(block)

        def observe() -> None:
            self.fit.peek(self.streamed, block)

        say = partial(self._tell, block)
        made: dict[int, list[tuple[str, CompressedWeight]]] = {c: [] for c in self.references}
        for unit, stats, pooled in observed(self.streamed, self.work.get(block, []), observe, self.memory_budget, say):
            _, chosen, _ = choose(unit.assignments[0], stats, pooled)
            self._try([a.site for a in unit.assignments], chosen, made)
        if self.fit.outputs is None:
            observe()
        self._scores(block)
        for c, branch in self.branches.items():
            yield branch.follows, Weights.of(made[c], dtype=self.streamed.dtype)

    def _try(self, sites: list[Site], stats: Stats, made: dict[int, list[tuple[str, CompressedWeight]]]) -> None:
        """Compress the sites of one tap with every candidate, and record sizes and errors per output."""
        hessian = statistic(stats, Hessian)
        matrix = hessian.matrix()
        positions = self.fit.ids.numel()
        weights = {site.name: self.streamed.weight(site).to(self.streamed.device).float() for site in sites}
        for site in sites:
            self.bits[site.name], self.errors[site.name] = [None] * len(self.candidates), [None] * len(self.candidates)
            self.share[site.name] = hessian.tokens / positions
        for c, candidate in enumerate(self.candidates):
            members = [site for site in sites if self.fits[site.name][c]]
            joined = [members] if candidate.build.rows_independent else [[site] for site in members]
            for group in filter(None, joined):
                sizes = [candidate.build.describe(site.shape) for site in group]
                whole = c in made or not made or not candidate.build.rows_independent or not all(d.exact for d in sizes)
                taken = [weights[site.name] if whole else sample(weights[site.name]) for site in group]
                result = candidate.build(torch.cat(taken), stats).weight
                first = 0
                for site, rows, size in zip(group, taken, sizes, strict=True):
                    part = result.rows(first, first + len(rows))
                    first += len(rows)
                    values = part.dequantize()
                    if not bool(values.isfinite().all()):
                        raise CalibrationError(f"{site.name}: {candidate.label} gives values that are not finite")
                    delta = rows - values
                    # Without any token nothing is known; the plain error still orders the candidates.
                    lost = (delta @ matrix) * delta if hessian.tokens else delta.square()
                    self.errors[site.name][c] = lost.sum(1).clamp_min(0).cpu()
                    self.bits[site.name][c] = part.stored_bits if whole else size.most
                    if c in made:
                        made[c].append((site.name, part))

    def _scores(self, block: int) -> None:
        """LIM and ZD of a block."""
        assert self.fit.outputs is not None
        similar = sum(
            float(torch.cosine_similarity(before.double(), after.double(), dim=-1).sum())
            for before, after in zip(self.fit.states.batches(), self.fit.outputs.batches(), strict=True)
        )
        self.lim.append(-similar / self.fit.ids.numel())
        weights = [self.streamed.weight(a.site) for a in self.work.get(block, [])]
        self.zd.append(-above_deviation(weights))

    def _compare(self) -> dict[int, tuple[float, float | None]]:
        """KL of each reference, with its standard error over windows."""
        found: dict[int, list[float]] = {c: [] for c in self.references}
        with self.streamed.embeddings_and_head():
            for p, *others in zip(*(s.logs(self.streamed) for s in (self.probe, *self.branches.values())), strict=True):
                for c, q in zip(self.references, others, strict=True):
                    found[c].append(divergence(p, q))
        return {c: mean(values) for c, values in found.items()}

    def _labels(self) -> list[Tensor]:
        """Gradients of -log p(y) at the last block's output, y drawn from the model's own distribution."""
        generator = torch.Generator().manual_seed(0)
        gradients = []
        with self.streamed.embeddings_and_head():
            for cut, batch in zip(self.gradient.cuts, self.gradient.states.batches(), strict=True):
                mine = []
                for ids, hidden in zip(self.gradient.ids[cut], batch, strict=True):
                    at = hidden[None].to(self.streamed.device).requires_grad_()
                    logits = self.streamed.logits(ids[None], at, gradients=True)[0].float()
                    # Drawn on the CPU, by inverse transform of one number per position: the same on every device up to rounding.
                    drawn = torch.rand(len(ids), 1, generator=generator).to(logits.device)
                    chances = logits.detach().softmax(-1).cumsum(-1)
                    labels = torch.searchsorted(chances, drawn * chances[:, -1:]).clamp_max(logits.shape[-1] - 1)
                    torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
                    assert at.grad is not None
                    mine.append(at.grad.cpu())
                gradients.append(torch.cat(mine))
        return gradients

    def _backward(self, block: int) -> Iterator[tuple[str, Weights]]:
        """Send the gradients (samples, length, width) back through a block, summing squares at the outputs of its sites."""
        handles = []
        for a in self.work.get(block, []):
            name = a.site.name
            self.squares[name] = torch.zeros(a.site.shape[0], dtype=torch.float64)
            self.reached[name] = 0
            handles.append(self.streamed.linear(a.site).register_forward_hook(self._square_adder(name)))
        before = []
        try:
            for hidden, gradient in zip(self._entering(block), self.gradients, strict=True):
                at = hidden.to(self.streamed.device).requires_grad_()
                self.streamed.differentiable(block, at, {}, {}).backward(gradient.to(self.streamed.device))
                assert at.grad is not None
                before.append(at.grad.cpu())
        finally:
            for handle in handles:
                handle.remove()
        self.gradients = before
        return iter(())

    def _square_adder(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).float()
            self.squares[name] += rows.square().sum(0).double().cpu()
            self.reached[name] += len(rows)

        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.register_hook(add)

        return hook

    def _costs(self) -> list[SiteCosts]:
        """Sizes and predicted KL of every site."""
        positions = self.gradient_ids.numel()
        pooled: dict[tuple[int | None, str], list[float]] = {}
        for site in self.sites:
            if site.expert is not None:
                mine = pooled.setdefault((site.block, site.kind), [0.0, 0.0])
                mine[0] += float(self.squares[site.name].mean())
                mine[1] += self.reached[site.name]
        rows = []
        for site in self.sites:
            weights = self.squares[site.name] / positions
            if site.expert is not None:
                whole, tokens = pooled[site.block, site.kind]
                mean = whole / max(tokens, 1.0)
                per_token = (self.squares[site.name] + EXPERT_TOKENS * mean) / (self.reached[site.name] + EXPERT_TOKENS)
                weights = per_token * max(self.share[site.name], 1 / self.fit.ids.numel())
            rows.append(SiteCosts(site.name, self.bits[site.name], self._predicted(site, weights)))
        return rows

    def _predicted(self, site: Site, weights: Tensor) -> list[float | None]:
        """KL by candidate for weights G (out,) of the outputs.

        Errors of a sample of rows stand for all in proportion to those of the reference that is nearest in size.
        """
        bits, errors = self.bits[site.name], [None if e is None else e.double() for e in self.errors[site.name]]
        known = {c: e for c in self.references if (e := errors[c]) is not None}
        found: list[float | None] = []
        for c, mine in enumerate(errors):
            if mine is None:
                found.append(None)
            elif len(mine) == len(weights):
                found.append(0.5 * float(weights @ mine))
            else:
                near = known[min((abs((bits[other] or 0) - (bits[c] or 0)), other) for other in known)[1]]
                some = float(sample(weights) @ sample(near))
                scale = float(weights @ near) / some if some > 0 else len(weights) / len(mine)
                found.append(0.5 * scale * float(sample(weights) @ mine))
        return found


def sample(rows: Tensor) -> Tensor:
    """Evenly spaced rows, of (out, in) or (out,): one of `SAMPLED`, `LEAST_ROWS` at least."""
    return rows[:: max(1, min(SAMPLED, len(rows) // LEAST_ROWS))]


def above_deviation(weights: Sequence[Tensor]) -> float:
    """Share of all values of these tensors that lie more than one standard deviation above their mean."""
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.double().sum()) for w in weights) / count
    deviation = math.sqrt(sum(float((w.double() - mean).square().sum()) for w in weights) / count)
    return sum(int((w.double() > mean + deviation).sum()) for w in weights) / count


def measure(
    plan: RunPlan,
    ids: Tensor,
    candidates: Sequence[Candidate],
    memory_budget: int,
    progress: Progress,
    folder: Path | None = None,
) -> Sensitivity:
    """Measure every candidate at every linear in the blocks over token ids (samples, length), with `memory_budget` bytes for
    statistics at a time.

    Progress is saved in `folder` after each block, to resume after an interruption. Raises CompressError.
    """
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return Measurement(plan, ids, candidates, memory_budget, progress, folder).run()
