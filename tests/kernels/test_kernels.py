"""The law of kernels: the product from packed tensors is the product with the decoded weight, for every file of the folder."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import host_cuda
import pytest
import torch
from kernel_parts import uniform
from pruned_parts import mask, pruned
from torch import Tensor
from weights import random_weight

import compress.kernels
from compress.checkpoint import packing
from compress.kernels import int4_cpu, torch_reference, weight_only
from compress.kernels.kernel import Use
from compress.weights.weight import CompressedWeight

Packed = tuple[dict[str, Tensor], dict[str, Any]]


def int4(x: Tensor, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    return int4_cpu.matmul(x, spec, int4_cpu.prepare(spec, tensors))


# Each kernel as x (..., in), spec, tensors -> (..., out); the dtypes that it takes; what it supports.
KERNELS: dict[str, tuple[Callable[..., Tensor], tuple[torch.dtype, ...], Callable[[Mapping[str, Any]], bool]]] = {
    "torch_reference": (torch_reference.matmul, (torch.float64, torch.float32, torch.bfloat16, torch.float16), lambda spec: True),
    "int4_cpu": (int4, (torch.bfloat16,), int4_cpu.supports),
    # On the CPU, see host.h.
    "weight_only": (weight_only.matmul, (torch.bfloat16,), lambda spec: weight_only.reason(spec) is None),
}
ON_HOST = ("weight_only",)
# Tests of their own cover these.
OTHERS = {"sparse_rows", "round_columns", "nearest", "int8", "bit_serial", "mixed", "experts", "masked", "low_rank", "kernel"}


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    kinds = [(bits, kind) for bits in range(1, 9) for kind in ("SYMMETRIC" if bits > 1 else "HALF", "ZERO")]
    return host_cuda.Host(*(weight_only.instance("wqmm", torch.bfloat16, bits, kind, False, 8) for bits, kind in kinds))


@pytest.fixture(autouse=True)
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for a GPU run on the CPU."""
    if request.node.callspec.params.get("kernel") in ON_HOST if hasattr(request.node, "callspec") else False:
        request.getfixturevalue("compiled").install(monkeypatch)


WEIGHTS = {
    f"{rows}x{columns} {bits} bits, group {group_size}{', zeros' * zero}{', scattered' * scattered}": (
        rows,
        columns,
        bits,
        group_size,
        zero,
        scattered,
    )
    for rows, columns, bits, group_size, zero, scattered in (
        *((48, 64, bits, 32, zero, scattered) for bits in range(1, 9) for zero in (False, True) for scattered in (False, True)),
        *((64, 512, 4, group_size, False, False) for group_size in (16, 32, 64, 128, 256, 512, -1)),
        *((rows, columns, bits, columns, True, False) for rows, columns, bits in ((1, 1, 3), (5, 7, 5), (33, 9, 1), (40, 31, 8))),
    )
}


def activations(columns: int, rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(y: Tensor, x: Tensor, weight: CompressedWeight) -> None:
    """Compare with the exact product, entry by entry.

    Products and the weight are rounded to the dtype of x, sums are kept in float32 or better; so an entry is off by at most a few
    units in the last place of the largest sum that its terms can make.
    """
    decoded = weight.dequantize().double()
    exact, largest = x.double() @ decoded.T, x.double().abs() @ decoded.T.abs()
    assert y.dtype == x.dtype
    assert bool(((y.double() - exact).abs() <= 4 * torch.finfo(x.dtype).eps * largest).all())


def test_every_kernel_of_the_folder_is_under_the_law() -> None:
    assert {kernel for kernel, _ in CASES} == set(KERNELS)
    assert set(KERNELS) | OTHERS == {
        m.name for m in pkgutil.iter_modules(compress.kernels.__path__) if not m.name.startswith("_")
    }


CASES = [
    (kernel, kind)
    for kind, of in WEIGHTS.items()
    for kernel in KERNELS
    if KERNELS[kernel][2](packing.pack(random_weight(*of))[1])
]


@pytest.mark.parametrize(("kernel", "kind"), CASES)
def test_the_law(kernel: str, kind: str) -> None:
    multiply, dtypes, _ = KERNELS[kernel]
    weight = random_weight(*WEIGHTS[kind])
    tensors, spec = packing.pack(weight)
    for dtype in dtypes:
        x = activations(weight.shape[1], dtype=dtype)
        close(multiply(x, spec, tensors), x, weight)


@pytest.mark.parametrize("kernel", KERNELS)
def test_leading_axes_and_no_rows(kernel: str) -> None:
    multiply, dtypes, _ = KERNELS[kernel]
    weight = random_weight(32, 64)
    tensors, spec = packing.pack(weight)
    x = activations(64, 6, dtypes[-1])
    whole = multiply(x, spec, tensors)
    assert torch.equal(multiply(x.reshape(2, 1, 3, 64), spec, tensors), whole.reshape(2, 1, 3, 32))
    assert multiply(x[0], spec, tensors).shape == (32,)
    assert multiply(x[:0], spec, tensors).shape == (0, 32)
    close(multiply(x.T.contiguous().T, spec, tensors), x, weight)


@pytest.mark.parametrize("chunk", [1, 32 * 40, 64 * 40])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [False, True])
def test_chunks_are_the_whole(chunk: int, bits: int, zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 40 columns do not end on words; the unit matrix takes each weight through one product, so nothing is rounded."""
    weight = random_weight(101, 40, bits, 8, zero)
    tensors, spec = packing.pack(weight)
    monkeypatch.setattr(torch_reference, "_CHUNK", chunk)
    assert torch.equal(torch_reference.matmul(torch.eye(40), spec, tensors), weight.dequantize().T)
    x = activations(40)
    close(torch_reference.matmul(x, spec, tensors), x, weight)


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_reference, "_CHUNK", 64 * 32)
    seen = []
    unpack_rows = packing.unpack_rows

    def counted(spec: Any, tensors: Any, start: int, stop: int) -> CompressedWeight:
        seen.append((start, stop))
        return unpack_rows(spec, tensors, start, stop)

    monkeypatch.setattr(packing, "unpack_rows", counted)
    tensors, spec = packing.pack(random_weight(100, 64))
    torch_reference.matmul(activations(64), spec, tensors)
    assert seen == [(0, 32), (32, 64), (64, 96), (96, 100)]


# --- torch's int4 kernel


@pytest.mark.parametrize("group_size", int4_cpu.GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 33, 100])
def test_int4_takes_each_of_its_group_sizes(group_size: int, rows: int) -> None:
    weight = random_weight(80, 512, 4, group_size)
    tensors, spec = packing.pack(weight)
    assert int4_cpu.supports(spec)
    x = activations(512, rows, torch.bfloat16)
    close(int4(x, spec, tensors), x, weight)


@pytest.mark.parametrize(
    ("refused", "weight"),
    [
        ("5 bits", random_weight(32, 64, 5)),
        ("offsets", CompressedWeight(uniform(32, 64, 3, 32, offset=True))),
        ("bipolar integers of 4 bits", CompressedWeight(uniform(32, 64, 4, 32, bipolar=True))),
        ("zero points", random_weight(32, 64, 4, 32, zero=True)),
        ("scattered groups", random_weight(32, 64, 4, 32, desc_act=True)),
        ("groups of 16", random_weight(32, 64, 4, 16)),
        ("a whole row of 96", random_weight(32, 96, 4, -1)),
        ("24 outputs", random_weight(24, 64)),
    ],
)
def test_int4_refuses(refused: str, weight: CompressedWeight) -> None:
    assert not int4_cpu.supports(packing.pack(weight)[1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_int4_takes_fewer_bits_bipolar_integers_and_masks(bits: int) -> None:
    bases = [uniform(48, 256, bits, 64), *([uniform(48, 256, bits, 128, bipolar=True)] if bits < 4 else [])]
    x = activations(256, 3, torch.bfloat16)
    for base in bases:
        masks = [mask(kind, 48, 256) for kind in ("2:4", "3:4", "single", "runs 16", "single none", "single rows")]
        for weight in (CompressedWeight(base), *(pruned(base, keep) for keep in masks)):
            tensors, spec = packing.pack(weight)
            assert int4_cpu.supports(spec)
            close(int4(x, spec, tensors), x, weight)


def test_int4_pays_for_few_rows_of_bfloat16_on_the_cpu() -> None:
    x = torch.zeros(int4_cpu.MAX_ROWS, 64, dtype=torch.bfloat16)
    assert int4_cpu.pays(Use.of(x))
    assert int4_cpu.pays(Use.of(x[:1]))
    assert int4_cpu.pays(Use.of(x.reshape(1, -1, 64)))
    assert not int4_cpu.pays(Use.of(torch.zeros(int4_cpu.MAX_ROWS + 1, 64, dtype=torch.bfloat16)))
    assert not int4_cpu.pays(Use.of(torch.zeros(2, int4_cpu.MAX_ROWS, 64, dtype=torch.bfloat16)))
    assert not int4_cpu.pays(Use.of(x.float()))
    assert not int4_cpu.pays(Use.of(x.half()))
    assert not int4_cpu.pays(Use.of(x.to("meta")))


def test_int4_leaves_gradients_to_the_reference() -> None:
    """Torch has no derivative of the kernel: what flows through it would be lost."""
    x = torch.zeros(1, 64, dtype=torch.bfloat16, requires_grad=True)
    assert not int4_cpu.pays(Use.of(x))
    with torch.no_grad():
        assert int4_cpu.pays(Use.of(x))
