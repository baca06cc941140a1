"""The folder of kernels is their registry: one choice, by rank, and a new file is all that a new kernel takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from weights import random_weight

import compress.kernels
from compress.errors import KernelError
from compress.evaluation import bench
from compress.kernels import kernel, torch_reference
from compress.kernels.kernel import Use, choose_kernel, kernels
from compress.runtime.linear import CompressedLinear
from compress.weights.weight import CompressedWeight

# Multiplies by a transposed copy of weights without a mask, for float32 activations of one token.
TOY = """
from dataclasses import dataclass

import torch

from compress.checkpoint import packing
from compress.kernels.kernel import Kernel


@dataclass(frozen=True, eq=False)
class Laid:
    transposed: object
    scale: object
    replaces = ("scale",)

    @property
    def kernel(self):
        return KERNEL

    def takes(self, use):
        return why_not({}, use) is None

    def product(self, x, bias):
        y = x @ self.transposed
        return y if bias is None else y + bias

    def stored(self):
        return {"scale": self.scale.clone()}


def why_not(spec, use):
    return None if use.dtype == torch.float32 and use.tokens == 1 else "more than one token, or not in float32"


def lay_out(spec, tensors, use):
    return Laid(packing.unpack(dict(spec), tensors).dequantize().T.contiguous(), tensors["scale"])


KERNEL = Kernel("toy", 5, frozenset({"base"}), why_not, lay_out)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file more in the folder."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(compress.kernels, "__path__", [*compress.kernels.__path__, str(tmp_path)])
    kernels.cache_clear()
    yield "toy"
    kernels.cache_clear()
    sys.modules.pop("compress.kernels.toy", None)
    vars(compress.kernels).pop("toy", None)


def test_kernels_are_named_after_their_files_and_no_two_have_one_rank() -> None:
    assert [one.name for one in kernels()] == ["int4_cpu", "int8", "masked", "mixed", "weight_only", "torch_reference"]
    assert len({one.rank for one in kernels()}) == len(kernels())
    for one in kernels():
        assert sys.modules[f"compress.kernels.{one.name}"].KERNEL is one


def test_the_reference_takes_everything() -> None:
    """Also parts that were not there when it was written; it reads what the formats read."""
    use = Use(torch.device("cpu"), torch.float64, 1000, 16, True)
    assert torch_reference.KERNEL is kernels()[-1]
    assert torch_reference.KERNEL.reason({"shape": [1, 1], "base": {}, "unheard_of": {}}, use) is None


def test_a_choice_says_why_others_were_not_taken() -> None:
    linear = CompressedLinear.of(random_weight(48, 64))
    choice = linear.explain(torch.ones(2, 64))
    assert choice.kernel.name == linear.path(torch.ones(2, 64)) == "torch_reference"
    assert list(choice.refused) == [one.name for one in kernels()[:-1]]
    assert "2 tokens in torch.float32" in choice.refused["int4_cpu"]
    assert linear.path(torch.ones(2, 64, dtype=torch.bfloat16)) == "int4_cpu"


def test_parts_that_a_kernel_does_not_know_are_not_its() -> None:
    linear = CompressedLinear.of(random_weight(48, 64))
    use = Use(torch.device("cpu"), torch.bfloat16, 1)
    assert choose_kernel(linear.spec, use).kernel.name == "int4_cpu"
    choice = choose_kernel({**linear.spec, "unheard_of": {}}, use)
    assert choice.kernel.name == "torch_reference"
    assert set(choice.refused.values()) == {"it does not know the part unheard_of"}


def test_no_kernel_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CompressedLinear.of(random_weight(48, 64)).spec
    monkeypatch.setattr(kernel, "kernels", lambda: kernels()[:1])
    with pytest.raises(KernelError, match="int4_cpu: 1 tokens in torch"):
        choose_kernel(spec, Use(torch.device("cpu"), torch.float32, 1))


def test_a_new_file_is_found_and_used(toy: str) -> None:
    weight = random_weight(48, 64)
    linear, x = CompressedLinear.of(weight), torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    stored = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    assert linear.path(x) == toy
    assert torch.equal(linear(x), x @ weight.dequantize().T.contiguous())
    assert linear.get_buffer("scale").numel() == 0  # it is in the kernel's layout now
    assert all(torch.equal(tensor, stored[name]) for name, tensor in linear.state_dict().items())
    # More tokens are not its, and neither is another type; the layout is kept meanwhile.
    assert linear.path(x.expand(2, -1)) == "torch_reference"
    torch.testing.assert_close(linear(x.expand(2, -1)), (x @ weight.dequantize().T).expand(2, -1))
    assert linear.get_buffer("scale").numel() == 0
    # Another kernel lays the weight out from what was stored.
    assert linear.path(x.bfloat16()) == "int4_cpu"
    linear(x.bfloat16())
    assert torch.equal(linear.get_buffer("scale"), stored["scale"])
    rows = list(bench.measure(weight, (1, 2), torch.device("cpu"), torch.float32, (1e9, 1e9)))
    assert [row.path for row in rows] == [toy, "torch_reference"]
    assert (
        choose_kernel({**linear.spec, "outliers": {}}, Use(torch.device("cpu"), torch.float32, 1)).kernel.name
        == "torch_reference"
    )


def test_and_gone_with_it() -> None:
    assert CompressedLinear.of(CompressedWeight(random_weight(48, 64).base)).path(torch.ones(1, 64)) == "torch_reference"
