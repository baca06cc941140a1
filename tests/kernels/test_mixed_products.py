"""Products with groups of different widths, run on the CPU against the exact product."""

from __future__ import annotations

import host_cuda
import pytest
import torch
from examples.mixed import mixed as mixed_part
from kernel_parts import activations
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import mixed, weight_only
from compress.weights.mixed import Mixed

BF16 = torch.bfloat16
PARTS = {
    "one width": mixed_part(20, [3, 3], 64, False),
    "all widths": mixed_part(33, [8, 7, 6, 5, 4, 3, 2, 1], 32, False),
    "zeros": mixed_part(33, [2, 4, 2, 4, 1], 48, True),
    "scattered": mixed_part(20, [4, 2, 2, 4, 1, 1], 32, True, scattered=True),
    "one group each": mixed_part(5, [4], 100, True),
}


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    kinds = [(bits, "HALF" if bits == 1 else "SYMMETRIC") for bits in range(1, 9)] + [(2, "ZERO"), (4, "ZERO")]
    return host_cuda.Host(*(weight_only.instance("wqmm", BF16, bits, kind, False, 8) for bits, kind in kinds))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    return compiled.install(monkeypatch)


def check(y: Tensor, x: Tensor, part: Mixed, more: Tensor | float = 0.0) -> None:
    decoded = part.dequantize().double()
    expected = x.double() @ decoded.T + more
    # Codes and zero points are summed apart, in float32.
    largest = x.double().abs().sum(1, keepdim=True) * float(part.scale.abs().max()) * 256
    assert bool(((y.double() - expected).abs() <= 0.501 * torch.finfo(y.dtype).eps * expected.abs() + 2.0**-20 * largest).all())


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_products(name: str, tokens: int, host: host_cuda.Host) -> None:
    part = PARTS[name]
    widths = mixed.prepare(part)
    assert [tiles.bits for tiles in widths] == sorted(set(part.widths.tolist()))
    x = activations(tokens, part.shape[1], BF16)
    check(mixed.matmul_tiles(x, widths), x, part)
    generator = torch.Generator().manual_seed(1)
    addend, bias = (
        torch.randn(tokens, part.shape[0], generator=generator),
        torch.randn(part.shape[0], generator=generator).to(BF16),
    )
    check(mixed.matmul_tiles(x, widths, addend, bias), x, part, addend.double() + bias.double())


def test_each_column_by_itself(host: host_cuda.Host) -> None:
    part = PARTS["scattered"]
    y = mixed.matmul_tiles(torch.eye(part.shape[1], dtype=BF16), mixed.prepare(part))
    assert torch.equal(y, part.dequantize().T.to(BF16))


def test_what_does_not_fit(host: host_cuda.Host) -> None:
    widths = mixed.prepare(PARTS["zeros"])
    with pytest.raises(KernelError, match="expected in=240"):
        mixed.matmul_tiles(torch.ones(1, 239, dtype=BF16), widths)
    with pytest.raises(KernelError, match="float32"):
        mixed.matmul_tiles(torch.ones(1, 240), widths)


@pytest.mark.parametrize("name", ["zeros", "scattered"])
def test_the_operator(name: str) -> None:
    part = PARTS[name]
    t, x = mixed.prepare(part), activations(4, part.shape[1], torch.float32)
    torch.library.opcheck(torch.ops.compress.mixed.default, (x, *vars(mixed.Widths.of(t)).values(), None, None))
    addend = torch.randn(4, part.shape[0])
    torch.testing.assert_close(mixed.product(x, t, addend), x @ part.dequantize().T + addend, rtol=1e-4, atol=1e-2)
