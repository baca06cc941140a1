"""Anything at all gives a recipe or a RecipeError."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from named_sites import SITES

from compress.errors import RecipeError
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.recipe.schema import Recipe

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)


ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


METHODS = st.sampled_from(["quant/gptq", "quant/rtn", "quant/none", "quant", ""]) | ANYTHING


OPTIONS = (
    st.fixed_dictionaries({}, optional={"bits": st.integers(1, 8) | ANYTHING, "group_size": ANYTHING, "damp": ANYTHING})
    | ANYTHING
)


STEP = (
    st.fixed_dictionaries(
        {"match": st.sampled_from(["*", "*.mlp.*", "[", "nothing"]) | ANYTHING, "method": METHODS},
        optional={"options": OPTIONS, "min_tokens": ANYTHING, "fallback": METHODS, "more": ANYTHING},
    )
    | ANYTHING
)


DATA = st.fixed_dictionaries({"name": ANYTHING}, optional={"samples": ANYTHING, "length": ANYTHING, "split": ANYTHING}) | ANYTHING


RECIPES = (
    st.fixed_dictionaries(
        {"steps": st.lists(STEP, max_size=3) | ANYTHING},
        optional={"data": DATA, "copy": ANYTHING, "max_shard_size": ANYTHING, "dtype": ANYTHING, "batch_tokens": ANYTHING},
    )
    | ANYTHING
)


@given(RECIPES)
@settings(max_examples=300, deadline=None)
def test_anything_gives_a_recipe_or_a_recipe_error(values: Any) -> None:
    try:
        recipe = recipe_reading.parse(values)
        recipe_assignment.resolve(recipe, SITES)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)
    assert recipe_reading.parse(yaml.safe_load(recipe_reading.dump(recipe))) == recipe


@given(st.text(max_size=60) | RECIPES.map(lambda values: yaml.safe_dump(values, allow_unicode=True)))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_a_recipe_or_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(recipe_reading.load(str(path)), Recipe)
    except RecipeError as error:
        assert str(error)


PIECES = st.sampled_from(["steps", "0", "1", "-1", "options", "bits", "data", "name", "x"])


SETTINGS = (
    st.lists(PIECES, min_size=1, max_size=5)
    .map(".".join)
    .flatmap(lambda path: st.text(alphabet="abc:[]{}!&*- 123", max_size=8).map(lambda value: f"{path}={value}"))
)


@given(RECIPES, st.lists(SETTINGS | st.text(max_size=10), max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_setting_gives_values_or_a_recipe_error(values: Any, changes: list[str]) -> None:
    try:
        result = recipe_reading.change(values if isinstance(values, dict) else {}, changes)
    except RecipeError:
        return
    assert isinstance(result, dict)
