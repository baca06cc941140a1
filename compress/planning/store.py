"""Measurements of one model, data and set of candidates, kept between commands."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress._version import __version__
from compress.calibration.data import fingerprint
from compress.errors import CheckpointError
from compress.planning.candidates import Candidate
from compress.planning.measure import measure
from compress.planning.sensitivity import Sensitivity, check
from compress.runs.prepare import RunPlan
from compress.system.files import write_json, writing
from compress.system.progress import Progress
from compress.system.side_files import read_object

VERSION = 1  # of what a sensitivity file means


def _identity(plan: RunPlan, ids: Tensor, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Every field that decides the sensitivities."""
    return {
        "version": VERSION,
        "source": plan.source.fingerprint(),
        "calibration": fingerprint(ids),
        "candidates": [c.plain() for c in candidates],
        "batch_tokens": plan.recipe.batch_tokens,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": plan.device.type,
        "compress": __version__,
        "torch": torch.__version__,
    }


class MeasurementFile:
    """The file that measurements of one model, data and set of candidates are kept in, in the folder of what was asked for."""

    def __init__(self, plan: RunPlan, ids: Tensor, candidates: Sequence[Candidate], folder: Path) -> None:
        self.plan, self.ids, self.candidates = plan, ids, candidates
        self.identity = _identity(plan, ids, candidates)
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"sensitivity-{digest}.json"
        self.sensitivity: Sensitivity | None = None
        self.checks: dict[str, list[float | None]] = {}
        try:
            values = read_object(self.path)
            if values["identity"] == self.identity:
                self.sensitivity, self.checks = Sensitivity.parse(values["sensitivity"]), dict(values["checks"])
        except (CheckpointError, ValueError, LookupError, TypeError, AttributeError):
            pass  # not there, or not what this command writes: measured, and written over

    def _write(self) -> None:
        assert self.sensitivity is not None
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"identity": self.identity, "sensitivity": self.sensitivity.plain(), "checks": self.checks})

    def measured(self, memory_budget: int, progress: Progress) -> tuple[Sensitivity, bool]:
        """The sensitivities, and whether they were there already."""
        begun = self.path.with_suffix(".begun")
        if self.sensitivity is not None:
            shutil.rmtree(begun, ignore_errors=True)  # of a run that was killed after it had written them
            return self.sensitivity, True
        self.sensitivity = measure(self.plan, self.ids, self.candidates, memory_budget, progress, begun)
        self._write()
        shutil.rmtree(begun)
        return self.sensitivity, False

    def checked(self, choices: dict[str, int], memory_budget: int, progress: Progress) -> tuple[float, float | None]:
        """The measured KL of a plan and its standard error."""
        transforms = [{"method": s.method.path, **s.method.model_dump(mode="json")} for s in self.plan.transforms]
        key = hashlib.sha256(json.dumps([choices, transforms] if transforms else choices).encode()).hexdigest()
        if key not in self.checks:
            methods = {name: self.candidates[c] for name, c in choices.items()}
            self.checks[key] = list(check(self.plan, self.ids, methods, memory_budget, progress))
            self._write()
        kl, error = self.checks[key]
        assert kl is not None
        return kl, error
