"""A rehearsal: the whole of a run on a small random copy of a model, to find what would fail before hours are spent.

The copy has the model's own config but for two blocks, a small vocabulary and, where every dimension of a recipe allows it,
the same widths; its weights are random. What fails here fails in the run: a family that cannot be streamed, a group size that
does not divide, a method that refuses, a result that transformers does not load, a layout that cannot hold it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture.config import number_of_blocks
from compress.architecture.inventory import take_inventory
from compress.checkpoint.source import Source
from compress.checkpoint.tensor_file import DTYPES, save
from compress.errors import CompressError
from compress.interop import exporter as exporting
from compress.model.detect import find_family
from compress.recipe.data import Data
from compress.recipe.schema import Recipe
from compress.runs import estimate
from compress.runs import prepare as run_prepare
from compress.runs import run as run_module
from compress.runs.pipeline import Settings
from compress.system.files import write_json
from compress.system.progress import Progress
from compress.system.side_files import read_object

BLOCKS, VOCABULARY, WINDOWS, LENGTH = 2, 512, 4, 32
_EXPERTS = 8
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_PER_BLOCK = ("layer_types", "mlp_only_layers", "no_rope_layers")


@dataclass(frozen=True)
class Stage:
    """One part of a rehearsal and how it ended."""

    name: str
    seconds: float
    problem: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What was tried; `problem` is what would fail, None if all went well."""

    model: str
    stages: list[Stage]
    changed: dict[str, Any]  # what the copy has otherwise than the model
    reload: dict[str, Any]

    @property
    def problem(self) -> str | None:
        """The first thing that went wrong."""
        return next((stage.problem for stage in self.stages if stage.problem is not None), None)

    def plain(self) -> dict[str, Any]:
        """The rehearsal as JSON values."""
        stages = [{"name": s.name, "seconds": s.seconds, "problem": s.problem} for s in self.stages]
        return {"model": self.model, "ok": self.problem is None, "stages": stages, "changed": self.changed, "reload": self.reload}


def small_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a config of few blocks, a small vocabulary and few experts, and what was changed in it."""
    changed: dict[str, Any] = {}

    def shrink(part: dict[str, Any]) -> dict[str, Any]:
        result = dict(part)
        for key, value in part.items():
            new: Any = value
            if isinstance(value, bool):
                continue
            if key in _COUNTS and isinstance(value, int):
                new = min(value, BLOCKS)
            elif key == "vocab_size" and isinstance(value, int):
                new = min(value, VOCABULARY)
            elif key == "layer_types" and isinstance(value, list):
                new = value[:BLOCKS]
            elif key in ("num_local_experts", "num_experts", "n_routed_experts") and isinstance(value, int):
                new = min(value, _EXPERTS)
            elif key == "mlp_only_layers" and isinstance(value, list):
                new = [block for block in value if isinstance(block, int) and block < BLOCKS]
            elif key.endswith("_token_id") and isinstance(value, int):
                new = min(value, VOCABULARY - 1)
            elif key.endswith("_token_id") and isinstance(value, list):
                new = [min(token, VOCABULARY - 1) for token in value]
            elif key == "text_config" and isinstance(value, dict):
                new = shrink(value)
            if new != value:
                result[key] = new
                if key not in ("layer_types", "mlp_only_layers", "text_config") and not key.endswith("_token_id"):
                    changed[key] = [value, new]
        if isinstance(part.get("num_experts_per_tok"), int):
            result["num_experts_per_tok"] = min(part["num_experts_per_tok"], _EXPERTS)
        return result

    small = shrink(config)
    small.pop("quantization_config", None)
    return small, changed


def write_copy(source: Source, folder: Path) -> dict[str, Any]:
    """Write a small random copy of a model into a folder; return what was changed in its config.

    Tensors are those of the source's first blocks, with fewer experts and tokens, in the source's dtypes.
    """
    family = find_family(source)
    config, changed = small_config(source.config)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    blocks = min(number_of_blocks(source), BLOCKS)
    vocabulary = _setting(source.config, "vocab_size")
    experts = changed.get("num_local_experts") or changed.get("num_experts") or changed.get("n_routed_experts")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, entry in source.entries.items():
        rest = name.removeprefix(family.blocks + ".")
        block = rest.partition(".")[0]
        if rest != name and (not block.isdigit() or int(block) >= blocks):
            continue
        if any(name.startswith(aside.rstrip("*")) for aside in (*family.aside, "mtp.")):
            continue
        if experts is not None and _expert(name, family) >= experts[1]:
            continue
        shape = list(entry.shape)
        if vocabulary is not None and rest == name and shape and shape[0] == vocabulary:
            shape[0] = min(vocabulary, VOCABULARY)
        if experts is not None and rest != name and shape and shape[0] == experts[0] and _expert(name, family) < 0:
            shape[0] = experts[1]  # a router, its correction, or all experts in one tensor
        dtype = DTYPES[entry.dtype]
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values *= shape[-1] ** -0.5
        elif name.endswith("norm.weight") or "layernorm" in name or ".ln_" in name:
            values = 1 + 0.1 * values
        tensors[name] = values.to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    save(folder / "model.safetensors", tensors)
    if (path := source.folder / "tokenizer.json").is_file() and not source.remote:
        kept = small_tokenizer(read_object(path), _setting(config, "vocab_size") or VOCABULARY)
        write_json(folder / "tokenizer.json", kept)
    return changed


def small_tokenizer(values: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a tokenizer.json of the same kind with the tokens below `size` alone."""
    model = dict(values["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = kept = {token: number for token, number in model["vocab"].items() if number < size}
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", [])]
        model["merges"] = [merge for merge, pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    return {**values, "model": model, "added_tokens": [t for t in values.get("added_tokens") or [] if t["id"] < size]}


def _setting(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key, (config.get("text_config") or {}).get(key))
    return value if isinstance(value, int) else None


def _expert(name: str, family: Any) -> int:
    """The number of the expert that a tensor belongs to, -1 if it belongs to none."""
    if family.experts is None or f".{family.experts.disk}." not in name:
        return -1
    number = name.partition(f".{family.experts.disk}.")[2].partition(".")[0]
    return int(number) if number.isdigit() else -1


def rehearse(
    model: str,
    recipe: Recipe,
    folder: Path,
    device: str,
    progress: Progress,
    revision: str | None = None,
    formats: Sequence[str] = (),
) -> Rehearsal:
    """Run a recipe on a small random copy of a model inside `folder` and export the result to other tools' `formats`.

    Errors become the problem of the stage they came in.
    """
    stages: list[Stage] = []
    found: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], Any]) -> bool:
        start, problem = time.perf_counter(), None
        progress(len(stages), 4 + len(formats), f"rehearsing: {name}", 0.0)
        try:
            found[name] = work()
        except CompressError as error:
            problem = error.message
        except Exception as error:  # a bug in a method, or code of a model: what the rehearsal is for
            problem = f"{type(error).__name__}: {error}"
        stages.append(Stage(name, time.perf_counter() - start, problem))
        return problem is None

    def copied() -> dict[str, Any]:
        return write_copy(found["recipe on the real model"].source, folder / "model")

    def planned() -> run_prepare.RunPlan:
        data = None
        if recipe.data is not None:
            data = Data(name=str(folder / "ids.npy"), samples=WINDOWS, length=LENGTH, seed=recipe.data.seed)
        real = found["recipe on the real model"]
        names = {site.name for site in take_inventory(Source.open(folder / "model"), real.inventory.family).sites}
        used = {a.step for a in real.assignments if a.site.name in names}
        steps = tuple(step for number, step in enumerate(recipe.steps) if number in used)
        return run_prepare.prepare(str(folder / "model"), recipe.model_copy(update={"data": data, "steps": steps}), device)

    def ran() -> Any:
        import numpy as np

        generator = torch.Generator().manual_seed(0)
        vocabulary = _setting(read_object(folder / "model" / "config.json"), "vocab_size") or VOCABULARY
        np.save(folder / "ids.npy", torch.randint(0, vocabulary, (WINDOWS, LENGTH), generator=generator).int().numpy())
        found["plan"] = plan = planned()
        ids = run_prepare.calibration(plan)
        expected = estimate.estimate(plan, ids.shape[0], ids.shape[1], 4 << 30, False)
        summary = run_module.run(plan, ids, folder / "out", Settings(), lambda *_: None, expected)
        return summary.values

    def exact() -> None:
        said = found["run, read back and loaded anew"]["predicted"]
        size = sum(path.stat().st_size for path in (folder / "out").glob("model*.safetensors*"))
        if said["exact"] and size != said["files_after"]:
            raise CompressError(f"{size} bytes of weight files; {said['files_after']} were predicted. Please report this")

    def exported(name: str) -> None:
        work = exporting.prepare(str(folder / "out"), name)
        exporting.export(work, folder / name, lambda *_: None)  # which reads back what it has written

    done = stage("recipe on the real model", lambda: run_prepare.prepare(model, recipe, device, revision, headers=True))
    done = done and stage("a random copy of two blocks", copied)
    done = done and stage("run, read back and loaded anew", ran)
    if done:
        stage("sizes as predicted", exact)
        for name in formats:
            stage(f"export to {name}", partial(exported, name))
    shutil.rmtree(folder, ignore_errors=True)
    again = found.get("run, read back and loaded anew", {}).get("reload", {})
    return Rehearsal(model, stages, found.get("a random copy of two blocks", {}), again)
