"""Equalization: the loss against loops in float64, outliers that were planted are taken out, special inputs, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compress as run
from runs import steps
from tiny import VOCABULARY
from torch import Tensor

from compress.calibration.statistics import Hessian, Statistics, Stats
from compress.methods.block import Scalable, TransformResult
from compress.methods.method import Method
from compress.methods.quant.gptq import GPTQ
from compress.methods.quant.rtn import RTN
from compress.methods.solvers.error_feedback import factorise
from compress.methods.transform.equalize import Equalize, loss
from compress.methods.transform.equalize import _Rounding as Rounding
from compress.report.rows import read_rows

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
GPTQ4 = GPTQ(bits=4, group_size=16)


class OneNorm:
    """A block of a norm and two linears that read it."""

    def __init__(self, norm: Tensor, weights: dict[str, Tensor], rows: Tensor, rounding: Method = GPTQ4) -> None:
        self._norm, self._weights, self._rows, self._rounding = norm, weights, rows, rounding
        self.sites = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        self.scalables = [Scalable("norm.weight", tuple(weights))]

    def weight(self, site: str) -> Tensor:
        return self._weights[site]

    def others(self) -> dict[str, Tensor]:
        return {"norm.weight": self._norm}

    def stored(self, name: str, value: Tensor) -> Tensor:
        return value.float()

    def rounding(self, site: str) -> Method:
        return self._rounding

    def observe_in_turn(self, kinds: Sequence[type[Statistics]]) -> Iterator[tuple[tuple[str, ...], Stats]]:
        hessian = Hessian(self._rows.shape[1], CPU)
        hessian.add(self._rows)
        yield tuple(self._weights), {Hessian: hessian}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, columns: int) -> Tensor:
    return drawn(tokens, columns) @ (torch.eye(columns, dtype=torch.float64) + 0.3 * drawn(columns, columns, seed=1))


def test_the_loss_is_the_sum_over_groups_of_steps_and_pivots() -> None:
    weight, scales, costs = drawn(5, 12), drawn(12, seed=1).exp(), drawn(12, seed=2).exp()
    expected = 0.0
    for start in range(0, 12, 4):
        for row in weight.tolist():
            top = sum(abs(row[j] * float(scales[j])) ** 8 for j in range(start, start + 4)) ** (1 / 8)
            step = 2 * top / (2**3 - 1)
            expected += step**2 / 12 * sum(float(costs[k] / scales[k] ** 2) for k in range(start, start + 4))
    assert float(loss(scales, costs, weight.pow(8), Rounding(3, 4, True, True))) == pytest.approx(expected, rel=1e-9)


def test_pivots_of_a_scaled_hessian_are_those_of_the_hessian_over_the_scales() -> None:
    rows, scales = correlated(200, 16), drawn(16, seed=3).mul(0.3).exp()
    hessian = rows.T @ rows / 200
    plain = factorise(hessian, 0.0, descending=False)
    scaled = factorise(hessian / scales / scales.unsqueeze(1), 0.0, descending=False)
    assert torch.allclose(scaled.pivots * scaled.mean**0.5, plain.pivots * plain.mean**0.5 / scales, rtol=1e-10)


def equalized(rows: Tensor, weights: dict[str, Tensor], rounding: Method = GPTQ4) -> tuple[TransformResult, Tensor]:
    norm = torch.ones(rows.shape[1])
    block = OneNorm(norm, {name: weight.float() for name, weight in weights.items()}, rows.float(), rounding)
    result = Equalize()(block)  # type: ignore[arg-type]
    return result, result.others.get("norm.weight", norm)


@pytest.mark.parametrize("rounding", [GPTQ4, GPTQ(bits=3, group_size=-1), RTN(bits=4, group_size=16)])
def test_planted_outliers_are_taken_out(rounding: Method) -> None:
    factors = torch.ones(64, dtype=torch.float64)
    factors[[3, 20, 41]] = 60.0
    rows, plain = correlated(512, 64), {"a": drawn(96, 64, seed=4), "b": drawn(32, 64, seed=5)}
    result, norm = equalized(rows * factors, {name: weight / factors for name, weight in plain.items()}, rounding)
    # The function stays: what the norm gives is divided by what the columns are multiplied with.
    for name, weight in plain.items():
        assert torch.allclose(result.weights[name] * norm, (weight / factors).float(), rtol=1e-5)
    assert result.notes["a"]["strength"] == 1.0
    # What is left is no more than without outliers.
    grid = Rounding.of(rounding)
    assert grid is not None
    seen = (rows * factors).float() * norm
    before = sum(grid.error(weight.float(), (rows.T @ rows).float()) for weight in plain.values())
    after = sum(grid.error(weight, seen.T @ seen) for weight in result.weights.values())
    assert after < 1.1 * before


def test_scales_that_gain_nothing_are_not_moved() -> None:
    result, norm = equalized(drawn(512, 32), {"a": drawn(64, 32, seed=6).sign()})
    assert result.notes["a"] == {"strength": 0.0, "error": 1.0}
    assert not result.weights
    assert torch.equal(norm, torch.ones(32))


@pytest.mark.parametrize("case", ["dead columns", "no weight", "one column counts"])
def test_special_inputs_stay_finite(case: str) -> None:
    rows, weight = correlated(128, 32), drawn(16, 32, seed=7)
    if case == "dead columns":
        rows[:, 5:9] = 0
    elif case == "no weight":
        weight[:] = 0
    else:
        rows[:, 1:] *= 1e-6
    result, norm = equalized(rows, {"a": weight})
    assert bool(norm.isfinite().all())
    assert bool((norm > 0).all())
    for changed in result.weights.values():
        assert bool(changed.isfinite().all())


def test_a_method_without_a_grid_is_refused() -> None:
    class Other(Method):
        """Without a grid."""

    complaint = Equalize().check_before((8, 32), Other())
    assert complaint is not None
    assert "has no grid with bits and a group size" in complaint
    assert Equalize().check_before((8, 32), GPTQ4) is None
    assert "in=40 is not a multiple of group_size=16" in str(Equalize().check_before((8, 40), GPTQ4))


PROBE = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_a_run_says_what_was_moved_and_reloads(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny(family), out, ids, steps("quant/gptq", bits=3, group_size=16), transforms=[{"method": "transform/equalize"}])
    rows: dict[str, dict[str, Any]] = {row.site: row.notes["transform/equalize"] for row in read_rows(out / "report.jsonl")}
    moved = [note for note in rows.values() if note.get("strength")]
    assert moved
    assert all(note["error"] < 1 for note in moved)
    assert json.loads((out / "summary.json").read_text())["reload"]
