"""Products with activations in 8 bits, run on the CPU: exact sums of integers, and what rounding x costs."""

from __future__ import annotations

from dataclasses import replace

import host_cuda
import pytest
import torch
from kernel_parts import activations, kinds, uniform
from torch import Tensor

from compress.checkpoint import packing
from compress.errors import KernelError
from compress.kernels import _activations, _weights, int8, weight_only
from compress.weights.two_level import TwoLevel
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

BF16, FP16 = torch.bfloat16, torch.float16
PARTS = {name: part for name, part in kinds().items() if int8.reason(packing.pack(CompressedWeight(part))[1]) is None}
CASES = [(name, BF16) for name in PARTS] + [("4 bits", FP16), ("8 bits, zeros", FP16)]


def instance(name: str, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    tiles = _weights.prepare(PARTS[name], 8)
    return weight_only.instance("wqmm", dtype, tiles.bits, tiles.kind, False, 8, True)


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    sizes = [weight_only.instance("wqmm", BF16, 4, "ZERO", False, n, True) for n in weight_only.TOKENS]
    return host_cuda.Host(*(instance(*case) for case in CASES), *sizes, int8.instance(BF16), int8.instance(FP16))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    compiled.device, compiled.seed = host_cuda.DEVICE, 0
    return compiled.install(monkeypatch)


def exact(x: Tensor, part: Uniform) -> Tensor:
    """The product of integers with the decoded part in float64, times the scales of rows."""
    whole, scale = _activations.quantize(x)
    return whole.double() @ part.dequantize().double().T * scale.double().unsqueeze(1)


def check(y: Tensor, x: Tensor, part: Uniform) -> None:
    """Integers are exact; groups are added in float32 and the result is rounded once."""
    expected = exact(x, part)
    largest = exact(x.abs(), part).abs() + x.abs().double().sum(1, keepdim=True) * float(part.scale.abs().max()) * (
        1 << part.bits
    )
    eps = torch.finfo(y.dtype).eps
    assert bool(((y.double() - expected).abs() <= 0.501 * eps * expected.abs() + 2.0**-21 * largest).all())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (5, 100), (3, 256), (9, 1000)])
def test_rows_as_bytes(tokens: int, columns: int, dtype: torch.dtype, host: host_cuda.Host) -> None:
    x = activations(tokens, columns, dtype)
    whole, scale = int8.quantize_kernel(x)
    mine, expected = _activations.quantize(x)
    assert torch.equal(scale, expected)
    assert torch.equal(whole[:, :columns], mine)
    assert not whole[:, columns:].any()
    error = (whole[:, :columns].double() * scale.double().unsqueeze(1) - x.double()).abs()
    assert bool((error <= scale.double().unsqueeze(1) * 0.5001).all())
    assert bool((mine.abs().amax(1)[x.any(1)] == 127).all())


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_of_every_kind(name: str, dtype: torch.dtype, host: host_cuda.Host) -> None:
    part = PARTS[name]
    assert isinstance(part, Uniform)
    x = activations(8, part.shape[1], dtype)
    if dtype == FP16:
        x = (x / 512).to(FP16)
    y = int8.matmul_tiles(x, _weights.prepare(part, 8))
    assert not y[~x.any(1)].any()
    check(y, x, part)


@pytest.mark.parametrize("tokens", [0, 1, 7, 9, 17, 33, 64, 65, 129])
def test_any_number_of_tokens(tokens: int, host: host_cuda.Host) -> None:
    part = uniform(33, 128, 4, 32, zero=True)
    x = activations(tokens, 128, BF16)
    y = int8.matmul_tiles(x, _weights.prepare(part, 8))
    assert y.shape == (tokens, 33)
    check(y, x, part)


@pytest.mark.parametrize(("columns", "size"), [(64, 32), (192, 192), (100, 100), (1, 1), (480, 96), (2880, 64)])
@pytest.mark.parametrize("rows", [1, 16, 81])
def test_any_shape(rows: int, columns: int, size: int, host: host_cuda.Host) -> None:
    host.device = replace(host_cuda.DEVICE, processors=16)  # the columns of few rows are shared out
    part, x = uniform(rows, columns, 4, size, zero=True), activations(5, columns, BF16)
    addend, bias = torch.randn(5, rows), torch.randn(rows).to(BF16)
    tiles = _weights.prepare(part, 8)
    check(int8.matmul_tiles(x, tiles), x, part)
    both = int8.matmul_tiles(x, tiles, addend, bias).double()
    expected = exact(x, part) + addend.double() + bias.double()
    assert float((both - expected).norm() / expected.norm()) < 4e-3
    host.check_counters()


def test_the_largest_sums(host: host_cuda.Host) -> None:
    part = uniform(16, 512, 8, 512, zero=True)
    part = replace(
        part, codes=torch.full_like(part.codes, 255), zero=torch.zeros_like(part.zero), scale=torch.ones_like(part.scale)
    )
    for sign in (1, -1):
        x = torch.full((1, 512), 1.27 * sign, dtype=BF16)
        check(int8.matmul_tiles(x, _weights.prepare(part, 8)), x, part)


def test_what_does_not_fit(host: host_cuda.Host) -> None:
    part, x = uniform(16, 64, 4, 64), torch.ones(1, 64, dtype=BF16)
    with pytest.raises(KernelError, match="fields of 8 bits"):
        int8.matmul_tiles(x, _weights.prepare(part))
    with pytest.raises(KernelError, match="fields of 16 bits"):
        weight_only.matmul_tiles(x, _weights.prepare(part, 8))
    with pytest.raises(KernelError, match="fields of 16 bits"):
        weight_only.dequantize_rows(_weights.prepare(part, 8), BF16, 0, 16)
    with pytest.raises(KernelError, match="63 columns"):
        int8.matmul_tiles(x[:, 1:], _weights.prepare(part, 8))
    with pytest.raises(KernelError, match="float32"):
        int8.matmul_tiles(x.float(), _weights.prepare(part, 8))


def test_reasons() -> None:
    base = {"format": "bitpack", "group_size": 48}
    assert "multiple of 32" in str(int8.reason({"shape": [16, 96], "base": base}))
    assert "no integers" in str(int8.reason({"shape": [16, 96], "base": {"format": "table", "group_size": 48}}))
    assert not any(isinstance(part, TwoLevel) for part in PARTS.values())  # in groups of 16 here


def test_the_operator() -> None:
    part, x = PARTS["4 bits, scattered"], activations(4, 192, torch.float32)
    t = _weights.prepare(part, 8)
    torch.library.opcheck(torch.ops.compress.int8.default, (x, *vars(t).values(), None, None))
    torch.testing.assert_close(int8.product(x, t), _activations.rounded(x) @ part.dequantize().T, rtol=1e-5, atol=1e-4)
