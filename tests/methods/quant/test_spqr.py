"""SpQR against a slow reference with loops over rows and groups, what must hold of its results, and its options."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from options import function_of
from problems import damped, loss
from pydantic import ValidationError
from spqr_reference import COMMON, ORDERS, assert_equals_the_reference, leave_one_out, outlier_count, problem
from thorough import times
from torch import Tensor

from compress.calibration.statistics import Hessian
from compress.checkpoint import packing
from compress.errors import CalibrationError
from compress.methods.quant.spqr import METHOD
from compress.methods.solvers.outliers import Order, likely_outliers
from compress.weights.sparse import Sparse
from compress.weights.two_level import TwoLevel, tiles

gptq = function_of("quant/gptq")
spqr = function_of("quant/spqr")

law = settings(max_examples=times(10, 40), deadline=None, derandomize=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_equals_the_reference_code_for_code(bits: int, order: Order) -> None:
    weight, hessian = problem(seed=bits)
    options = {**COMMON, "bits": bits, "order": order, "outlier_threshold": 0.5 if bits < 4 else 0.05 if bits == 4 else 1e-4}
    made = assert_equals_the_reference(weight, hessian, **options)
    assert 0 < outlier_count(made) < 200


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_refinement_equals_the_reference_code_for_code(order: Order, threshold: float | None) -> None:
    weight, hessian = problem(seed=3)
    options = {**COMMON, "bits": 3, "order": order, "outlier_threshold": threshold, "refinements": 2}
    assert_equals_the_reference(weight, hessian, **options)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_any_number_of_rows(rows: int) -> None:
    weight, hessian = problem(rows=rows, columns=16, seed=rows)
    options = {**COMMON, "bits": 3, "order": "grouped", "refinements": 1}
    made = assert_equals_the_reference(weight, hessian, **options)
    assert isinstance(made.base, TwoLevel)
    assert made.base.scale_top.shape == (tiles(rows), 2) == (math.ceil(rows / 16), 2)


@law
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 16),
    bits=st.integers(1, 8),
    limit=st.sampled_from([1e-7, 1e-4, 0.01, 0.3]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_leaving_out_the_ends_of_the_range_says_it_of_all(
    rows: int, size: int, bits: int, limit: float, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight[0] *= 5
    if ties:
        weight = weight.mul(2).round()
        weight[-1] = 1.0
    cost = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    found = likely_outliers(weight, cost, bits, limit)
    assert found.tolist() == [leave_one_out(row.tolist(), cost.tolist(), bits, limit) for row in weight]


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_refinement_lowers_the_damped_loss(threshold: float | None) -> None:
    for seed, bits in itertools.product(range(4), (2, 3)):
        weight, hessian = problem(seed=seed)
        options: dict[str, Any] = {"bits": bits, "group_size": 8, "outlier_threshold": threshold}
        found = [spqr(weight, hessian, refinements=n, **options).weight for n in (0, 1, 2, 5)]
        losses = [loss(weight, made.dequantize(), damped(hessian)) for made in found]
        # An outlier is rounded to bfloat16 again whenever the grid below it moves.
        assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses))
        assert losses[-1] < losses[0]


def test_the_group_aware_order_beats_the_natural_one() -> None:
    means = dict.fromkeys(ORDERS[:2], 0.0)
    for seed in range(8):
        weight, hessian = problem(rows=32, columns=128, tokens=600, seed=seed)
        for order in means:
            made = spqr(weight, hessian, bits=3, order=order, outlier_threshold=None, refinements=1).weight
            means[order] += math.log(loss(weight, made.dequantize(), hessian))
    assert means["grouped"] < means["none"] - 8 * 0.05


def test_it_beats_gptq_in_fewer_bits_where_a_few_weights_are_far_out() -> None:
    ratio = 0.0
    for seed in range(2):
        weight, hessian = problem(rows=64, columns=256, tokens=1000, seed=seed, far=80)
        plain = gptq(weight, hessian, bits=3, group_size=16, symmetric=False).weight
        made = spqr(weight, hessian, target_bits=4.18, refinements=2).weight
        assert made.stored_bits < plain.stored_bits
        ratio += math.log(loss(weight, made.dequantize(), hessian) / loss(weight, plain.dequantize(), hessian)) / 2
    assert ratio < math.log(0.9)


def test_no_tokens_counts_every_weight_alike() -> None:
    weight = problem()[0].float()
    result = spqr(weight, torch.zeros(32, 32), group_size=8, outlier_threshold=0.3)
    assert result.notes["fallback"] == "rtn: no token was seen"
    assert result.notes["dead_columns"] == 32
    assert outlier_count(result.weight) > 0
    same = spqr(weight, torch.eye(32), group_size=8, outlier_threshold=0.3, order="none", refinements=0, damp=0.0)
    assert torch.equal(result.weight.dequantize(), same.weight.dequantize())


def test_a_hessian_that_cannot_be_factored_counts_every_weight_alike() -> None:
    weight, hessian = problem()
    hessian[0, 1] = hessian[1, 0] = 100 * hessian.diagonal().sum()
    result = spqr(weight, hessian, group_size=8)
    assert result.notes["fallback"] == "rtn: the Hessian is not positive definite with damp 10"
    assert json.loads(json.dumps(result.notes)) == result.notes
    raised = spqr(weight, torch.ones(32, 32).double(), group_size=8, damp=0.0)
    assert raised.notes["fallback"] == "damp raised to 0.0001"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, hessian = problem()
    hessian[2, 3] = value
    with pytest.raises(CalibrationError, match="not finite"):
        spqr(weight, hessian, group_size=8)


@pytest.mark.parametrize("order", ORDERS)
def test_scaling_the_hessian_or_the_weight_by_a_power_of_two_changes_no_code(order: Order) -> None:
    weight, hessian = problem()
    options: dict[str, Any] = {"group_size": 8, "order": order, "outlier_threshold": 0.3}
    first = spqr(weight, hessian, **options).weight.dequantize()
    for factor in (2.0**-40, 2.0**-3, 2.0**30):
        assert torch.equal(spqr(weight, hessian * factor, **options).weight.dequantize(), first)
    for factor in (2.0**-12, 2.0**20):
        assert torch.equal(spqr(weight * factor, hessian, **options).weight.dequantize(), first * factor)


def test_single_precision_gives_almost_the_same_codes() -> None:
    weight, hessian = problem(rows=64, columns=128, tokens=600)
    exact, single = spqr(weight, hessian).weight, spqr(weight.float(), hessian.float()).weight
    assert isinstance(exact.base, TwoLevel)
    assert isinstance(single.base, TwoLevel)
    assert (exact.base.codes == single.base.codes).double().mean() > 0.9
    assert math.isclose(loss(weight, single.dequantize(), hessian), loss(weight, exact.dequantize(), hessian), rel_tol=0.02)


def test_given_tensors_are_left_alone_and_precision_too() -> None:
    weight, hessian = problem()
    copies, precision = (weight.clone(), hessian.clone()), torch.get_float32_matmul_precision()
    for order in ORDERS:
        spqr(weight, hessian, group_size=8, order=order, target_bits=8)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    assert torch.get_float32_matmul_precision() == precision


def test_options() -> None:
    assert METHOD().model_dump() == {
        "bits": 3,
        "group_size": 16,
        "scale_bits": 4,
        "zero_bits": 2,
        "outlier_threshold": 1.0,
        "target_bits": None,
        "order": "grouped",
        "damp": 0.01,
        "refinements": 4,
    }
    refused: list[dict[str, Any]] = [
        {"bits": 0},
        {"bits": 9},
        {"group_size": -2},
        {"scale_bits": 1},
        {"zero_bits": 9},
        {"outlier_threshold": 0},
        {"outlier_threshold": math.inf},
        {"target_bits": 0},
        {"target_bits": 33},
        {"order": "static"},
        {"damp": -0.1},
        {"refinements": -1},
        {"nonsense": 1},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError):
            METHOD(**wrong)
    assert METHOD.may_need == (Hessian,)
    assert not METHOD.rows_independent
    assert METHOD().check((8, 96)) is None
    assert "group_size=40" in (METHOD(group_size=40).check((8, 96)) or "")
    complaint = METHOD(target_bits=3.4).check((256, 256))
    assert complaint is not None
    assert "target_bits=3.4 is less than the 3.5312 of the grid alone" in complaint
    assert METHOD(target_bits=3.5313).check((256, 256)) is None


def test_the_method_is_the_function_on_the_mean_hessian() -> None:
    weight = torch.randn(18, 64, generator=torch.Generator().manual_seed(0))
    statistic = Hessian(64, torch.device("cpu"))
    statistic.add(torch.randn(100, 64, generator=torch.Generator().manual_seed(1)))
    options: dict[str, Any] = {"bits": 2, "group_size": 32, "scale_bits": 5, "zero_bits": 3, "refinements": 1, "damp": 0.1}
    for more in ({"outlier_threshold": 0.2, "order": "desc_act"}, {"target_bits": 4.0}):
        made = METHOD(**options, **more)(weight, {Hessian: statistic}).weight
        assert torch.equal(made.dequantize(), spqr(weight, statistic.matrix(), **options, **more).weight.dequantize())


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_returned_is_what_is_stored(order: Order) -> None:
    weight, hessian = problem(rows=50, columns=64)
    made = spqr(weight, hessian, order=order, outlier_threshold=0.3).weight
    tensors, spec = packing.pack(made)
    assert set(tensors) >= {"codes", "scale_code", "outliers_pointers", "outliers_columns", "outliers_values"}
    back = packing.unpack(json.loads(json.dumps(spec)), tensors)
    assert torch.equal(back.dequantize(), made.dequantize())
    assert isinstance(back.outliers, Sparse)
    for start, stop in ((0, 50), (32, 50), (0, 32), (32, 33)):
        assert torch.equal(packing.unpack_rows(spec, tensors, start, stop).dequantize(), made.dequantize()[start:stop])
        assert torch.equal(made.rows(start, stop).dequantize(), made.dequantize()[start:stop])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_is_reloaded_as_it_was_stored(family: str, tiny: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    from runs import compress as run
    from runs import steps
    from tiny import VOCABULARY
    from transformers import AutoModelForCausalLM

    from compress.checkpoint.packed_source import PackedSource

    options = {"group_size": 16, "outlier_threshold": 0.1, "refinements": 1}
    summary = run(tiny(family), tmp_path / "out", ids, steps("quant/spqr", **options))
    source = PackedSource.open_packed(tmp_path / "out")
    weights = {site: source.compressed(site) for site in source.table}
    assert any(weight.outliers is not None for weight in weights.values())
    stored = sum(entry.nbytes for entry in source.packed.values()) * 8
    assert stored == sum(weight.stored_bits for weight in weights.values())
    numbers = sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
    assert summary.values["bits_per_compressed_weight"] == pytest.approx(stored / numbers)

    probe = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))

    def logits(folder: Path) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            result: Tensor = model(probe, use_cache=False).logits
        again = folder.parent / f"{folder.name}-again"
        if not again.exists() and not folder.name.endswith("again"):
            model.save_pretrained(again)
        return result

    first = logits(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out-again"), first)
