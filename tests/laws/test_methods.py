"""The law of methods, for every file of `methods/quant`: better than rounding, finite whatever comes, a function of its input.

That the codes equal those of a slow reference is tested with each method, in `tests/methods/quant/test_<method>.py`, which must
exist.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from blocks import call
from layers import any_inputs, any_weights
from options import bits_known, function_of
from places import TESTS
from pydantic import ValidationError
from torch import Tensor

from compress import registry
from compress.calibration.statistics import Hessian, Statistics
from compress.checkpoint import packing
from compress.methods.solvers.uniform_grid import Grid, encode
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

rtn = function_of("quant/rtn")

METHODS = registry.names("quant")
GROUP = 32
every_method = pytest.mark.parametrize("name", METHODS)


def method(name: str, **options: Any) -> Any:
    """The method with a group size that suits small weights and few steps of training, where it has any."""
    kind = registry.lookup("quant", name)
    return kind(**{k: v for k, v in ({"group_size": GROUP, "steps": 4} | options).items() if k in kind.model_fields})


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated rows (tokens, columns) whose channels differ in size, as behind a normalisation."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    size = torch.exp(0.7 * torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ mix * size


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def observed(kind: Any, rows: Tensor) -> dict[type[Statistics], Statistics]:
    """What a method needs to know of inputs (tokens, in)."""
    found: dict[type[Statistics], Statistics] = {}
    for need in {*kind.may_need, Hessian}:
        found[need] = need(rows.shape[1], torch.device("cpu"))
        found[need].add(rows)
    return found


def loss(weight: Tensor, decoded: Tensor, rows: Tensor) -> float:
    """Mean squared error of the layer's outputs."""
    return float(((weight - decoded).double() @ rows.T.double()).square().mean())


def assert_sound(result: Any, weight: Tensor) -> None:
    """What every result must be, whatever went in."""
    compressed = result.weight
    assert isinstance(compressed, CompressedWeight)
    decoded = compressed.dequantize()
    assert decoded.shape == weight.shape
    assert decoded.dtype == torch.float32
    assert torch.isfinite(decoded).all()
    assert compressed.stored_bits > 0
    assert json.loads(json.dumps(result.notes)) == result.notes
    if isinstance(compressed.base, Uniform):
        assert compressed.base.scale.dtype == torch.bfloat16
        assert compressed.base.codes.dtype == torch.uint8
        assert int(compressed.base.codes.max()) < 2**compressed.base.bits


@every_method
def test_it_has_tests_of_its_own(name: str) -> None:
    assert (TESTS / "methods" / "quant" / f"test_{name}.py").exists()


@every_method
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_below_rounding_on_the_same_grid(name: str, bits: int) -> None:
    """In the mean over layers, where the method looks at the inputs at all; and never above plain rounding on a min-max grid."""
    logs, plain = [], []
    for seed in range(6):
        weight, rows = weights(24, 96, seed), inputs(400, 96, seed)
        made = method(name, bits=bits)
        compressed = call(made, weight, rows, observed(made, rows)).weight
        error = loss(weight, compressed.dequantize(), rows)
        plain.append(
            math.log(error / loss(weight, rtn(weight, bits=bits, group_size=GROUP, range="minmax").weight.dequantize(), rows))
        )
        base = compressed.base
        if isinstance(base, Uniform):
            place = torch.arange(96) if base.group is None else torch.argsort(base.group.long(), stable=True)
            codes = torch.empty_like(base.codes)
            codes[:, place] = encode(
                weight[:, place], Grid(base.scale, base.zero, base.bits, base.offset, base.bipolar), base.group_size
            )
            nearest = replace(base, codes=codes)
            logs.append(math.log(error / loss(weight, nearest.dequantize(), rows)))
    assert sum(plain) < 0
    if logs:
        assert sum(logs) / 6 < (math.log(0.8) if made.needs else 1e-6)


@every_method
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_finite_and_sound_whatever_comes(name: str, bits: int) -> None:
    random, rows = weights(8, 64), inputs(100, 64)
    made = method(name, bits=bits)
    for (_, x), (_, weight) in itertools.product(any_inputs(rows).items(), any_weights(random).items()):
        result = call(made, weight, x, observed(made, x))
        assert_sound(result, weight)
        span = weight.abs().max()
        # Wherever the codes went, they stay on a grid that was made for these weights.
        assert result.weight.dequantize().abs().max() <= 4 * span + 1e-15


@every_method
def test_same_input_gives_the_same_codes(name: str) -> None:
    weight, rows = weights(16, 64), inputs(200, 64)
    made = method(name)
    first, second = (call(made, weight.clone(), rows, observed(made, rows)).weight.dequantize() for _ in range(2))
    assert torch.equal(first, second)


@every_method
def test_input_is_left_alone(name: str) -> None:
    weight, rows = weights(16, 64), inputs(200, 64)
    made = method(name)
    stats = observed(made, rows)
    before = [weight.clone(), *(tensor.clone() for s in stats.values() for tensor in s.tensors())]
    call(made, weight, rows, stats)
    after = [weight, *(tensor for s in stats.values() for tensor in s.tensors())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_method
def test_stacked_weights_come_out_like_each_alone(name: str) -> None:
    """Sites that share a tap are compressed in one call where the method says that rows are independent."""
    made = method(name)
    if not made.rows_independent:
        pytest.skip("rows of this method depend on each other")
    first, second, stats = weights(16, 64, 0), weights(48, 64, 1) * 3, observed(made, inputs(200, 64))
    both = made(torch.cat([first, second]), stats).weight.dequantize()
    alone = torch.cat([made(weight, stats).weight.dequantize() for weight in (first, second)])
    # Products of other shapes may be summed in another order, and in float32 a code at a tie then flips.
    assert (both == alone).double().mean() > 0.99


@every_method
@pytest.mark.parametrize("shape", [(8, 96), (3, 256)])
def test_stored_bits_that_are_announced_are_those_of_the_result(name: str, shape: tuple[int, int]) -> None:
    made = method(name)
    said, rows = made.describe(shape), inputs(300, shape[1])
    weight = call(made, weights(*shape), rows, observed(made, rows)).weight
    assert said.least <= weight.stored_bits <= said.most
    assert bits_known(made, shape) in (None, weight.stored_bits)
    if said.spec is not None and said.whole:
        assert 8 * sum(math.prod(axes) * dtype.itemsize for dtype, axes in packing.layout(said.spec).values()) == said.likely
        if said.exact:
            assert json.loads(json.dumps(packing.pack(weight)[1])) == said.spec


@every_method
def test_options_are_checked_before_any_weight_is_read(name: str) -> None:
    kind = registry.lookup("quant", name)
    with pytest.raises(ValidationError):
        kind(nonsense=1)
    made = kind()
    field = next(iter(kind.model_fields))
    with pytest.raises(ValidationError):
        setattr(made, field, getattr(made, field))
    assert made.path == f"quant/{name}"
    assert made.check((256, 1024)) is None
    if "group_size" in kind.model_fields:
        complaint = kind(group_size=48).check((256, 1024))
        assert complaint is not None
        assert "in=1024" in complaint
        assert "group_size=48" in complaint
