"""decoupleQ against its equations written out with loops over rows and groups, and what must hold of its results."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from options import bits_known, function_of
from problems import problem
from torch import Tensor

from compress.methods.quant.decoupleq import METHOD, BestRows, decoded, descended, floats, normal, plane
from compress.methods.solvers.compensated import compensated
from compress.methods.solvers.error_feedback import factorise
from compress.methods.solvers.uniform_grid import stored
from compress.weights.uniform import Uniform, middle

decoupleq = function_of("quant/decoupleq")
gptq = function_of("quant/gptq")

BITS, GROUP = 2, 8


def start(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, Hessian, codes, scales and offsets somewhere on the way, in float64."""
    weight, hessian = problem(5, 24, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    scale = stored(0.02 + 0.04 * torch.rand(5, 3, generator=generator).double())
    offset = (0.02 * torch.randn(5, 3, generator=generator)).bfloat16().double()
    codes = torch.randint(0, 4, weight.shape, generator=generator, dtype=torch.uint8)
    return weight, hessian, codes, scale, offset


def row_error(weight: Tensor, hessian: Tensor, value: Tensor) -> list[float]:
    """tr of D H D^T, one row at a time."""
    return [float((w - q) @ hessian @ (w - q)) for w, q in zip(weight, value, strict=True)]


def spelt(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """s a + o, one number at a time."""
    value = torch.empty(codes.shape, dtype=torch.float64)
    for r, c in itertools.product(*map(range, codes.shape)):
        value[r, c] = (int(codes[r, c]) - middle(BITS)) * scale[r, c // GROUP] + offset[r, c // GROUP]
    return value


def reference_system(
    weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """The normal equations of one row's change, from the derivatives of its value by each float."""
    groups = scale.shape[1]
    by = torch.zeros(2 * groups, weight.shape[1], dtype=torch.float64)
    for c in range(weight.shape[1]):
        by[c // GROUP, c] = int(codes[row, c]) - middle(BITS)
        by[groups + c // GROUP, c] = 1.0
    delta = (weight - spelt(codes, scale, offset))[row]
    return by @ hessian @ by.T, by @ hessian @ delta


def test_least_squares_is_that_of_the_equations() -> None:
    weight, hessian, codes, scale, offset = start()
    matrix, right = normal(weight, hessian, codes, scale, offset, BITS, symmetric=False)
    assert torch.equal(decoded(codes, scale, offset, BITS), spelt(codes, scale, offset))
    for row in range(5):
        expected, wanted = reference_system(weight, hessian, codes, scale, offset, row)
        assert torch.allclose(matrix[row], expected, rtol=1e-12, atol=1e-14)
        assert torch.allclose(right[row], wanted, rtol=1e-12, atol=1e-14)
    small, less = normal(weight, hessian, codes, scale, offset, BITS, symmetric=True)
    assert torch.equal(small, matrix[:, :3, :3])
    assert torch.equal(less, right[:, :3])


def test_floats_beat_any_neighbour_and_their_roundings() -> None:
    """No change of one float to a neighbouring bfloat16 helps, and rounding each by itself is worse in the mean."""
    better = []
    for seed in range(6):
        weight, hessian, codes, scale, offset = start(seed)
        found = floats(weight, hessian, codes, scale, offset, BITS, symmetric=False)
        errors = row_error(weight, hessian, spelt(codes, *found))
        before = row_error(weight, hessian, spelt(codes, scale, offset))
        assert all(a <= b for a, b in zip(errors, before, strict=True))
        assert all(torch.equal(x, x.bfloat16().double()) for x in found)
        for row in range(5):
            matrix, right = reference_system(weight, hessian, codes, scale, offset, row)
            exact = torch.cat([scale[row], offset[row]]) + torch.linalg.solve(matrix, right)
            plain = exact.bfloat16().double()
            alone = row_error(weight[row : row + 1], hessian, spelt(codes[row : row + 1], plain[None, :3], plain[None, 3:]))[0]
            ideal = row_error(weight[row : row + 1], hessian, spelt(codes[row : row + 1], exact[None, :3], exact[None, 3:]))[0]
            assert ideal <= errors[row] * (1 + 1e-9)
            better.append(math.log((errors[row] - ideal) / (alone - ideal)))
    assert sum(better) / len(better) < math.log(0.8)


def test_rounding_makes_up_for_what_was_rounded_before() -> None:
    """`plane` against a loop over rows that minimises each unknown given those already rounded."""
    weight, hessian, codes, scale, offset = start(3)
    matrix, right = normal(weight, hessian, codes, scale, offset, BITS, symmetric=False)
    best = torch.cat([scale, offset], 1) + torch.linalg.solve(matrix, right)
    found = plane(best, torch.linalg.cholesky(matrix), 3)
    for row in range(5):
        fixed: dict[int, Tensor] = {}
        for k in reversed(range(6)):
            # The unknowns below k are free: given the rounded ones, the best values of all others.
            free, done = list(range(k + 1)), sorted(fixed)
            error = torch.stack([fixed[j] - best[row, j] for j in done]) if done else best.new_zeros(0)
            shift = torch.linalg.solve(matrix[row][free][:, free], matrix[row][free][:, done] @ error)
            fixed[k] = (best[row, k] - shift[k]).bfloat16().double()
            assert float(fixed[k]) == float(found[row, k])


@pytest.mark.parametrize("symmetric", [True, False])
def test_result_is_that_of_the_rule_written_out(symmetric: bool) -> None:
    """Codes and floats equal those of the alternation spelt out row by row, without polish; and more rounds never cost."""
    weight, hessian = problem(5, 24)
    found = decoupleq(weight, hessian, bits=BITS, group_size=GROUP, symmetric=symmetric, rounds=3, refinements=0).weight.base
    factor = factorise(hessian, 0.01, descending=True)
    begin = decoupleq(weight, hessian, bits=BITS, group_size=GROUP, symmetric=symmetric, rounds=0, refinements=0).weight.base
    assert isinstance(found, Uniform)
    assert isinstance(begin, Uniform)

    def wide(base: Uniform) -> tuple[Tensor, Tensor]:
        scale = base.scale.double()
        return scale, torch.zeros_like(scale) if base.offset is None else base.offset.double()

    codes, (scale, offset) = begin.codes.clone(), wide(begin)
    for _ in range(3):
        for row in range(5):
            one = slice(row, row + 1)
            new = floats(weight[one], factor.hessian, codes[one], scale[one], offset[one], BITS, symmetric=symmetric)
            now, was = spelt(codes[one], *new), spelt(codes[one], scale[one], offset[one])
            if row_error(weight[one], factor.hessian, now) < row_error(weight[one], factor.hessian, was):
                scale[one], offset[one] = new
            better = rounded(weight[row], factor.hessian, scale[row], offset[row])[None]
            now, was = spelt(better, scale[one], offset[one]), spelt(codes[one], scale[one], offset[one])
            if row_error(weight[one], factor.hessian, now) < row_error(weight[one], factor.hessian, was):
                codes[one] = better
    assert torch.equal(found.codes, codes)
    assert torch.equal(wide(found)[0], scale)
    assert torch.equal(wide(found)[1], offset)


def rounded(weight: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Codes of one row by elimination in descending order of the diagonal: GPTQ by the inverse of what is left."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    left, codes = weight.clone(), torch.empty(len(weight), dtype=torch.uint8)
    while order:
        column, group = order[0], order[0] // GROUP
        inverse = torch.linalg.inv(hessian[order][:, order])
        code = ((left[column] - offset[group]) / scale[group]).round().clamp(-2, 1)
        error = (left[column] - code * scale[group] - offset[group]) / inverse[0, 0]
        left[order] -= error * inverse[:, 0]
        codes[column] = int(code) + 2
        order = order[1:]
    return codes


def test_error_falls_with_every_round_and_is_below_gptq() -> None:
    gains = []
    for seed in range(4):
        weight, hessian = problem(rows=16, columns=48, seed=seed)
        objective = factorise(hessian, 0.01, descending=True).hessian

        errors = []
        for rounds, passes in ((0, 0), (1, 0), (2, 0), (4, 0), (4, 1), (4, 4)):
            found = decoupleq(weight, hessian, bits=BITS, group_size=16, rounds=rounds, refinements=passes).weight
            errors.append(torch.tensor(row_error(weight, objective, found.dequantize().double())))
        for more, less in itertools.pairwise(errors):
            assert (less <= more * (1 + 1e-6)).all()
        theirs = gptq(weight, hessian, bits=BITS, group_size=16, symmetric=False).weight.dequantize().double()
        gains.append(math.log(errors[-1].sum() / sum(row_error(weight, objective, theirs))))
    assert sum(gains) / 4 < math.log(0.95)


def test_descent_keeps_the_offsets_and_lowers_the_error() -> None:
    weight, hessian, codes, scale, offset = start(2)
    found = descended(weight, hessian, codes, scale, offset, BITS)
    assert torch.equal(found[2], offset)
    assert sum(row_error(weight, hessian, spelt(*found))) < sum(row_error(weight, hessian, spelt(codes, scale, offset)))


def test_a_row_keeps_what_is_better_for_itself() -> None:
    weight = torch.zeros(2, 8, dtype=torch.float64)
    codes, scale = torch.full((2, 8), 2, dtype=torch.uint8), torch.ones(2, 1).double()
    offset = torch.tensor([[0.0], [1.0]]).double()
    kept = BestRows(lambda *now: (weight - decoded(*now, BITS)).square().sum(1), codes, scale, offset)
    assert kept.offer(codes, scale * 2, offset.flip(0))  # better for the second row only
    assert kept.offset.tolist() == [[0.0], [0.0]]
    assert kept.scale.tolist() == [[1.0], [2.0]]
    assert kept.lost.tolist() == [0.0, 0.0]
    assert not kept.offer(codes, scale, offset)


def test_groups_whose_codes_are_alike_leave_a_direction_free_and_stay_finite() -> None:
    weight, hessian, codes, scale, offset = start()
    codes[:, :GROUP] = 3
    new = floats(weight, hessian, codes, scale, offset, BITS, symmetric=False)
    assert all(x.isfinite().all() and x.abs().max() < 10 for x in new)
    for constant in (0.0, -0.3):
        result = decoupleq(torch.full((3, 24), constant), hessian.float(), bits=BITS, group_size=GROUP)
        assert (result.weight.dequantize() - constant).abs().max() <= abs(constant) * 2**-8


def test_without_tokens_the_hessian_is_the_identity() -> None:
    weight, hessian = problem(5, 24)
    result = decoupleq(weight, torch.zeros_like(hessian), bits=BITS, group_size=GROUP)
    assert result.notes["fallback"] == "rtn: no token was seen"
    plain = decoupleq(weight, torch.eye(24).double(), bits=BITS, group_size=GROUP, damp=0.0, refinements=0)
    assert torch.equal(result.weight.dequantize(), plain.weight.dequantize())


@pytest.mark.parametrize(("symmetric", "bits"), list(itertools.product([True, False], [1, 2, 4, 8])))
def test_stored_as_announced(symmetric: bool, bits: int) -> None:
    weight, hessian = problem(5, 24)
    made = METHOD(bits=bits, group_size=GROUP, symmetric=symmetric)
    result = decoupleq(weight, hessian, **made.model_dump())
    assert isinstance(result.weight.base, Uniform)
    assert (result.weight.base.offset is None) == symmetric
    assert bits_known(made, (5, 24)) == result.weight.stored_bits


def test_start_is_gptqs_solution() -> None:
    """On symmetric grids, without rounds, the codes are GPTQ's before its refinements, and `compensated` is GPTQ."""
    weight, hessian = problem(5, 24)
    theirs = gptq(weight, hessian, bits=BITS, group_size=GROUP, refinements=0).weight.base
    mine = decoupleq(weight, hessian, bits=BITS, group_size=GROUP, symmetric=True, rounds=0, refinements=0).weight.base
    assert torch.equal(mine.codes, theirs.codes)
    assert torch.equal(mine.scale, theirs.scale)
    for symmetric in (True, False):
        whole = gptq(weight, hessian, bits=3, group_size=GROUP, symmetric=symmetric).weight.base
        codes, grid, _ = compensated(weight, hessian, 3, GROUP, symmetric=symmetric)
        assert torch.equal(codes, whole.codes)
        assert torch.equal(grid.scale, whole.scale)
        assert (grid.zero is None) == symmetric
        assert symmetric or torch.equal(grid.zero, whole.zero)
