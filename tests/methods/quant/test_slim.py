"""SliM against a slow reference that eliminates columns from the explicit inverse Hessian, and what must hold of its results."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import bits_known, function_of
from problems import damped, loss, problem
from pydantic import ValidationError
from slim_reference import check, part, widths
from thorough import times
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.checkpoint import packing
from compress.errors import CalibrationError
from compress.methods.quant.slim import METHOD, decoded, salient_range
from compress.methods.solvers.uniform_grid import fit

gptq = function_of("quant/gptq")
slim = function_of("quant/slim")

law = settings(max_examples=times(10, 20), deadline=None, derandomize=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["groups", "static"])
@pytest.mark.parametrize("grouping", ["salience", "neighbours"])
def test_equals_the_reference_code_for_code(symmetric: bool, order: str, grouping: str) -> None:
    seen = set()
    for seed, (bits, spread, refinements) in enumerate(
        itertools.product((1, 2, 2.5, 4), (1, 3), (0, 2)) if symmetric else [(2, 1, 2), (2.75, 3, 0), (7.5, 2, 1)]
    ):
        options = {"symmetric": symmetric, "order": order, "grouping": grouping, "bits": bits, "spread": spread}
        seen |= set(check(seed, **options, refinements=refinements))
    assert {1, 2, 3} <= seen  # the examples are of different widths


@pytest.mark.parametrize("order", ["groups", "static"])
@pytest.mark.parametrize("grouping", ["salience", "neighbours"])
def test_balanced_equals_the_reference_code_for_code(order: str, grouping: str) -> None:
    mixed = 0
    for seed, (bits, symmetric, size) in enumerate(itertools.product((1, 2, 3, 8), (True, False), (4, 8))):
        options: dict[str, Any] = {"symmetric": symmetric, "order": order, "grouping": grouping, "bits": bits}
        chosen = check(seed, **options, group_size=size, allocation="balanced", refinements=seed % 2)
        assert sum(chosen) == bits * 32 // size
        mixed += len(set(chosen)) > 1
    assert mixed


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_papers_range_equals_the_reference_code_for_code(symmetric: bool) -> None:
    for seed, (weight, order) in enumerate([(1.0, "groups"), (5.0, "groups"), (5.0, "static")]):
        check(seed, 3, 24, bits=2 + seed % 2, symmetric=symmetric, range="salience", salience_weight=weight, order=order)
    check(9, range="minmax", symmetric=symmetric, refinements=1)


def test_a_salience_weight_of_one_changes_nothing_and_others_do() -> None:
    weight, _ = problem(rows=32, columns=64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = salient_range(weight, 2, 16, False, importance, 1.0)
    # At 1 the mask has no say: any other importance gives the same grid.
    assert torch.equal(one.scale, salient_range(weight, 2, 16, False, importance.flip(0) * 7, 1.0).scale)
    other = salient_range(weight, 2, 16, False, importance, 10.0)
    assert not torch.equal(one.scale, other.scale)
    salient = weight.square() * importance
    grouped = salient.unflatten(1, (-1, 16))
    limit = grouped.mean((0, 2), keepdim=True) + 2 * grouped.std((0, 2), keepdim=True, correction=0)
    mask = (grouped > limit).flatten(1)
    assert 0 < mask.double().mean() < 0.1
    lost = [(weight - decoded(weight, grid, 16)).abs().pow(2.4)[mask].sum() for grid in (one, other)]
    assert lost[1] < lost[0]


def test_ranges_are_stretched_by_a_tenth_at_most_and_may_grow() -> None:
    weight, _ = problem(rows=64, columns=64)
    for bits, symmetric in itertools.product((2, 3, 4), (True, False)):
        cover = fit(weight, bits, 16, symmetric=symmetric, search=False)
        found = salient_range(weight, bits, 16, symmetric, torch.ones(64).double(), 1.0)
        ratio = found.scale.double() / cover.scale.double()
        assert ratio.min() >= 0.9 * (1 - 2**-8)
        assert ratio.max() <= 1.1 * (1 + 2**-8)
        assert (ratio < 0.95).any()
        assert (ratio > 1.0).any()
        assert (found.zero is None) == symmetric


def test_groups_without_salient_elements_are_no_trouble() -> None:
    """The paper's code takes the least element of an empty set there."""
    for weight in (torch.zeros(4, 32), torch.full((4, 32), -0.3), torch.full((4, 32), 1e-30)):
        for symmetric, bits in itertools.product((True, False), (1, 2, 4)):
            result = slim(weight, torch.eye(32), bits=bits, group_size=8, symmetric=symmetric, range="salience")
            assert torch.isfinite(result.weight.dequantize()).all()
            assert result.weight.dequantize().abs().max() <= 2 * weight.abs().max() + 1e-17


def test_one_bit_takes_the_mean_magnitude() -> None:
    """Whatever the sign of the mean: the paper's code takes mean|w| about a centre mean(w), which is right only for mean 0."""
    weight = torch.tensor([[1.0, 3.0, -2.0, -4.0], [9.0, 11.0, 10.0, 10.0]]).double()
    grid = salient_range(weight, 1, 4, True, torch.ones(4).double(), 1.0)
    magnitude = grid.scale.double()[:, 0] / 2
    assert torch.allclose(magnitude, weight.abs().mean(1), rtol=0.11)
    ours = (weight[1] - decoded(weight, grid, 4)[1]).square().sum()
    centre, spread = weight[1].mean(), weight[1].abs().mean()
    theirs = (weight[1] - (torch.where(weight[1] >= centre, 1.0, -1.0) * spread + centre)).square().sum()
    assert ours < 0.1 * theirs


def test_equal_widths_of_neighbours_are_gptq() -> None:
    weight, hessian = problem(rows=20)
    for bits, symmetric, (order, same) in itertools.product(
        (1, 2, 4, 8), (True, False), (("static", "static"), ("groups", "none"))
    ):
        if bits == 1 and not symmetric:
            continue  # our grid of one bit is symmetric in any case
        options: dict[str, Any] = {"bits": bits, "group_size": 8, "symmetric": symmetric}
        base = part(slim(weight, hessian, **options, spread=0, grouping="neighbours", order=order))  # type: ignore[arg-type]
        plain = gptq(weight, hessian, **options, order=same).weight.base  # type: ignore[arg-type]
        assert torch.equal(base.codes, plain.codes)
        assert torch.equal(base.scale, plain.scale)
        assert torch.equal(base.dequantize(), plain.dequantize())


def test_error_against_gptq_at_the_same_bits() -> None:
    """In the mean over layers; each of the three ideas by itself."""
    stages: list[dict[str, Any]] = [
        {"grouping": "neighbours", "allocation": "balanced", "order": "static"},
        {"grouping": "neighbours", "order": "static"},
        {"order": "static"},
        {},
    ]
    for bits in (2, 3):
        gains = torch.zeros(len(stages))
        for seed in range(6):
            weight, hessian = problem(rows=32, columns=96, tokens=600, seed=seed)
            plain = loss(weight, gptq(weight, hessian, bits=bits, group_size=8).weight.dequantize(), hessian)
            for i, stage in enumerate(stages):
                found = loss(weight, slim(weight, hessian, bits=bits, group_size=8, **stage).weight.dequantize(), hessian)
                gains[i] += math.log(found / plain) / 6
        ratios = gains.exp().tolist()
        assert ratios[0] < 1
        assert ratios[1] < ratios[0]
        assert ratios[2] < 0.9 * ratios[1]
        assert ratios[3] < ratios[2]


@law
@given(bits=st.sampled_from([1.5, 2.0, 3.25]), symmetric=st.booleans(), grouped=st.booleans(), seed=st.integers(0, 10**6))
def test_refinement_lowers_the_damped_loss(bits: float, symmetric: bool, grouped: bool, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    losses = []
    for count in (0, 1, 2, 5):
        grouping: Any = "salience" if grouped else "neighbours"
        result = slim(weight, hessian, bits=bits, group_size=8, symmetric=symmetric, grouping=grouping, refinements=count)
        losses.append(loss(weight, result.weight.dequantize(), damped(hessian)))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))


def test_block_does_not_change_the_codes() -> None:
    weight, hessian = problem(rows=16, columns=144)
    options: dict[str, Any] = {"bits": 2.5, "group_size": 24, "symmetric": False}
    for order in ("groups", "static"):
        first = part(slim(weight, hessian, **options, order=order, block=144))  # type: ignore[arg-type]
        for block in (1, 7, 32, 1000):
            base = part(slim(weight, hessian, **options, order=order, block=block))  # type: ignore[arg-type]
            assert torch.equal(base.codes, first.codes)
            assert torch.equal(base.scale, first.scale)


def test_scaling_the_hessian_changes_nothing() -> None:
    weight, hessian = problem(rows=20)
    hessian[:, 3] = hessian[3] = 0
    first = slim(weight, hessian, bits=2, group_size=8)
    for factor in (1e-12, 7.0, 1e9):
        again = slim(weight, hessian * factor, bits=2, group_size=8)
        assert torch.equal(part(again).codes, part(first).codes)
        assert widths(again) == widths(first)


def test_groups_of_equal_salience_do_not_depend_on_the_order_of_columns() -> None:
    weight, hessian = problem(rows=20)
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    first = slim(weight, hessian, bits=2.5, group_size=8, order="static")
    other = slim(weight[:, shuffle], hessian[shuffle][:, shuffle], bits=2.5, group_size=8, order="static")
    assert torch.equal(other.weight.dequantize(), first.weight.dequantize()[:, shuffle])


def test_no_tokens_is_rounding_to_widths_of_least_squared_error() -> None:
    weight = problem()[0].float()
    weight[:, 8:16] *= 20
    result = slim(weight, torch.zeros(32, 32), bits=3, group_size=8)
    assert result.notes["fallback"] == "rtn: no token was seen"
    base = part(result)
    assert base.group is not None
    assert (base.widths[base.group.long()][8:16] > 3).all()
    for g, bits in enumerate(base.widths.tolist()):
        inside = base.group == g
        grid = fit(weight[:, inside], bits, -1, symmetric=True, search=True)
        assert torch.equal(base.dequantize()[:, inside], decoded(weight[:, inside], grid, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, hessian = problem()
    hessian[2, 3] = value
    with pytest.raises(CalibrationError, match="not finite"):
        slim(weight, hessian, group_size=8)


def test_damping_rises_until_the_hessian_can_be_factored() -> None:
    weight, _ = problem()
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = slim(weight, inputs.T @ inputs, group_size=8, damp=0.0)
    assert result.notes["damp"] > 0
    assert "damp raised" in result.notes["fallback"]


def test_given_tensors_are_left_alone() -> None:
    weight, hessian = problem()
    copies = weight.clone(), hessian.clone()
    precision = torch.get_float32_matmul_precision()
    for allocation, grouping in itertools.product(("free", "balanced"), ("salience", "neighbours")):
        slim(weight, hessian, group_size=4, allocation=allocation, grouping=grouping)  # type: ignore[arg-type]
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    assert torch.get_float32_matmul_precision() == precision


def test_options_and_notes() -> None:
    assert METHOD().model_dump() == {
        "bits": 2.0,
        "group_size": "auto",
        "symmetric": True,
        "allocation": "free",
        "spread": 3,
        "grouping": "salience",
        "range": "mse",
        "salience_weight": 1.0,
        "order": "groups",
        "damp": 0.01,
        "refinements": 2,
    }
    refused: list[dict[str, Any]] = [
        {"bits": 0.9},
        {"bits": 8.1},
        {"bits": 2.5, "allocation": "balanced"},
        {"salience_weight": 2.0},
        {"salience_weight": 0.0, "range": "salience"},
        {"spread": -1},
        {"spread": 8},
        {"grouping": "random"},
        {"order": "none"},
        {"group_size": -2},
        {"damp": -0.1},
        {"refinements": -1},
        {"nonsense": 1},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    assert METHOD(salience_weight=2.0, range="salience").salience_weight == 2.0
    assert METHOD.may_need == (Hessian,)
    assert METHOD(group_size=48).check((8, 96)) is None
    assert "group_size=40" in (METHOD(group_size=40).check((8, 96)) or "")
    weight, hessian = problem()
    notes = slim(weight, hessian, bits=2.5, group_size=8).notes
    assert sum(int(bits) * count for bits, count in notes["groups"].items()) == 10
    assert json.loads(json.dumps(notes)) == notes


@pytest.mark.parametrize("rows", [1, 24, 32])
@pytest.mark.parametrize("size", [5, 32, -1])
def test_stored_bits_are_known_beforehand_or_not_announced(rows: int, size: int) -> None:
    columns, known = 160, 0
    hessian = torch.diag(torch.arange(1.0, 161.0).double())
    for symmetric, allocation, grouping, bits in itertools.product(
        (True, False), ("free", "balanced"), ("salience", "neighbours"), (2, 4.3, 6)
    ):
        if allocation == "balanced" and bits != int(bits):
            continue
        options: dict[str, Any] = {"bits": bits, "group_size": size, "symmetric": symmetric, "refinements": 0}
        options |= {"allocation": allocation, "grouping": grouping}
        announced = bits_known(METHOD(**options), (rows, columns))
        weight = slim(problem(rows, columns)[0], hessian, **options).weight
        tensors, spec = packing.pack(weight)
        assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == weight.stored_bits
        assert torch.equal(packing.unpack(spec, tensors).dequantize(), weight.dequantize())
        if announced is not None:
            known += 1
            assert announced == weight.stored_bits
    assert (known > 0) == (rows * (size if size > 0 else columns) % 32 == 0)


def test_one_bit_groups_take_one_bit() -> None:
    """The paper's files give them two."""
    weight, hessian = problem(rows=32, columns=256)
    base = part(slim(weight, hessian, bits=2, group_size=16, grouping="neighbours"))
    assert base.counts[0] > 0
    codes = sum(
        t.nbytes * 8 for name, t in packing.pack(slim(weight, hessian, group_size=16).weight)[0].items() if "codes" in name
    )
    assert codes == 2 * weight.numel()


def test_the_method_is_the_function_on_the_mean_hessian() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    statistic = Hessian(64, torch.device("cpu"))
    statistic.add(torch.randn(100, 64, generator=torch.Generator().manual_seed(1)))
    base = METHOD(bits=2.5, group_size=8)(weight, {Hessian: statistic}).weight
    assert torch.equal(base.dequantize(), slim(weight, statistic.matrix(), bits=2.5, group_size=8).weight.dequantize())


@pytest.mark.parametrize("options", [{"bits": 2.5}, {"bits": 2, "symmetric": False, "allocation": "balanced"}], ids=str)
def test_a_compressed_model_is_what_was_measured(tiny: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """Loaded with transformers, saved and loaded again: the same logits; on disk the bits that the report counts."""
    from runs import compress, ids_file, steps
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    compress(tiny("llama"), out, ids_file(tmp_path / "ids.npy"), steps("quant/slim", group_size=4, **options))
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "stored_bits" in row]
    tensors: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    for row in rows:
        bytes_on_disk = sum(t.nbytes for name, t in tensors.items() if name.startswith(row["site"] + "."))
        assert bytes_on_disk * 8 == row["stored_bits"], row["site"]
    assert len({width for row in rows for width in row["notes"]["groups"]}) > 1
    probe = torch.arange(12).view(1, -1)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        first = model(probe).logits
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        second = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)(probe).logits
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
