"""Products with single weights, run on the CPU against the exact product."""

from __future__ import annotations

import host_cuda
import pytest
import torch
from examples.sparse import sparse
from kernel_parts import activations

from compress.errors import KernelError
from compress.kernels import sparse_rows
from compress.weights.sparse import Sparse

DTYPES, COLUMNS = (torch.bfloat16, torch.float16), (torch.uint8, torch.int16, torch.int32)


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    return host_cuda.Host(*(sparse_rows.instance(dtype, columns) for dtype in DTYPES for columns in COLUMNS))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    return compiled.install(monkeypatch)


def check(y: torch.Tensor, x: torch.Tensor, part: Sparse) -> None:
    """Products and sums in float32: off by a few units of 2^-24 of the largest sum."""
    decoded = part.dequantize().double()
    wrong = (y.double() - x.double() @ decoded.T).abs()
    assert y.dtype == torch.float32
    assert bool((wrong <= 2.0**-20 * (x.double().abs() @ decoded.abs().T)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [7, 256, 300, 40000])
@pytest.mark.parametrize(("rows", "share"), [(1, 1.0), (8, 0.0), (19, 0.05), (9, 0.5)])
def test_products(dtype: torch.dtype, columns: int, rows: int, share: float, host: host_cuda.Host) -> None:
    part = sparse(rows, columns, share * (0.01 if columns > 1000 else 1))
    for tokens in (1, 7, 8, 9, 20):
        x = activations(tokens, columns, dtype)
        check(sparse_rows.product_kernel(x, part), x, part)
        check(sparse_rows.product(x, part.pointers, part.columns, part.values), x, part)  # torch's, on a CPU


def test_no_tokens_and_other_strides(host: host_cuda.Host) -> None:
    part, x = sparse(9, 300, 0.1), activations(5, 300, torch.bfloat16)
    y = sparse_rows.product_kernel(x, part)
    assert sparse_rows.product_kernel(x[:0], part).shape == (0, 9)
    wide = torch.full((5, 311), torch.nan, dtype=torch.bfloat16)
    wide[:, 5:305] = x
    assert torch.equal(sparse_rows.product_kernel(wide[:, 5:305], part), y)
    assert torch.equal(sparse_rows.product_kernel(x.T.contiguous().T, part), y)


def test_activations_that_do_not_fit() -> None:
    part = sparse(9, 300, 0.1)
    for x in (torch.zeros(2, 300), torch.zeros(2, 299, dtype=torch.bfloat16), torch.zeros(300, dtype=torch.bfloat16)):
        with pytest.raises(KernelError, match="expected"):
            sparse_rows.product_kernel(x, part)


def test_the_operator() -> None:
    part, x = sparse(9, 300, 0.1), activations(4, 300, torch.bfloat16).view(2, 2, 300)
    arguments = (x, part.pointers, part.columns, part.values)
    torch.library.opcheck(torch.ops.compress.sparse_rows.default, arguments)
    check(sparse_rows.product(*arguments), x.view(4, 300), part)
