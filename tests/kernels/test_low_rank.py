"""Products with low-rank parts: what they add, and the operator."""

from __future__ import annotations

import pytest
import torch
from examples.low_rank import low_rank
from torch import Tensor

from compress.kernels import low_rank as kernel


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_products(dtype: torch.dtype, factors: torch.dtype, tokens: int) -> None:
    """Off by what sums in float32 round; the addend is added, and stays as it is."""
    part, generator = low_rank(20, 48, 5, factors), torch.Generator().manual_seed(1)
    x, addend = torch.randn(tokens, 48, generator=generator).to(dtype), torch.randn(tokens, 20, generator=generator)
    before = addend.clone()
    exact = x.double() @ (part.left.double() @ part.right.double()).T
    for more in (None, addend):
        y = kernel.product(x, part.left, part.right, more)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact + (0 if more is None else more.double()), rtol=1e-4, atol=1e-4)
    assert torch.equal(addend, before)
    assert torch.equal(kernel.product(x.view(1, tokens, 48), part.left, part.right), kernel.product(x, part.left, part.right))


def test_the_operator() -> None:
    part, x = low_rank(20, 48, 5, torch.bfloat16), torch.randn(4, 48)
    torch.library.opcheck(torch.ops.compress.low_rank.default, (x, part.left, part.right, None))
    torch.library.opcheck(torch.ops.compress.low_rank.default, (x, part.left, part.right, torch.randn(4, 20)))

    @torch.compile(fullgraph=True, backend="eager")
    def twice(x: Tensor) -> Tensor:
        return 2 * kernel.product(x, part.left, part.right)

    assert torch.equal(twice(x), 2 * kernel.product(x, part.left, part.right))
