"""Experts together: the loop with the products of all experts at once, by kernels that run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import host_cuda
import pytest
import torch
from runs import compress, steps
from torch import nn
from transformers import AutoModelForCausalLM

import compress as package  # noqa: F401  registers the format
from compress.kernels import experts, weight_only
from compress.model.expert_loop import ExpertLoop
from compress.runtime.experts import ExpertProducts
from compress.runtime.linear import CompressedLinear

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def loops(model: nn.Module) -> list[ExpertLoop]:
    return [module for module in model.modules() if isinstance(module, ExpertLoop)]


@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_one_by_one(family: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    several = [*steps("quant/rtn", "*experts.1.*", bits=3, group_size=16), *steps("quant/rtn", bits=4, group_size=16)]
    compress(tiny(family), folder, None, several)
    loop = loops(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))[-1]
    products = loop.products
    assert isinstance(products, ExpertProducts)
    width = next(m.in_features for name, m in loop.named_modules() if isinstance(m, CompressedLinear))
    generator = torch.Generator().manual_seed(0)
    tokens, chosen = 9, 2
    hidden = torch.randn(tokens, width, generator=generator).to(torch.bfloat16)
    index = torch.stack([torch.randperm(loop.num_experts, generator=generator)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        assert products(loop.layout.inputs[0], hidden, torch.zeros(1), 1) is None  # on a CPU
        expected = loop(hidden, index, weights)
        host = host_cuda.Host().install(monkeypatch)
        monkeypatch.setattr(CompressedLinear, "kernel", lambda self, use: weight_only.KERNEL)
        monkeypatch.setattr(experts, "product", experts.matmul)
        together = loop.together(hidden, index, weights, products)
        assert together is not None
        assert len(host.launched) == 2 * (len(loop.layout.inputs) + 1)  # expert 1 has a width of its own
        made = dict(products._made)
        loop.together(hidden, index, weights, products)
        assert all(products._made[name] is made[name] for name in made)  # what was made is used again
        index[0, 0] = loop.num_experts  # no expert: that choice counts nothing
        partly = loop.together(hidden, index, weights, products)
        assert partly is not None
    size = expected.float().norm()
    assert float((together.float() - expected.float()).norm() / size) < 1e-2
    assert torch.equal(partly[1:], together[1:])
    assert not torch.equal(partly[0], together[0])
    codes = [m.compressed().base.codes for m in loop.modules() if isinstance(m, CompressedLinear)]  # type: ignore[attr-defined]
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    fresh = [m.compressed().base.codes for m in loops(stored)[-1].modules() if isinstance(m, CompressedLinear)]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(codes, fresh, strict=True))  # which share memory now


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_traced_as_a_whole(
    family: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a break, once the model has run: as on a GPU, with operators that do their work in plain torch."""
    folder = tmp_path / "out"
    compress(tiny(family), folder, None, steps("quant/rtn", bits=4, group_size=16))
    loop = loops(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))[-1]
    monkeypatch.setattr(CompressedLinear, "kernel", lambda self, use: weight_only.KERNEL)
    width = loop.linear(0, loop.layout.inputs[0]).in_features
    hidden, weights = torch.randn(6, width), torch.rand(6, 2)
    index = torch.tensor([[0, 1], [1, 2], [0, 2], [3, 1], [2, 3], [0, 3]]) % loop.num_experts
    with torch.no_grad():
        expected = loop(hidden, index, weights)
        loop.together(hidden, index, weights, loop.products)
        compiled = torch.compile(lambda h, i, w: loop.together(h, i, w, loop.products), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(hidden, index, weights), expected, rtol=1e-4, atol=1e-4)


def test_scattered_experts_go_one_by_one(
    tiny: Callable[..., Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    compress(tiny("mixtral"), folder, ids, steps("quant/gptq", order="desc_act", group_size=16))
    loop = loops(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))[0]
    monkeypatch.setattr(CompressedLinear, "kernel", lambda self, use: weight_only.KERNEL)
    monkeypatch.setattr(experts, "product", lambda *_: pytest.fail("scattered columns need x in an order of their own"))
    assert isinstance(loop.products, ExpertProducts)
    rows = torch.zeros(2, loop.linear(0, loop.layout.inputs[0]).in_features, dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert loop.products(loop.layout.inputs[0], rows, torch.zeros(3, dtype=torch.int32), 2) is None
