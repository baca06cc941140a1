"""The law of pruning, for every file of `compress/prune` that makes masks: masks exact to the element, finite whatever comes.

That masks and values equal those of a slow reference is tested with each method, in `tests/methods/prune/test_<method>.py`.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from layers import any_inputs, any_weights, inputs, observed, weights
from options import bits_known
from places import ROOT
from pydantic import ValidationError
from torch import Tensor

from compress import registry
from compress.checkpoint import packing
from compress.methods.pruning import Pruning
from compress.weights.mask import Bitmask, Pattern

METHODS = [name for name in registry.names("prune") if issubclass(registry.lookup("prune", name), Pruning)]
TARGETS: dict[str, dict[str, Any]] = {
    "half": {},
    "rows": {"sparsity": 0.3, "within": "row"},
    "matrix": {"sparsity": 0.7, "within": "matrix"},
    "2:4": {"pattern": "2:4"},
    "1:4": {"pattern": "1:4"},
    "5:8": {"pattern": "5:8"},
    "8:16": {"pattern": "8:16"},
    "runs": {"sparsity": 0.5, "group": 8},
    "nothing": {"sparsity": 0.0},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "dense": {},
    "4 bits": {"bits": 4, "group_size": 32},
    "3 bits": {"bits": 3, "symmetric": False, "group_size": -1},
}
every_method = pytest.mark.parametrize("name", METHODS)
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
every_rounding = pytest.mark.parametrize("rounded", ROUNDED.values(), ids=ROUNDED.keys())


def method(name: str, **options: Any) -> Any:
    return registry.lookup("prune", name)(**options)


def call(made: Any, weight: Tensor, rows: Tensor) -> Any:
    return made(weight, observed(rows, made.needs))


def assert_quota(keep: Tensor, made: Any) -> None:
    """What is kept, counted."""
    rows, columns = keep.shape
    target = made.target
    if target.pattern is not None:
        kept, of = target.pattern
        assert bool((keep.view(rows, -1, of).sum(2) == kept).all())
        return
    runs = keep.view(rows, -1, target.group)
    assert bool((runs.all(2) == runs.any(2)).all())
    count = columns // target.group
    if target.within == "row":
        assert bool((runs.all(2).sum(1) == count - math.floor(target.sparsity * count + 1e-6)).all())
    else:
        assert int(runs.all(2).sum()) == rows * count - round(target.sparsity * rows * count)


@every_method
def test_it_has_tests_and_a_recipe_of_its_own(name: str) -> None:
    assert (ROOT / "tests" / "methods" / "prune" / f"test_{name}.py").exists()
    recipes = [path.read_text() for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(f"prune/{name}" in text for text in recipes)


@every_method
@every_target
@every_rounding
def test_quotas_are_met_to_the_element(name: str, target: dict[str, Any], rounded: dict[str, Any]) -> None:
    made = method(name, **target, **rounded)
    for seed, (rows, columns) in enumerate(((24, 96), (7, 64), (33, 160))):
        weight = weights(rows, columns, seed).bfloat16().float()
        result = call(made, weight, inputs(300, columns, seed)).weight
        keep = result.keep.mask()
        assert_quota(keep, made)
        assert isinstance(result.keep, Pattern if target.get("pattern", "1:16").split(":")[1] != "16" else Bitmask)
        decoded = result.dequantize()
        assert torch.equal(decoded[~keep].view(torch.int32), torch.zeros(int((~keep).sum()), dtype=torch.int32))
        if made.target.sparsity == 0 and not rounded:
            torch.testing.assert_close(decoded, weight, rtol=2**-7, atol=1e-6)


@every_method
@every_target
@every_rounding
def test_zeros_stay_zeros_in_exactly_the_bits_that_are_announced(
    name: str, target: dict[str, Any], rounded: dict[str, Any]
) -> None:
    made, weight = method(name, **target, **rounded), weights(33, 160)
    result = call(made, weight, inputs(300, 160)).weight
    tensors, spec = packing.pack(result)
    assert 8 * sum(tensor.nbytes for tensor in tensors.values()) == result.stored_bits
    announced = bits_known(made, (33, 160))
    assert announced in (None, result.stored_bits)
    said = made.describe((33, 160))
    assert said.least <= result.stored_bits <= said.most
    if said.whole:
        assert 8 * sum(math.prod(axes) * dtype.itemsize for dtype, axes in packing.layout(said.spec).values()) == said.likely
    if announced is None and made.dtype != "auto":
        assert said.likely == pytest.approx(result.stored_bits, rel=0.1)
    back = packing.unpack(json.loads(json.dumps(spec)), tensors)
    assert torch.equal(back.dequantize().view(torch.int32), result.dequantize().view(torch.int32))
    for start in (0, 32):
        assert torch.equal(packing.unpack_rows(spec, tensors, start, 33).dequantize(), result.dequantize()[start:])


@every_method
@pytest.mark.parametrize("target", [{}, {"sparsity": 0.6, "within": "matrix"}, {"pattern": "2:4"}, {"group": 8}], ids=str)
@pytest.mark.parametrize("rounded", [{}, {"bits": 4, "group_size": 32}], ids=str)
def test_finite_and_exact_whatever_comes(name: str, target: dict[str, Any], rounded: dict[str, Any]) -> None:
    random, rows = weights(8, 64), inputs(100, 64)
    made = method(name, **target, **rounded)
    for (kind, x), (_, weight) in itertools.product(any_inputs(rows).items(), any_weights(random).items()):
        result = call(made, weight, x)
        assert_quota(result.weight.keep.mask(), made)
        decoded = result.weight.dequantize()
        assert bool(decoded.isfinite().all())
        assert json.loads(json.dumps(result.notes)) == result.notes
        if kind in ("no token", "all zero") and made.needs:
            assert "token" in result.notes["fallback"]
            keep = result.weight.keep.mask()
            assert float(weight.abs()[keep].sum()) >= 0.999 * float(
                weight.abs()[~keep].sum() * keep.sum() / max(1, int((~keep).sum()))
            )


@every_method
def test_same_input_gives_the_same_result_and_is_left_alone(name: str) -> None:
    made, weight, rows = method(name), weights(16, 64), inputs(200, 64)
    stats, before = observed(rows, made.needs), weight.clone()
    sums = [tensor.clone() for statistic in stats.values() for tensor in statistic.tensors()]
    first, second = (made(weight, stats).weight for _ in range(2))
    assert torch.equal(first.dequantize(), second.dequantize())
    assert torch.equal(weight, before)
    assert all(torch.equal(a, b) for a, b in zip(sums, (t for s in stats.values() for t in s.tensors()), strict=True))


@every_method
def test_options_are_checked_before_any_weight_is_read(name: str) -> None:
    kind = registry.lookup("prune", name)
    wrong: list[dict[str, Any]] = [
        {"nonsense": 1},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"pattern": "4:2"},
        {"pattern": "2-4"},
        {"pattern": "2:4", "sparsity": 0.5},
        {"pattern": "2:4", "group": 4},
        {"group": 0},
        {"bits": 1},
        {"bits": 9},
        {"dtype": "float8"},
    ]
    for options in wrong:
        with pytest.raises(ValidationError):
            kind(**options)
    assert kind().path == f"prune/{name}"
    assert kind().check((256, 1024)) is None
    assert "in=1026 is not a multiple of 4" in kind(pattern="2:4").check((256, 1026))
    assert "group=48" in kind(group=48).check((256, 1024))
    assert "group_size=48" in kind(bits=4, group_size=48).check((256, 1024))
    assert kind(group_size=48).check((256, 1024)) is None
