"""The table of sites in config.json, which is hostile until it is read."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import PROCESSOR, quickly
from table_damage import any_names, damage, spec

from compress.checkpoint import packing
from compress.checkpoint.site_table import read_table, write_table
from compress.errors import FormatError

fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


specs_strategy = st.builds(spec, bits=st.integers(1, 8), rows=st.integers(1, 5), size=st.sampled_from([16, 32, 64]))


@fuzz
@given(names=any_names, data=st.data())
def test_a_table_there_and_back(names: set[str], data: st.DataObject) -> None:
    pool = data.draw(st.lists(specs_strategy, min_size=1, max_size=4))
    specs = {name: data.draw(st.sampled_from(pool)) for name in sorted(names)}
    table = json.loads(json.dumps(write_table(specs, None)))
    assert read_table(table) == specs
    assert len(table["specs"]) <= len(pool)


def many_experts(bits: Callable[[], int]) -> dict[str, packing.Spec]:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": spec(bits(), *shape, size=128)
        for layer in range(48)
        for expert in range(128)
        for name, shape in (("gate_proj", (768, 2048)), ("up_proj", (768, 2048)), ("down_proj", (2048, 768)))
    }


@pytest.mark.parametrize(
    ("widths", "limit"), [((4,), 2_000), ((2, 3), 100_000), (tuple(range(1, 9)), 200_000)], ids=["uniform", "two", "eight"]
)
def test_the_table_of_a_large_model_is_small(widths: tuple[int, ...], limit: int) -> None:
    generator = random.Random(0)
    specs = many_experts(lambda: generator.choice(widths))
    assert len(specs) == 48 * 128 * 3
    table = write_table(specs, "model.layers.0.mlp.experts.0.gate_proj.weight")
    assert len(json.dumps(table, indent=2)) < limit  # as it is written into config.json
    assert read_table(json.loads(json.dumps(table))) == specs


VALID = write_table({"a.0.q": spec(4), "a.1.q": spec(4), "a.1.k": spec(3), "h": spec(8, group="U8")}, "a.0.q.weight")


@pytest.mark.parametrize(
    "change",
    [{"format_version": value} for value in (None, 0, 2, -1, 10**4000, True, 1.0, "1", [1], {})]
    + [{"specs": value} for value in (None, 3, "x", {}, [], [None], [3], [[]], [{}], ["x"], [spec(), {}])]
    + [{"sites": value} for value in (None, 3, "x", [], [["a", 0]])]
    + [{"sites": {"a": value}} for value in (None, -1, 3, 10**4000, True, False, 0.0, "0", [0], {})]
    + [{"sites": {"a.{0-3}": 0, "a.2": 1}}, {"sites": {"a.{1,1}": 0}}, {"sites": {"": 0, "{0": 0}}]
    + [{"guard": value} for value in (3, True, [], ["a.0.q"], {}, "", "other", "other.weight", "a.0.q", "a.0.q.codes")],
    ids=lambda change: str(change)[:60],
)
def test_a_table_with_other_things_than_expected(change: dict[str, Any]) -> None:
    with quickly(nbytes=16 << 20, timer=PROCESSOR), pytest.raises(FormatError) as caught:
        read_table({**VALID, **change})
    assert "quantization_config" in str(caught.value) or "bitpack" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_table_that_adds_up_to_too_much() -> None:
    sites = {f"a.{n}.{{0-299999}}": 0 for n in range(100)}
    with quickly(30.0, timer=PROCESSOR), pytest.raises(FormatError, match="too many sites"):
        read_table({**VALID, "sites": sites, "guard": None})


@settings(fuzz, max_examples=600)
@given(data=st.data())
def test_fuzzed_tables(data: st.DataObject) -> None:
    config = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        config = damage(config, data)
    if not isinstance(config, dict):
        return
    try:
        with quickly(timer=PROCESSOR):
            table = read_table(config)
    except FormatError as error:
        assert len(str(error)) < 400
        return
    for described in table.values():
        assert packing.layout(described)
    assert read_table(write_table(table, None)) == table
