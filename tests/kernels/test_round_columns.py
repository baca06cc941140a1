"""The kernel that rounds column after column, run on the CPU; and the solver on top of it."""

from __future__ import annotations

from dataclasses import dataclass

import host_cuda
import pytest
import torch
from options import function_of
from torch import Tensor

from compress.errors import KernelError
from compress.kernels import round_columns
from compress.methods.solvers import error_feedback as _solver
from compress.methods.solvers import operators
from compress.methods.solvers.operators import columns_by_torch, nearest_step
from compress.methods.solvers.uniform_grid import nearest

gptq = function_of("quant/gptq")


@pytest.fixture(scope="module")
def compiled() -> host_cuda.Host:
    return host_cuda.Host(round_columns.instance())


@pytest.fixture
def host(compiled: host_cuda.Host, monkeypatch: pytest.MonkeyPatch) -> host_cuda.Host:
    compiled.seed = 0
    return compiled.install(monkeypatch)


@dataclass
class Case:
    target: Tensor
    delta: Tensor
    steps: Tensor
    feedback: Tensor
    scale: Tensor
    inverse: Tensor
    low: Tensor
    high: Tensor
    groups: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        written = (self.target.clone(), self.delta.clone(), torch.full_like(self.steps, torch.nan))
        return (*written, self.feedback, self.scale, self.inverse, self.low, self.high, self.groups)


def case(columns: int, rows: int, groups: int = 3, seed: int = 0) -> Case:
    """Random weights, errors before these columns, feedback as strong as what it acts on, and grids of all kinds by group."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(columns, rows)
    scale = normal(groups, rows) / 4
    zero = torch.randint(0, 16, (groups, rows), generator=generator).float()
    zero[0] = 7.5  # halves of odd integers
    low, high = -zero, 15 - zero
    if groups > 1:
        low[1], high[1] = -0.5, 0.5  # one bit
    feedback = torch.full((columns, columns), torch.nan)  # what is not below the diagonal is not read
    lower = torch.ones(columns, columns).tril(-1).bool()
    feedback[lower] = normal(int(lower.sum())) * columns**-0.5
    index = torch.randint(0, groups, (columns,), generator=generator)
    target = weight + normal(columns, rows) / 8
    return Case(target, weight, torch.empty_like(weight), feedback, scale, scale.reciprocal(), low, high, index)


def check(c: Case, target: Tensor, delta: Tensor, steps: Tensor) -> None:
    """Replay in float64, with the errors that were made: sums, nearest steps and errors follow from one another."""
    feedback = c.feedback.double().tril(-1).nan_to_num()
    wanted = c.target.double() + feedback @ delta.double()
    torch.testing.assert_close(target.double(), wanted, rtol=1e-5, atol=1e-5)
    scale = c.scale[c.groups].double()
    torch.testing.assert_close(delta.double(), c.delta.double() - steps.double() * scale, rtol=1e-6, atol=1e-6)
    low, high = c.low[c.groups], c.high[c.groups]
    assert bool(((steps >= low) & (steps <= high)).all())
    assert torch.equal((steps - low).round(), steps - low)
    ideal = (target.double() / scale).clamp(low.double(), high.double())
    assert float((steps.double() - ideal).abs().max()) <= 0.5 + 1e-5


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 100, 127, 128])
@pytest.mark.parametrize("rows", [1, 31, 33, 64])
def test_columns_follow_from_one_another(columns: int, rows: int, host: host_cuda.Host) -> None:
    c = case(columns, rows, seed=columns)
    host.seed = rows
    arguments = c.arguments()
    round_columns.round_columns_kernel(*arguments)
    check(c, *arguments[:3])
    # Sums in the same order: the same steps, but for weights that lie between two of them to the last bit.
    plain = c.arguments()
    columns_by_torch(*plain)
    check(c, *plain[:3])
    assert float((plain[2] != arguments[2]).float().mean()) < 1e-3


def test_views_of_larger_tensors(host: host_cuda.Host) -> None:
    c = case(40, 33)
    arguments = c.arguments()
    round_columns.round_columns_kernel(*arguments)
    wide = torch.full((40, 50), torch.nan), torch.full((40, 50), torch.nan)
    wide[0][:, 7:40], wide[1][:, 7:40] = c.target, c.delta
    large = torch.full((90, 77), torch.nan)
    large[5:45, 20:60] = c.feedback
    steps = torch.empty_like(c.steps)
    rest = (c.scale, c.inverse, c.low, c.high, c.groups)
    round_columns.round_columns_kernel(wide[0][:, 7:40], wide[1][:, 7:40], steps, large[5:45, 20:60], *rest)
    assert torch.equal(steps, arguments[2])
    assert torch.equal(wide[0][:, 7:40], arguments[0])
    assert all(bool(w[:, :7].isnan().all() and w[:, 40:].isnan().all()) for w in wide)
    round_columns.round_columns_kernel(*c.arguments()[:3], c.feedback.T.contiguous().T, *rest)


def test_what_does_not_fit() -> None:
    c = case(129, 4)
    with pytest.raises(KernelError, match="up to 128"):
        round_columns.round_columns_kernel(*c.arguments())
    c = case(4, 4)
    with pytest.raises(KernelError, match="float32"):
        round_columns.round_columns_kernel(c.target.double(), *c.arguments()[1:])
    with pytest.raises(KernelError, match="contiguous"):
        round_columns.round_columns_kernel(*c.arguments()[:4], c.scale.T.contiguous().T, *c.arguments()[5:])


def test_nearest_steps_are_those_of_the_grids() -> None:
    scaled = torch.linspace(-10, 10, 4001)
    for low, high in ((-8.0, 7.0), (-7.5, 7.5), (-0.5, 0.5), (-3.0, 12.0)):
        mine = nearest_step(scaled, torch.tensor(low), torch.tensor(high))
        theirs = nearest(scaled.clone(), low, high)
        apart = (mine - theirs).abs() > 0  # on a tie either side will do
        assert bool(((scaled - mine).abs() == (scaled - theirs).abs())[apart].all())


def test_the_operator() -> None:
    torch.library.opcheck(torch.ops.compress.round_columns.default, case(5, 4).arguments(), test_utils="test_schema")
    c = case(5, 4)
    arguments = c.arguments()
    operators.round_columns(*arguments)
    check(c, *arguments[:3])


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"order": "none"}, {"order": "desc_act"}, {"bits": 1}], ids=str)
def test_the_solver_gives_the_same_codes(
    options: dict[str, object], host: host_cuda.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ with the kernel in the place of the loop over columns."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, 256, generator=generator), torch.randn(300, 256, generator=generator)
    x[:, 1:] += x[:, :-1]
    hessian = x.T @ x / len(x)
    plain = gptq(weight, hessian, bits=int(options.pop("bits", 4)), group_size=64, **options)  # type: ignore[arg-type]
    launched = len(host.launched)
    monkeypatch.setattr(_solver, "_joined", lambda target: True)
    monkeypatch.setattr(_solver, "round_columns", round_columns.round_columns_kernel)
    joined = gptq(weight, hessian, bits=plain.weight.base.bits, group_size=64, **options)  # type: ignore[arg-type, attr-defined]
    assert len(host.launched) > launched
    same = plain.weight.base.codes == joined.weight.base.codes  # type: ignore[attr-defined]
    assert float(same.float().mean()) > 0.999
