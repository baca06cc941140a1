"""CompressedLinear: the product, what it does with its tensors, and when it hands over to the int4 kernel."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weights import random_weight

from compress.checkpoint import packing
from compress.kernels import int4_cpu
from compress.runtime.linear import CompressedLinear

KINDS: list[dict[str, Any]] = [
    {"bits": bits, "zero": zero, "desc_act": scattered}
    for bits in range(1, 9)
    for zero in (False, True)
    for scattered in (False, True)
] + [{"group_size": group_size} for group_size in (8, 64, -1)]


def x_of(columns: int = 64, rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def linear_of(rows: int = 48, columns: int = 64, bias: bool = False, **kind: Any) -> CompressedLinear:
    weights = torch.randn(rows, generator=torch.Generator().manual_seed(2)) if bias else None
    return CompressedLinear.of(random_weight(rows, columns, **kind), None if weights is None else nn.Parameter(weights))


def count_int4(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count calls of the kernel and of what prepares it."""
    calls = {"matmul": 0, "prepare": 0}
    for name in calls:
        real = getattr(int4_cpu, name)

        def call(*arguments: Any, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            return real(*arguments)

        monkeypatch.setattr(int4_cpu, name, call)
    return calls


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forward_is_the_product_with_the_decoded_weight(kind: dict[str, Any]) -> None:
    linear, weight = linear_of(**kind), random_weight(48, 64, **kind)
    x = x_of(dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ weight.dequantize().double().T, rtol=1e-12, atol=1e-12)
    assert torch.equal(linear.compressed().dequantize(), weight.dequantize())
    y = linear(x.float().reshape(5, 1, 64))
    torch.testing.assert_close(y.reshape(5, 48).double(), linear(x), rtol=1e-5, atol=1e-6)


def test_the_bias_is_added_once() -> None:
    linear = linear_of(bias=True)
    x = x_of()
    assert linear.bias is not None
    torch.testing.assert_close(linear(x), x @ linear.compressed().dequantize().T + linear.bias)


def test_what_models_ask_a_linear() -> None:
    linear = linear_of(bias=True)
    assert (linear.in_features, linear.out_features) == (64, 48)
    assert linear.weight.numel() == 0
    assert not isinstance(linear, nn.Linear)
    assert "64, 48" in repr(linear)
    assert "'bits': 4" in repr(linear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moving_keeps_the_types_of_packed_tensors(dtype: torch.dtype) -> None:
    """A scale in float16 would lose what bfloat16 can hold; codes are whole numbers anyway."""
    linear = linear_of(bias=True, zero=True, desc_act=True)
    linear.scale[0, 0] = 2.0**-100  # nothing in float16
    before = {name: tensor.clone() for name, tensor in linear.tensors.items()}
    moved = linear.half() if dtype == torch.float16 else linear.to(dtype)
    assert moved is linear
    assert linear.bias is not None
    assert linear.bias.dtype == linear.weight.dtype == dtype
    for name, tensor in linear.tensors.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert linear(x_of(dtype=dtype)).dtype == dtype
    assert set(linear.state_dict()) == {"codes", "scale", "zero", "group", "bias"}, "and they stay what is stored"


def test_moving_to_another_device_and_back() -> None:
    linear = linear_of()
    assert all(tensor.is_meta for tensor in copy.deepcopy(linear).to("meta").tensors.values())
    moved = copy.deepcopy(linear).to("meta", torch.float16)
    assert all(tensor.is_meta for tensor in moved.tensors.values())
    assert moved.scale.dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    linear, other = linear_of(bias=True, zero=True), linear_of(bias=True, zero=True, seed=7)
    state = linear.state_dict()
    assert set(state) == {"codes", "scale", "zero", "bias"}
    assert not torch.equal(other(x_of()), linear(x_of()))
    other.load_state_dict(state)
    assert torch.equal(other(x_of()), linear(x_of()))
    empty = CompressedLinear(linear.spec, nn.Parameter(torch.empty(48, device="meta")))
    empty.load_state_dict(state, assign=True)
    empty.weight = torch.empty(0)
    assert torch.equal(empty(x_of()), linear(x_of()))


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(used: bool) -> None:
    linear, x = linear_of(bias=True), x_of(dtype=torch.bfloat16)
    if used:
        linear.bfloat16()(x)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    for twin in (copy.deepcopy(linear), torch.load(file, weights_only=False)):
        assert torch.equal(twin.float()(x.float()), copy.deepcopy(linear).float()(x.float()))
        assert twin.codes.data_ptr() != linear.codes.data_ptr()


# --- the int4 kernel


def test_int4_runs_for_few_rows_of_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_cpu, "MAX_ROWS", 8)
    linear, calls = linear_of(), count_int4(monkeypatch)
    for x in (x_of(), x_of(dtype=torch.float16), x_of(rows=9, dtype=torch.bfloat16), x_of(dtype=torch.float64)):
        linear(x)
    linear_of(bits=5)(x_of(dtype=torch.bfloat16))
    linear_of(zero=True)(x_of(dtype=torch.bfloat16))
    linear_of(desc_act=True)(x_of(dtype=torch.bfloat16))
    linear_of(group_size=16)(x_of(dtype=torch.bfloat16))
    linear_of(rows=40)(x_of(dtype=torch.bfloat16))
    assert calls == {"matmul": 0, "prepare": 0}
    for rows in (1, 8):
        linear(x_of(rows=rows, dtype=torch.bfloat16))
    assert calls == {"matmul": 2, "prepare": 1}


def test_int4_gives_what_the_reference_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = linear_of(bias=True).bfloat16(), x_of(dtype=torch.bfloat16)
    fast = linear(x)
    monkeypatch.setattr(int4_cpu, "MAX_ROWS", 0)
    slow = linear(x)
    assert fast.dtype == slow.dtype == torch.bfloat16
    # Both round the weight's entries and the result to bfloat16, of which one unit is 2^-8.
    torch.testing.assert_close(fast, slow, rtol=2**-6, atol=2**-6)


def test_new_tensors_make_the_kernels_own_layout_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, other, x = linear_of(), linear_of(seed=7), x_of(dtype=torch.bfloat16)
    calls = count_int4(monkeypatch)
    linear(x)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear(x), other(x))
    linear.to(torch.float32)
    assert torch.equal(linear(x), other(x))
    assert calls["prepare"] == 4


def test_gradients_reach_what_lies_before(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = linear_of()
    x = x_of(dtype=torch.bfloat16).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0].float(), linear.compressed().dequantize().sum(0), rtol=2**-6, atol=2**-6)


def test_a_linear_on_meta_has_the_shapes_of_the_file() -> None:
    tensors, spec = packing.pack(random_weight(40, 64, 3, zero=True))
    linear = CompressedLinear(spec)
    assert {name: (t.dtype, t.shape) for name, t in linear.tensors.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    assert all(tensor.is_meta for tensor in linear.tensors.values())
