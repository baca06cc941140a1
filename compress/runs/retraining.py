"""Training of a whole compressed model on the predictions of the original: distillation that can be stopped and resumed.

One dense model is in memory, the original. As it is, it is the teacher; with all compressed weights, norms and biases replaced by
the trained ones, it is the student. In addition there are the leaves, gradients and moments of three times their size, and the
activations of one micro-batch of `batch_tokens` tokens. The loss is T^2 KL(teacher || student) per token at temperature T, plus
`labels` times the cross-entropy of the text. A share of the windows is held out: the state that is best on them, with everything
as it is stored, is kept, so that the result is never worse there than the input.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture.family import Site
from compress.calibration.observe import Tap, observe
from compress.calibration.statistics import MeanSquare
from compress.errors import CalibrationError
from compress.methods.solvers.block_training import advance, optimizer, vectors_of
from compress.methods.solvers.mask_scores import mean_square
from compress.methods.solvers.trainable_weight import Trainable, Vector
from compress.model.streamed import StreamedModel
from compress.recipe.assignment import StageAssignment
from compress.recipe.schema import Retrain
from compress.runs.student import Student
from compress.system.state_file import load_state, save_state

SAVE_SECONDS = 60.0  # time between two saves of the training state
EVALUATIONS = 4  # evaluations on held-out windows, evenly over the steps
HELD_OUT = 1 / 8  # share of the windows
Say = Callable[[str, float], None]


class Training:
    """One stage of retraining, from its saved state, if any, to its last step."""

    def __init__(
        self,
        streamed: StreamedModel,
        start: Student,
        stage: StageAssignment,
        settings: Retrain,
        ids: Tensor,
        tokens: int,
        seed: int,
    ) -> None:
        self.streamed, self.start, self.settings = streamed, start, settings
        self.micro = max(1, tokens // ids.shape[1])
        self.generator = torch.Generator().manual_seed(seed)
        self.order_seed = seed + 1
        held = min(ids.shape[0] - 1, max(1, round(ids.shape[0] * HELD_OUT)))
        self.train_ids, self.held_ids = (ids[held:], ids[:held]) if held else (ids, ids)
        self.sites: dict[str, Site] = {site.name: site for sites in streamed.sites.values() for site in sites}
        members = {a.site.name for a in stage.members}
        method = stage.method
        seen = self._squares(members) if MeanSquare in method.statistics() else {}
        self.moving: dict[str, Trainable] = {}
        for name, site in self.sites.items():  # in the model's order, as random numbers are drawn
            weight = start.weights.get(name) if name in members else None
            if weight is not None and not weight.transformed:
                dense = streamed.weight(site).to(streamed.device).float()
                if (mover := method.trainable(weight, dense, seen.get(name), self.generator)) is not None:
                    self.moving[name] = mover
        self.fixed = {name: weight.dequantize() for name, weight in start.weights.items() if name not in self.moving}
        self.vectors = vectors_of(self._others(), method.norms, method.biases)
        self.constants = {n: v.to(streamed.device).float() for n, v in start.others.items() if n not in self.vectors}
        everything: list[Trainable | Vector] = [*self.moving.values(), *self.vectors.values()]
        if not everything:
            raise CalibrationError(
                "retraining: nothing of these weights can be trained with these options; train norms, scales or factors"
            )
        self.everything = everything
        self.adam = optimizer(everything, method.rate, method.relative_rate)
        self.step = 0
        self.losses: list[float] = []  # on held-out windows, of the student as it is stored
        self.best: list[dict[str, Tensor]] | None = None  # None: the input

    def _others(self) -> dict[str, Tensor]:
        """All norms and biases of the model, by disk name, in float32."""
        source = self.streamed.source
        named = [name for name in self.streamed.parameter_names() if len(source.entries[name].shape) == 1]
        values = {n: self.start.others[n] if n in self.start.others else source.tensor(n) for n in named}
        return {n: v.to(self.streamed.device).float() for n, v in values.items() if v.is_floating_point()}

    def _squares(self, members: set[str]) -> dict[str, Tensor]:
        """Mean squares (in,) of the members' input channels in the original model."""
        taps = [Tap(n, (self.streamed.linear(self.sites[n]),), self.sites[n].shape[1], (MeanSquare,)) for n in sorted(members)]

        def run() -> None:
            with torch.no_grad():
                for ids in self.train_ids.split(self.micro):
                    self.streamed.whole(ids)

        return {name: mean_square(stats) for name, stats in observe(taps, run, self.streamed.device).items()}

    def _loss(self, ids: Tensor, weights: Mapping[Site, Tensor], others: Mapping[str, Tensor], judged: bool = False) -> Tensor:
        """The loss of some windows, summed over tokens."""
        settings = self.settings
        heat = 1.0 if judged else settings.temperature
        with torch.no_grad():
            teacher = (self.streamed.whole(ids).float() / heat).log_softmax(-1)
        logits = self.streamed.whole(ids, weights, others).float()
        student = (logits / heat).log_softmax(-1)
        lost = heat**2 * torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        if settings.labels and not judged:
            text = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum"
            )
            lost = lost + settings.labels * text
        return lost

    def held_out(self, student: Student) -> float:
        """KL divergence per token on held-out windows, of a student as it is stored."""
        others = self._others() | {n: v.to(self.streamed.device).float() for n, v in student.others.items()}
        weights = {self.sites[name]: weight.dequantize() for name, weight in student.weights.items()}
        total = 0.0
        with torch.no_grad():
            for ids in self.held_ids.split(self.micro):
                total += float(self._loss(ids, weights, others, judged=True))
        return total / self.held_ids.numel()

    def stored(self) -> Student:
        """The student that the leaves represent, as it is stored."""
        source = self.streamed.source
        with torch.no_grad():
            moved = {name: m.values().to("cpu", source.dtype(name)) for name, m in self.vectors.items()}
            weights = {n: self.moving[n].stored() if n in self.moving else w for n, w in self.start.weights.items()}
        return Student(weights, self.start.others | moved)

    def _windows(self, step: int) -> Tensor:
        """The windows of a step: every epoch goes through all of them in a new order, which depends only on the step."""
        count, batch = self.train_ids.shape[0], min(self.settings.batch, self.train_ids.shape[0])
        per_round = count // batch
        generator = torch.Generator().manual_seed(self.order_seed + step // per_round)
        first = step % per_round * batch
        return self.train_ids[torch.randperm(count, generator=generator)[first : first + batch]]

    def take_step(self) -> None:
        """Take one step."""
        windows = self._windows(self.step)
        for ids in windows.split(self.micro):
            weights = {self.sites[n]: v for n, v in self.fixed.items()}
            weights |= {self.sites[name]: m.values() for name, m in self.moving.items()}
            loss = self._loss(ids, weights, self.constants | {name: m.values() for name, m in self.vectors.items()})
            if not bool(loss.isfinite()):
                raise CalibrationError(f"retraining: the loss of step {self.step} is {float(loss)}; lower rate and relative_rate")
            (loss / windows.numel()).backward()
        advance(self.adam, self.everything, self.step, self.settings.steps)
        self.step += 1

    def judge(self) -> None:
        """Evaluate on held-out windows, and keep the state that is best there."""
        lost = self.held_out(self.stored())
        if lost < min(self.losses, default=float("inf")):
            self.best = [m.state() for m in self.everything]
        self.losses.append(lost)

    def save(self, path: Path, identity: str) -> None:
        """Save everything that the next step depends on, durably and atomically."""
        state = {
            "identity": identity,
            "step": self.step,
            "losses": self.losses,
            "moving": [m.state() for m in self.everything],
            "best": self.best,
            "adam": self.adam.state_dict(),
        }
        save_state(path, state)

    def restore(self, path: Path, identity: str) -> None:
        """Resume from a state that was saved for the same training; any other is ignored."""
        if not path.exists():
            return
        state = load_state(path, self.streamed.device, "remove it to train from the start")
        if state["identity"] != identity:
            return
        self.step, self.losses, self.best = state["step"], state["losses"], state["best"]
        for m, values in zip(self.everything, state["moving"], strict=True):
            m.restore(values)
        self.adam.load_state_dict(state["adam"])

    def run(self, path: Path, identity: str, say: Say) -> tuple[Student, dict[str, Any]]:
        """Train to the last step; return the best student and notes for the report."""
        self.restore(path, identity)
        steps = self.settings.steps
        if not self.losses:
            self.losses.append(self.held_out(self.start))
        marks = {round(steps * (n + 1) / EVALUATIONS) for n in range(EVALUATIONS)}
        saved = time.monotonic()
        while self.step < steps:
            self.take_step()
            say("retraining", self.step / steps)
            if self.step in marks:
                self.judge()
            if self.step == steps or time.monotonic() - saved >= SAVE_SECONDS:
                self.save(path, identity)
                saved = time.monotonic()
        notes = {"held_out_before": self.losses[0], "held_out": min(self.losses), "steps": self.step, "memory": self.memory}
        if self.best is None:
            return self.start, notes
        for m, values in zip(self.everything, self.best, strict=True):
            m.restore(values)
        return self.stored(), notes

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the dense model, and of the leaves with their gradients and moments."""
        model = sum(p.numel() * p.element_size() for p in self.streamed.model.parameters())
        leaves = sum(v.numel() for m in self.everything for v in m.leaves.values())
        return {"model": model, "training": 16 * leaves}


def identity_of(stage: Retrain, ids: Tensor, start: Student) -> str:
    """A digest of everything that determines the result of a training."""
    digest = hashlib.sha256(stage.model_dump_json().encode())
    digest.update(ids.numpy().tobytes())
    for name, weight in sorted(start.weights.items()):
        digest.update(name.encode() + weight.dequantize().cpu().numpy().tobytes())
    for name, value in sorted(start.others.items()):
        digest.update(name.encode() + value.cpu().float().numpy().tobytes())
    return digest.hexdigest()
