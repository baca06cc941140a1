"""Products from single bits, run on the CPU: exact for what the activations are rounded to."""

from __future__ import annotations

from dataclasses import replace

import host_cuda
import pytest
import torch
from kernel_parts import activations, uniform
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import bit_serial
from compress.kernels._bit_serial import planes
from compress.kernels._tiles import tile_bits
from compress.weights.uniform import Uniform

BF16, FP16 = torch.bfloat16, torch.float16
WIDTHS = [(1, 1), (1, 4), (2, 2), (2, 8), (3, 3), (4, 4), (5, 2), (8, 8)]


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    pairs = [bit_serial.instance(BF16, *widths) for widths in WIDTHS]
    return host_cuda.Host(*pairs, bit_serial.instance(FP16, 2, 4), bit_serial.pack_instance(BF16), bit_serial.pack_instance(FP16))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    return compiled.install(monkeypatch)


def check(y: Tensor, x: Tensor, part: Uniform, bits: int, bipolar: bool) -> None:
    """Integers are exact; only scales, sums of groups and the result are rounded."""
    codes, scale = bit_serial.quantize(x, bits, bipolar)
    numbers = 2 * codes.double() - (2**bits - 1) if bipolar else codes.double() - 2 ** (bits - 1)
    seen = numbers * scale.double().unsqueeze(1)
    expected, largest = seen @ part.dequantize().double().T, seen.abs() @ part.dequantize().double().abs().T
    eps = torch.finfo(y.dtype).eps
    assert bool(((y.double() - expected).abs() <= 0.501 * eps * expected.abs() + 2.0**-21 * largest).all())


@pytest.mark.parametrize("bipolar", [False, True])
@pytest.mark.parametrize(("weight_bits", "bits"), WIDTHS)
def test_products_of_all_widths(weight_bits: int, bits: int, bipolar: bool, host: host_cuda.Host) -> None:
    if bits == 1 and not bipolar:
        with pytest.raises(KernelError, match="2 to 8"):
            bit_serial.matmul_bits(torch.ones(1, 512, dtype=BF16), bit_serial.prepare(uniform(16, 512, 1, 256)), 1)
        return
    for part in (uniform(20, 512, weight_bits, 256), uniform(20, 512, weight_bits, 256, bipolar=True)):
        x = activations(5, 512, BF16)
        check(bit_serial.matmul_bits(x, bit_serial.prepare(part), bits, bipolar), x, part, bits, bipolar)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 17])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 33), (17, 300), (48, 2880)])
def test_any_shape(tokens: int, rows: int, columns: int, host: host_cuda.Host) -> None:
    part = uniform(rows, columns, 2, columns)
    x = activations(tokens, columns, BF16)
    y = bit_serial.matmul_bits(x, bit_serial.prepare(part), 2)
    assert y.shape == (tokens, rows)
    check(y, x, part, 2, False)


def test_other_types_and_strides(host: host_cuda.Host) -> None:
    part, x = uniform(20, 256, 2, 256), activations(6, 256, FP16)[3:]
    weight = bit_serial.prepare(part)
    y = bit_serial.matmul_bits(x, weight, 4)
    check(y, x, part, 4, False)
    assert torch.equal(bit_serial.matmul_bits(x.T.contiguous().T, weight, 4), y)
    assert torch.equal(bit_serial.matmul_bits(x.unsqueeze(1), weight, 4).squeeze(1), y)


def test_the_largest_sums(host: host_cuda.Host) -> None:
    part = uniform(16, 32768, 8, 32768)
    part = replace(part, codes=torch.full_like(part.codes, 255), scale=torch.ones_like(part.scale))
    x = torch.ones(1, 32768, dtype=BF16)
    check(bit_serial.matmul_bits(x, bit_serial.prepare(part), 8), x, part, 8, False)


def test_bits_lie_where_the_fragments_say() -> None:
    codes = torch.randint(0, 8, (40, 600), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = tile_bits(codes, 3)
    assert words.shape == (3, 3, 3, 32, 4)
    plain = torch.nn.functional.pad(planes(codes, 3), (0, 24 - 19, 0, 48 - 40))  # (bits, rows, words)
    for lane in (0, 5, 31):
        for r in range(4):
            row, word = lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)
            assert torch.equal(words[:, :, :, lane, r], plain[:, row::16, word::8].permute(1, 2, 0))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (uniform(16, 256, 4, 128), "groups of 128"),
        (uniform(16, 256, 4, 256, zero=True), "zero points"),
        (uniform(16, 256, 4, 256, offset=True), "offsets"),
        (uniform(1, 1 << 16, 1, 1 << 16), "up to 32768"),
    ],
)
def test_weights_that_do_not_fit(part: Uniform, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        bit_serial.prepare(part)


def test_activations_that_do_not_fit() -> None:
    weight = bit_serial.prepare(uniform(16, 256, 4, 256))
    for x, bits in ((torch.ones(1, 256), 4), (torch.ones(1, 255, dtype=BF16), 4), (torch.ones(1, 256, dtype=BF16), 9)):
        with pytest.raises(KernelError, match="expected"):
            bit_serial.matmul_bits(x, weight, bits)


def test_rounded_activations_are_near() -> None:
    x = activations(8, 100, BF16)[3:]
    for bits in range(2, 9):
        error = (bit_serial.rounded(x, bits, False) - x.float()).abs().amax(1) / x.float().abs().amax(1)
        assert float(error.max()) <= 0.5001 / (2 ** (bits - 1) - 1)
        error = (bit_serial.rounded(x, bits, True) - x.float()).abs().amax(1) / x.float().abs().amax(1)
        assert float(error.max()) <= 0.5001 / 2 ** (bits - 1)
