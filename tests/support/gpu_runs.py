"""What runs on a pretended GPU, called in a process of its own: torch cannot be told again that there is no such device."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_cuda
import pretend_cuda
import pytest
import runs
import torch
import yaml
from tiny import tiny_checkpoint

RECIPES = Path(__file__).parents[2] / "recipes"
# What a tiny model can hold.
_MOST = {"group_size": 16, "g_max": 16, "rank": 4, "steps": 4, "iterations": 4, "epochs": 1}


@contextlib.contextmanager
def _gpu(device: str = pretend_cuda.CUDA) -> Iterator[host_cuda.Host]:
    with pytest.MonkeyPatch.context() as patch, pretend_cuda.pretended(patch, device=device) as host:
        yield host


def _shrunk(value: Any) -> Any:
    if isinstance(value, list):
        return [_shrunk(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, one in value.items():
        most = _MOST.get(key) if isinstance(one, int) and not isinstance(one, bool) else None
        found[key] = _shrunk(one) if most is None else min(one, most)
    return found


def compress_on(device: str, family: str, recipe: str, folder: Path) -> tuple[Path, list[str]]:
    """Run a recipe of this repository on a tiny model and a device, `cpu` or a pretended one; return the result and kernels."""
    from compress.recipe import reading as recipe_reading
    from compress.runs import estimate
    from compress.runs import prepare as run_prepare
    from compress.runs import run as run_module
    from compress.runs.pipeline import Settings

    values = _shrunk(yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()))
    values |= {"data": {"name": str(runs.ids_file(folder / "ids.npy", samples=8))}, "dtype": "float32", "batch_tokens": 64}
    model, out = folder / family, folder / f"{family}-{recipe}-{device}"
    if not model.exists():
        tiny_checkpoint(model, family)
    with _gpu(device) if device != "cpu" else contextlib.nullcontext() as host:
        plan = run_prepare.prepare(str(model), recipe_reading.parse(values), device)
        ids = run_prepare.calibration(plan)
        expected = estimate.estimate(plan, *ids.shape, 1 << 30, False)
        run_module.run(plan, ids, out, Settings(reload=False), lambda *_: None, expected, None, False)
    return out, [] if host is None else sorted({kernel.name.split("<")[0] for kernel, _ in host.launched})


def logits_on_both(folder: Path, tokens: int) -> tuple[torch.Tensor, torch.Tensor, list[str], list[int]]:
    """Return logits (tokens, vocabulary) of a checkpoint in bfloat16 on the CPU and on a pretended GPU, kernels, new tokens."""
    from transformers import AutoModelForCausalLM

    import compress  # noqa: F401  teaches transformers to load it

    ids = torch.randint(1, 96, (1, tokens), generator=torch.Generator().manual_seed(0))
    here = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = here(ids).logits[0].float()
    with _gpu() as host, torch.no_grad():
        there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to("cuda")
        found = there(ids.to("cuda")).logits[0].float().cpu()
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        new = there.generate(ids.to("cuda"), attention_mask=torch.ones_like(ids).to("cuda"), **options)[0, tokens:].tolist()
    return expected, found, sorted({kernel.name.split("<")[0] for kernel, _ in host.launched}), new


def compress_rows(family: str, method: str, options: dict[str, Any], folder: Path) -> Path:
    """Run one method on the CPU, on a tiny model with 16-bit values, for what reads the result."""
    model, out = folder / f"{family}-16", folder / f"{family}-{method.replace('/', '-')}"
    if not model.exists():
        import safetensors.torch as files

        tiny_checkpoint(model, family)
        (file,) = model.glob("*.safetensors")
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in files.load_file(file).items()}
        files.save_file(tensors, file, {"format": "pt"})
    data = runs.ids_file(folder / "ids.npy", samples=8)
    runs.compress(model, out, data, runs.steps(method, **options))
    return out


def mixes_devices() -> list[str]:
    """Return what the pretended GPU says of operations that a real one refuses; an empty text for one that went through."""
    said = []
    with _gpu():
        x, here = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
        tries = [lambda: x + here, lambda: torch.cat((x, here)), lambda: x @ here.T, lambda: here[x.long()], x.numpy]
        tries += [lambda: x + here[0, 0], lambda: x[torch.tensor([0, 1])], lambda: x.copy_(here), lambda: x.cpu() + here]
        for attempt in tries:
            try:
                attempt()
            except (RuntimeError, TypeError) as error:
                said.append(str(error))
            else:
                said.append("")
    return said


def benchmarks(names: list[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run benchmarks of `bench/gpu.py` on a small shape; return their rows, whose times mean nothing."""
    from typer.testing import CliRunner

    from compress.cli import app
    from compress.evaluation import bench

    sys.path.insert(0, str(RECIPES.parent / "bench"))
    found = {}
    with _gpu(), pytest.MonkeyPatch.context() as patch:
        import gpu

        patch.setattr(bench, "rates", lambda device, dtype: (1e12, 1e14))
        patch.setattr(bench, "_REPEATS", 1)
        for name in names:
            options = ["128x512" if one == "1024x1024" else one for one in gpu.benches(True)[name]]
            made = CliRunner().invoke(app, ["bench", *options, "--device", "cuda", "-q", "-o", str(folder / "bench.json")])
            assert made.exit_code == 0, made.output
            found[name] = json.loads((folder / "bench.json").read_text())["rows"]
    return found


def tests_of_kernels(which: str) -> tuple[int, str]:
    """Run some of the tests that a GPU has to pass, and return pytest's status and what it prints."""
    file = Path(__file__).parents[1] / "kernels" / "test_cuda.py"
    said = io.StringIO()
    with _gpu(), contextlib.redirect_stdout(said):
        status = pytest.main(["-q", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short", str(file), "-k", which])
    return int(status), said.getvalue()[-4000:]
