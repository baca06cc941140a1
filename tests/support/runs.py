"""Runs on tiny models, as a test needs them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np


def ids_file(path: Path, samples: int = 12, length: int = 16, vocabulary: int = 96, seed: int = 0) -> Path:
    """Write random calibration ids."""
    generator = np.random.default_rng(seed)
    np.save(path, generator.integers(0, vocabulary, (samples, length), dtype=np.int32))
    return path


def steps(method: str = "quant/gptq", match: str = "*.*", **options: Any) -> list[dict[str, Any]]:
    """One step."""
    return [{"match": match, "method": method, "options": options}]


def compress(model: Path, out: Path, data: Path | None, steps: list[dict[str, Any]], **more: Any) -> Any:
    """Run a recipe with these steps in this process and return its summary; job, settings, progress and device go to the run.

    The result is loaded anew with `reload=True` only, as that takes longer than all else.
    """
    from compress.recipe import reading as recipe_reading
    from compress.runs import estimate
    from compress.runs import prepare as run_prepare
    from compress.runs import run as run_module
    from compress.runs.pipeline import Settings

    settings = replace(more.pop("settings", Settings()), reload=more.pop("reload", False))
    progress = more.pop("progress", lambda *_: None)
    job, keep_job, device = more.pop("job", None), more.pop("keep_job", False), more.pop("device", "cpu")
    values = {"steps": steps, "dtype": "float32", "batch_tokens": 64, **more}
    if data is not None:
        values["data"] = {"name": str(data), **values.pop("data_options", {})}
    plan = run_prepare.prepare(str(model), recipe_reading.parse(values), device)
    ids = run_prepare.calibration(plan)
    expected = estimate.estimate(plan, ids.shape[0], ids.shape[1], settings.memory, settings.offload)
    return run_module.run(plan, ids, out, settings, progress, expected, job, keep_job)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that must not depend on when or how often a run was interrupted."""
    names = ("*.safetensors", "*.index.json", "config.json", "recipe.yaml")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for name in names for p in sorted(folder.glob(name))}


def killed_at(event: int, model: Path, out: Path, data: Path | None, steps: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Run a recipe in a process that kills itself at the `event`-th durable step (fsync, replace, rename, unlink); 0: never."""
    import os
    import signal

    import torch

    torch.set_num_threads(1)
    seen = 0

    def counted(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, counted(name))
    compress(model, out, data, steps, **more)
    out.with_name(out.name + ".events").write_text(str(seen))
