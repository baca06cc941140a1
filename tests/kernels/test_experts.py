"""Products of many experts in a few launches, run on the CPU against each expert by itself."""

from __future__ import annotations

import host_cuda
import pytest
import torch
from examples.table import table
from kernel_parts import Part, activations, close, uniform
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import _weights, experts, weight_only

BF16 = torch.bfloat16
# Experts of two widths, some with zero points.
PARTS: list[Part] = [uniform(40, 128, 4 if e % 3 else 3, 64, zero=e % 3 == 1, seed=e) for e in range(7)]


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    kinds = [(4, "ZERO"), (4, "SYMMETRIC"), (3, "SYMMETRIC")]
    return host_cuda.Host(*(weight_only.instance("wqmm", BF16, *kind, False, n) for kind in kinds for n in (8, 16)))


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    return compiled.install(monkeypatch)


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("counts", [[1] * 7, [0, 0, 5, 0, 9, 1, 0], [0] * 6 + [33], [3, 1, 4, 1, 5, 9, 2]], ids=str)
def test_each_expert_gets_its_rows(counts: list[int], host: host_cuda.Host) -> None:
    groups = experts.group({e: _weights.prepare(part) for e, part in enumerate(PARTS)})
    assert sorted(len(group.tiles) for group in groups) == [2, 2, 3]
    rows = sum(counts) + 3  # the last ones are no expert's
    x = activations(rows, 128, BF16)
    launched = len(host.launched)
    y = experts.matmul(x, starts_of(counts), groups, max(counts))
    assert len(host.launched) - launched == 3
    begin = 0
    for count, part in zip(counts, PARTS, strict=True):
        close(y[begin : begin + count], x[begin : begin + count], part)
        begin += count
    assert not y[begin:].any()


def test_no_rows_and_what_does_not_fit(host: host_cuda.Host) -> None:
    groups = experts.group({e: _weights.prepare(part) for e, part in enumerate(PARTS)})
    x, starts = torch.ones(2, 128, dtype=BF16), starts_of([0] * 7)
    assert experts.matmul(x[:0], starts, groups, 0).shape == (0, 40)
    assert not experts.matmul(x, starts, groups, 2).any()
    for wrong in ((x.float(), starts), (x[:, :64], starts), (x, starts.long())):
        with pytest.raises(KernelError, match="expected 16-bit"):
            experts.matmul(*wrong, groups, 2)
    with pytest.raises(KernelError, match="one by one"):
        experts.group({0: _weights.prepare(uniform(16, 128, 4, 64, scattered=True))})
    with pytest.raises(KernelError, match="one by one"):
        experts.group({0: _weights.prepare(uniform(16, 128, 4, 64), 8)})


def test_experts_lie_behind_one_another() -> None:
    """In memory once: each expert's weight is a part of its group's."""
    tables = {e: _weights.prepare(table(40, 2, 64, "nf4", "uint8", seed=e)) for e in range(3)}
    for tiles in (tables, {e: _weights.prepare(part) for e, part in enumerate(PARTS)}):
        for one in experts.group(tiles):
            for i, (number, view) in enumerate(one.tiles.items()):
                assert view.codes.data_ptr() == one.codes[i].data_ptr() == int(one.table[i, 0])
                assert view.meta.data_ptr() == int(one.table[i, 1])
                assert int(one.table[i, 2]) == (0 if view.row_scale is None else view.row_scale.data_ptr())
                assert int(one.table[i, 3]) == number
                assert torch.equal(_weights.decode(view), _weights.decode(tiles[number]))


def test_the_operator() -> None:
    """Its schema, its shapes under torch.compile, and on a CPU its values."""
    several = {e: _weights.prepare(part) for e, part in enumerate(PARTS[:3])} | {
        3: _weights.prepare(table(40, 2, 64, "nf4", "uint8"))
    }
    groups, starts = experts.group(several), starts_of([2, 0, 3, 1])
    x = activations(7, 128, torch.float32)
    y = experts.product(x, starts, groups, 3)
    torch.library.opcheck(torch.ops.compress.experts.default, (x, starts, *vars(experts.ExpertGroups.of(groups)).values(), 3))
    begin = 0
    for number, count in enumerate([2, 0, 3, 1]):
        expected = x[begin : begin + count] @ _weights.decode(several[number]).T
        torch.testing.assert_close(y[begin : begin + count], expected)
        begin += count
    assert not y[begin:].any()
    compiled = torch.compile(lambda x, starts: 2 * experts.product(x, starts, groups, len(x)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, starts), 2 * y)
