"""Recipes: what is shipped works, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from limits import PROCESSOR, quickly
from named_sites import SITES, Named

import compress
from compress.architecture.inventory import take_inventory
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.model.detect import find_family
from compress.recipe import assignment as recipe_assignment
from compress.recipe import reading as recipe_reading
from compress.recipe import schema as recipe_schema
from compress.recipe.schema import Recipe

Tiny = Callable[..., Path]


RTN: dict[str, Any] = {"match": "*", "method": "quant/rtn"}


FOLDER = Path(compress.__file__).parent / "methods"


METHODS = ", ".join(f"{kind}/{p.stem}" for kind in ("quant", "prune") for p in sorted((FOLDER / kind).glob("[!_]*.py")))


def one(**values: Any) -> dict[str, Any]:
    """A recipe of one step with these values."""
    return {"steps": [{**RTN, **values}]}


def error(values: Any) -> str:
    """What a recipe of these values is refused with, at the latest when it meets sites."""
    with pytest.raises(RecipeError) as caught:
        recipe_assignment.resolve(recipe_reading.parse(values), SITES)
    return str(caught.value)


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_shipped_recipes_are_there() -> None:
    assert {"demo", "gptq-4bit", "rtn-8bit", "moe-4bit-experts-3bit"} <= set(recipe_reading.presets())


@pytest.mark.parametrize("name", recipe_reading.presets())
def test_shipped_recipes_resolve_and_their_dump_loads_to_the_same(name: str, tiny: Tiny, tmp_path: Path) -> None:
    family = "mixtral" if "moe" in name else "llama"
    source = Source.open(tiny(family, hidden_size=128, intermediate_size=128))
    sites = take_inventory(source, find_family(source)).sites
    recipe = recipe_reading.load(name)
    assert recipe.description
    assigned = recipe_assignment.resolve(recipe, sites)
    assert {a.site.name for a in assigned} == {site.name for site in sites if site.name != "lm_head"}
    needs_data = any(a.method.needs for a in assigned) or bool(recipe.transforms) or bool(recipe.tuning)
    assert (recipe.data is not None) == needs_data
    assert recipe_reading.load(written(tmp_path, recipe_reading.dump(recipe))) == recipe
    changed = recipe_reading.load(name, [f"data.name={tmp_path}/ids.npy"])
    assert changed.data is not None
    assert changed.data.name == f"{tmp_path}/ids.npy"
    assert changed.steps == recipe.steps


def test_a_dump_spells_out_every_default() -> None:
    values = yaml.safe_load(recipe_reading.dump(recipe_reading.parse(one())))
    assert set(values) == {recipe.alias or name for name, recipe in Recipe.model_fields.items()}
    assert values["steps"][0]["fallback"] == "shrink"


def test_an_unknown_name_suggests_a_shipped_one() -> None:
    with pytest.raises(RecipeError, match=r"gptq-4bits: neither a file nor a shipped recipe; .*did you mean gptq-4bit\?"):
        recipe_reading.read("gptq-4bits")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": [RTN]}, "stepz: unknown key; did you mean steps?"),
        ({"steps": [RTN], "max_shard": "5GB"}, "max_shard: unknown key; did you mean max_shard_size?"),
        ({"steps": [RTN], "copy_": ["x"]}, "copy_: unknown key; did you mean copy?"),
        ({"steps": [RTN], "zzz": 1}, "zzz: unknown key; known are description, transforms, steps, tuning, retraining, "),
        (one(metod=1), "steps.0.metod: unknown key; did you mean method?"),
        (one(min_token=1), "steps.0.min_token: unknown key; did you mean min_tokens?"),
        ({"steps": [RTN], "data": {"name": "c4", "sample": 3}}, "data.sample: unknown key; did you mean samples?"),
        (one(options={"bit": 3}), "steps.0.options.bit: unknown key; did you mean bits?"),
        (one(method="quant/gptq", options={"groupsize": 3}), "options.groupsize: unknown key; did you mean group_size?"),
        (one(options={"symmetric": True, "wat": 1}), "steps.0.options.wat: unknown key; known are bits, group_size, "),
    ],
)
def test_misspelt_keys_name_the_nearest(values: Any, message: str) -> None:
    assert message in error(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (one(options={"bits": 9}), "steps.0.options.bits: Input should be less than or equal to 8 (got 9)"),
        (one(options={"bits": "four"}), "steps.0.options.bits: Input should be a valid integer"),
        (one(options={"symmetric": "perhaps"}), "steps.0.options.symmetric: Input should be a valid boolean"),
        (one(options=3), "steps.0.options: Input should be a mapping (got 3)"),
        (one(match=5), "steps.0.match: Input should be a list (got 5)"),
        ({"steps": "x"}, "steps: Input should be a list (got 'x')"),
        ({"steps": []}, "a recipe needs at least one step"),
        ({}, "steps: Field required"),
        ({"steps": [{"match": "*"}]}, "steps.0.method: Field required"),
        ({"steps": [RTN], "data": "c4"}, "data: Input should be a mapping (got 'c4')"),
        ({"steps": [RTN], "data": {"name": ""}}, "data.name: String should have at least 1 character"),
        ({"steps": [RTN], "data": {"name": "x.npy", "split": "train"}}, "data: `split` means nothing for a .npy file"),
        ({"steps": [RTN], "dtype": "float8"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"steps": [RTN], "batch_tokens": 0}, "batch_tokens: Input should be greater than or equal to 1 (got 0)"),
        ({"steps": [RTN], "max_shard_size": "big"}, "max_shard_size: 'big' is not a size; write it as 5GB, 500MB or 4GiB"),
        ({"steps": [RTN], "max_shard_size": "1e400"}, "max_shard_size: '1e400' is not a size"),
        ({1: 2, "steps": [RTN]}, "1: Keys should be strings"),
        (one(method="quant/gtpq"), f"no method 'quant/gtpq'; known are {METHODS}; did you mean quant/gptq?"),
        (one(method="formats/bitpack"), "no method 'formats/bitpack'"),
        (one(fallback="quant/rtnn"), "steps.0.fallback: no method 'quant/rtnn'"),
        (one(method="quant/gptq", fallback="quant/rtn", options={"bits": 0}), "steps.0.options.bits: "),
        (one(options={"group_size": 100}), "model.layers.0.self_attn.q_proj: "),
    ],
)
def test_wrong_values_are_named_by_their_place(values: Any, message: str) -> None:
    assert message in error(values)


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(error(one(options={"bits": "x" * 10_000}))) < 300


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = error({"steps": [{"match": "*", "method": "quant/rtn", "optoins": {}}], "dtype": 3, "dat": {}})
    assert all(place in message for place in ("steps.0.optoins:", "dtype:", "dat:"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []\nsteps: []\n", "the key 'steps' is there twice"),
        ("steps:\n  - {match: a, match: b, method: quant/rtn}\n", "the key 'match' is there twice"),
        ("- a list\n", "holds a list; expected keys such as data: and steps:"),
        ("", "holds a NoneType; expected keys"),
        ("steps: [", "cannot be read: "),
        ("a: !!python/object/apply:os.system [touch /tmp/never]\n", "could not determine a constructor"),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
        ("a: !!int x\n", "cannot be read: "),
        ("a: !!timestamp x\n", "cannot be read: "),
        ("a: 2026-99-99\n", "cannot be read: "),
        ("a: !!bool x\n", "cannot be read: "),
        ("{" * 5000, "cannot be read: "),
        ("? [a]\n: b\n", "cannot be read: "),
        ("a: \x00\n", "cannot be read: "),
    ],
)
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_reading.load(written(tmp_path, text))
    assert message in str(caught.value)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


def test_what_would_take_for_ever_is_refused_at_once(tmp_path: Path) -> None:
    keys = "".join(f"key{n}: 1\n" for n in range(5_000))
    with quickly(20.0, timer=PROCESSOR), pytest.raises(RecipeError, match="and 4980 more"):
        recipe_reading.load(written(tmp_path, f"{keys}steps: []\n"))
    for key in ("steps: [{method: quant/rtn, match: GLOB}]", "steps: []\ncopy: [GLOB]", "steps: []\ndrop: [GLOB]"):
        with (
            quickly(timer=PROCESSOR),
            pytest.raises(RecipeError, match=r"a pattern of 100,000 characters, .*; expected at most 1,000"),
        ):
            recipe_reading.load(written(tmp_path, key.replace("GLOB", '"' + "[" * 100_000 + '"')))
    written(tmp_path, "#" * (5 << 20))
    with pytest.raises(RecipeError, match="has 5,242,880 bytes; expected at most"):
        recipe_reading.load(str(tmp_path / "recipe.yaml"))


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = written(
        tmp_path, f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/made]]\n"
    )
    with pytest.raises(RecipeError):
        recipe_reading.load(path)
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"description: \xff\n")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe_reading.load(str(tmp_path / "recipe.yaml"))


def test_aliases_that_unfold_to_much_are_refused_quickly(tmp_path: Path) -> None:
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"] + [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(RecipeError, match="unknown key"):
        recipe_reading.load(written(tmp_path, "\n".join([*lines, "steps: *x29"])), ["batch_tokens=1"])


def changed(values: dict[str, Any], *changes: str) -> dict[str, Any]:
    return recipe_reading.change(values, changes)


def test_settings_change_values_lists_and_what_was_not_there() -> None:
    values = {"steps": [{**RTN, "options": {"bits": 4}}, RTN], "data": None}
    result = changed(
        values,
        "steps.0.options.bits=3",
        "steps.1.options.group_size=-1",
        "steps.0.match=[a.*, b.*]",
        "data.name=text.jsonl",
        "data.samples=7",
        "dtype=float32",
    )
    assert result["steps"][0] == {"match": ["a.*", "b.*"], "method": "quant/rtn", "options": {"bits": 3}}
    assert result["steps"][1]["options"] == {"group_size": -1}
    assert result["data"] == {"name": "text.jsonl", "samples": 7}
    assert result["dtype"] == "float32"
    assert values["steps"][0]["options"] == {"bits": 4}, "the values that were given stay as they are"
    assert changed(values, "steps=[]")["steps"] == []
    assert changed(values, "steps.0.options={bits: 2}")["steps"][0]["options"] == {"bits": 2}
    assert changed(values, "description=a=b")["description"] == "a=b"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps.0.options.bits", "expected a path and a value, as in steps.0.options.bits=3"),
        ("=3", "expected a path and a value"),
        ("steps..bits=3", "expected a path and a value"),
        ("steps.7.match=x", "the recipe has no such place"),
        ("steps.first.match=x", "the recipe has no such place"),
        ("steps.0.match.more=x", "the recipe has no such place"),
        ("steps.0.options=[1, 2", "the value is not YAML"),
        ("steps.0.options={a: 1, a: 2}", "the value is not YAML"),
        ("description=!!python/name:os.system", "the value is not YAML"),
        ("description=!!int x", "the value is not YAML"),
    ],
)
def test_settings_that_fit_nowhere(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changed(one(), setting)
    assert caught.value.message.startswith(f"--set {setting}: {message}")


def test_a_setting_with_a_misspelt_path_is_an_unknown_key() -> None:
    with pytest.raises(RecipeError, match=r"stpes: unknown key; did you mean steps\?"):
        recipe_reading.parse(changed(one(), "stpes.0.options.bits=3"))


def resolved(*steps: dict[str, Any], sites: list[Named] | None = None) -> dict[str, recipe_assignment.Assignment]:
    found = recipe_assignment.resolve(recipe_reading.parse({"steps": list(steps)}), SITES if sites is None else sites)
    return {a.site.name: a for a in found}


def test_the_first_step_that_matches_wins_and_the_rest_is_left() -> None:
    found = resolved(
        {"match": "*.0.self_attn.*", "method": "quant/rtn", "options": {"bits": 8}},
        {"match": ["*.self_attn.*", "*.0.mlp.*"], "method": "quant/rtn", "options": {"bits": 2}},
    )
    bits = {name: (a.step, a.method.bits) for name, a in found.items()}
    assert bits == {
        "model.layers.0.self_attn.q_proj": (0, 8),
        "model.layers.1.self_attn.q_proj": (1, 2),
        "model.layers.0.mlp.down_proj": (1, 2),
    }


def test_a_step_that_matches_nothing() -> None:
    with pytest.raises(RecipeError) as caught:
        resolved(RTN | {"match": "model.layer.*"})
    assert "steps.0.match: 'model.layer.*' takes no weight of this model; names look like 'model.layers." in str(caught.value)
    assert "`compress inspect MODEL` lists them" in str(caught.value)
    with pytest.raises(RecipeError, match=r"steps.0.match: .*takes no weight"):
        resolved(RTN | {"match": []})
    with pytest.raises(RecipeError, match=r"steps.0.match"):
        resolved(RTN, sites=[])


def test_a_step_behind_one_that_takes_all_it_matches() -> None:
    with pytest.raises(RecipeError, match=r"steps.1.match: '\*.mlp.\*' takes no weight .* an earlier step takes all it matches"):
        resolved({"match": "*.layers.*", "method": "quant/rtn"}, {"match": "*.mlp.*", "method": "quant/rtn"})


def test_patterns_mind_case() -> None:
    with pytest.raises(RecipeError, match="takes no weight"):
        resolved(RTN | {"match": "MODEL.*"})


def test_a_fallback_takes_over_the_options_that_it_knows() -> None:
    step = {
        "match": "*",
        "method": "quant/gptq",
        "options": {"bits": 3, "group_size": 32, "damp": 0.1},
        "fallback": "quant/rtn",
        "min_tokens": 9,
    }
    found = resolved(step)["model.layers.0.self_attn.q_proj"]
    assert (found.method.damp, found.min_tokens) == (0.1, 9)
    assert (found.fallback.path, found.fallback.bits, found.fallback.group_size) == ("quant/rtn", 3, 32)
    assert not hasattr(found.fallback, "damp")
    assert resolved(RTN)["model.layers.0.self_attn.q_proj"].fallback is None, "shrink is no method"


def test_experts_need_as_many_tokens_as_columns_unless_told() -> None:
    sites = [Named("a.experts.0.up", expert=0, tensor="x"), Named("a.q", tensor="y")]
    found = resolved(RTN, sites=sites)
    assert (found["a.experts.0.up"].min_tokens, found["a.q"].min_tokens) == (128, 0)
    assert resolved(RTN | {"min_tokens": 5}, sites=sites)["a.experts.0.up"].min_tokens == 5


def test_a_tensor_of_several_experts_is_taken_whole_or_not_at_all(tiny: Tiny) -> None:
    source = Source.open(tiny("gpt_oss"))
    sites = take_inventory(source, find_family(source)).sites
    options = {"group_size": 16}
    recipe = recipe_reading.parse(one(match="*.experts.0.*", options=options))
    with pytest.raises(
        RecipeError, match=r"mlp.experts.gate_up_proj: one tensor of 4 experts, of which the steps take 1; match all"
    ):
        recipe_assignment.resolve(recipe, sites)
    two = {"steps": [{**RTN, "match": f"*.experts.{m}.*", "options": {**options, "bits": b}} for m, b in (("0", 3), ("*", 4))]}
    assert {a.method.bits for a in recipe_assignment.resolve(recipe_reading.parse(two), sites)} == {3, 4}


def test_shapes_that_a_method_cannot_take_are_counted() -> None:
    with pytest.raises(RecipeError, match=r"model.layers.0.self_attn.q_proj: .*\(4 weights in all\)"):
        resolved(RTN | {"options": {"group_size": 100}})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12", 12),
        ("1B", 1),
        ("5GB", 5_000_000_000),
        ("5 gb", 5_000_000_000),
        (" 500MB ", 500_000_000),
        ("1.5kB", 1500),
        ("4GiB", 4 << 30),
        ("2 tib", 2 << 40),
        ("3TB", 3_000_000_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert recipe_schema.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0", "0.1B", "inf", "1e999", "nan", "5GBB", "5 G B", "five"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        recipe_schema.parse_size(text)
