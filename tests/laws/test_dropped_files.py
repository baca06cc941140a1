"""A planner and a format are files: put into their folders they are used from end to end, and no other file changes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import Run
from runs import compress, steps

from compress import registry
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source

Tiny = Callable[..., Path]
Drop = Callable[[str, str, str], None]

PLANNER = '''
import numpy as np

from compress.planning.problem import Choice


def smallest(problem, most_bits=None, most_cost=None):
    """Of each variable the candidate of fewest bits."""
    return Choice(np.where(problem.fits, problem.bits, np.iinfo(np.int64).max).argmin(1))


PLANNER = smallest
'''
PART = """
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Signs:
    signs: Tensor  # (out, in) int8
    scale: Tensor  # (out, 1) bfloat16

    @property
    def shape(self):
        return tuple(self.signs.shape)

    @property
    def stored_bits(self):
        return 8 * self.signs.numel() + 16 * self.scale.numel()

    def dequantize(self):
        return self.signs.float() * self.scale.float()

    def rows(self, start, stop):
        return Signs(self.signs[start:stop], self.scale[start:stop])
"""
FORMAT = """
import torch

from compress.errors import FormatError
from compress.weights.signs import Signs


class SignBytes:
    name = "signs"
    part = Signs
    roles = ("base",)

    def describe(self, part):
        return {"format": self.name}

    def short(self, described):
        return "signs in bytes"

    def layout(self, described, shape):
        return {"signs": (torch.int8, shape), "scale": (torch.bfloat16, (shape[0], 1))}

    def pack(self, part):
        return {"signs": part.signs, "scale": part.scale}

    def check(self, described, shape, tensors):
        if not bool(((tensors["signs"] == 1) | (tensors["signs"] == -1)).all()):
            raise FormatError("signs: a sign is neither 1 nor -1; the file is damaged")

    def unpack(self, described, shape, tensors):
        self.check(described, shape, tensors)
        return Signs(tensors["signs"], tensors["scale"])

    def cut_rows(self, described, shape, tensors, start, stop):
        return described, {name: tensor[start:stop] for name, tensor in tensors.items()}


FORMAT = SignBytes()
"""
METHOD = '''
import torch

from compress.methods.method import Method, Result
from compress.weights.signs import Signs
from compress.weights.weight import CompressedWeight


class ToSigns(Method):
    """The sign of each weight and the mean magnitude of each row."""

    def __call__(self, weight, stats):
        signs = torch.where(weight < 0, -1, 1).to(torch.int8)
        return Result(CompressedWeight(Signs(signs, weight.abs().mean(1, keepdim=True).bfloat16())))


METHOD = ToSigns
'''


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drop]:
    """Return a function that puts a file of this name and text into a folder that a package looks into."""
    made: list[tuple[str, str]] = []

    def put(package: str, name: str, text: str) -> None:
        module, folder = importlib.import_module(package), tmp_path / package
        folder.mkdir()
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])
        importlib.invalidate_caches()
        made.append((package, name))

    yield put
    for package, name in made:
        sys.modules.pop(f"{package}.{name}", None)
        vars(sys.modules[package]).pop(name, None)


def test_a_planner_is_a_file(drop: Drop, run: Run, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    common = ("--data", ids, "--device", "cpu", "--quiet")
    wanted = ("--candidates", "rtn:bits=3,group_size=16", "--candidates", "rtn:bits=5,group_size=16")
    plan = ("plan", tiny("llama", num_hidden_layers=1), "-o", tmp_path / "plan.yaml", "--planner", "smallest", *common, *wanted)
    assert run(*plan, "--bpw", 6).code == 2, "nothing of that name is there"
    drop("compress.planning.planners", "smallest", PLANNER)
    assert "smallest" in registry.names("plan")
    done = run(*plan, "--bpw", 6)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    done = run("run", tmp_path / "plan.yaml", tiny("llama", num_hidden_layers=1), "-o", out, *common, "--no-reload")
    assert done.code == 0, done.err
    specs = json.loads((out / "config.json").read_text())["quantization_config"]["specs"]
    assert {spec["base"]["bits"] for spec in specs} == {3}, "though 5 bits and their scales are within the budget"


def test_a_format_is_a_file(drop: Drop, run: Run, tiny: Tiny, tmp_path: Path) -> None:
    """With the part that it stores and a method that makes such parts, each a file of its own."""
    from transformers import AutoModelForCausalLM

    drop("compress.weights", "signs", PART)
    drop("compress.formats", "signs", FORMAT)
    drop("compress.methods.quant", "to_signs", METHOD)
    model, out = tiny("llama", num_hidden_layers=1), tmp_path / "out"
    summary = compress(model, out, None, steps("quant/to_signs"), reload=True)
    packed, source = PackedSource.open_packed(out), Source.open(model)
    assert len(packed.table) == 7
    for site in packed.table:
        original = source.tensor(f"{site}.weight").float()
        expected = torch.where(original < 0, -1.0, 1.0) * original.abs().mean(1, keepdim=True).bfloat16().float()
        assert torch.equal(packed.compressed(site).dequantize(), expected)
    assert summary.values["bytes_after"] == sum(entry.nbytes for entry in Source.open(out).entries.values())
    assert any(kind["stored"] == "signs in bytes" for kind in run("inspect", out, "--json").json["kinds"])
    assert run("verify", out).code == 0
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for site in packed.table:
            dense.get_submodule(site).weight.copy_(packed.compressed(site).dequantize())
        probe = torch.arange(12)[None]
        # The same products in another order of sums: differences are of the last bits of float32.
        torch.testing.assert_close(loaded(probe).logits, dense(probe).logits, rtol=1e-4, atol=1e-5)
