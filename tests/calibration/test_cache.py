"""Statistics that are kept: a recipe finds what is still true for it, and its result is that of a run without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import compress, digests, ids_file, steps

from compress.errors import RecipeError
from compress.runs.pipeline import Settings

Tiny = Callable[..., Path]


def run(model: Path, out: Path, data: Path, wanted: list[dict[str, Any]], cache: Path | None, **more: Any) -> Any:
    return compress(model, out, data, wanted, settings=Settings(cache=cache), **more).values["cache"]


FIRST = steps(match="model.layers.[01].*", bits=4, group_size=16)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_another_recipe_skips_what_is_still_true(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Three blocks: recipes that differ in the last find all statistics, those that differ in the first only its own."""
    cache, model = tmp_path / "cache", tiny(family)
    late, early = steps(bits=2, group_size=16), steps(bits=3, group_size=16)
    one = FIRST + late
    other = FIRST + early
    assert run(model, tmp_path / "a", ids, one, cache) == {"found": 0, "made": 3}
    assert run(model, tmp_path / "b", ids, other, cache) == {"found": 3, "made": 0}
    assert run(model, tmp_path / "c", ids, early, cache) == {"found": 1, "made": 2}
    for name, wanted in (("a", one), ("b", other), ("c", early)):
        assert run(model, tmp_path / f"{name}-plain", ids, wanted, None) is None
        assert digests(tmp_path / f"{name}-plain") == digests(tmp_path / name)


@pytest.mark.parametrize("change", ["data", "dtype", "batches", "model", "watched"])
def test_nothing_is_found_where_something_else_is_different(change: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted, cache = steps(bits=3, group_size=16), tmp_path / "cache"
    run(tiny("llama"), tmp_path / "a", ids, wanted, cache)
    model, data, more = tiny("llama"), ids, {}
    if change == "data":
        data = ids_file(tmp_path / "other.npy", seed=9)
    elif change == "model":
        model = tiny("llama", seed=1)
    else:
        more = {"dtype": {"dtype": "bfloat16"}, "batches": {"batch_tokens": 32}, "watched": {"watch": {"windows": 2}}}[change]
    assert run(model, tmp_path / "b", data, wanted, cache, **more)["found"] == 0


def test_a_damaged_file_is_made_anew(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted, cache = steps(bits=3, group_size=16), tmp_path / "cache"
    run(tiny("llama"), tmp_path / "a", ids, wanted, cache)
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert run(tiny("llama"), tmp_path / "b", ids, wanted, cache) == {"found": 0, "made": 3}
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert run(tiny("llama"), tmp_path / "c", ids, wanted, cache) == {"found": 3, "made": 0}


def test_behind_a_transform_nothing_is_kept(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    more = {"transforms": [{"method": "transform/awq"}]}
    assert run(tiny("llama"), tmp_path / "a", ids, steps(bits=3, group_size=16), tmp_path / "cache", **more) == {
        "found": 0,
        "made": 0,
    }


def test_in_passes_and_by_a_run_that_goes_on(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted = steps(bits=3, group_size=16)
    settings = Settings(cache=tmp_path / "cache", memory=1)

    def stop(block: int, *_: object) -> None:
        if block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny("llama"), tmp_path / "a", ids, wanted, settings=settings, progress=stop)
    first = compress(tiny("llama"), tmp_path / "a", ids, wanted, settings=settings).values["cache"]
    assert first["found"] == 0 and first["made"] == 4, "the four taps of the last block"
    assert compress(tiny("llama"), tmp_path / "b", ids, wanted, settings=settings).values["cache"] == {"found": 12, "made": 0}
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


ORIGINAL = {"inputs": "original"}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_originals_own_inputs_serve_any_recipe(family: str, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """Other bits, another method, pruning: nothing is run again, and the bytes are those of a run without a cache."""
    cache, model = tmp_path / "cache", tiny(family)
    recipes = {
        "gptq": steps(bits=4, group_size=16),
        "other bits": FIRST + steps(bits=2, group_size=8),
        "spqr": steps("quant/spqr", bits=3, outlier_threshold=None),
        "sparsegpt": steps("prune/sparsegpt", sparsity=0.5),
    }
    for name, wanted in recipes.items():
        found, made = (0, 3) if name == "gptq" else (3, 0)
        left_out = {"blocks_left_out": found}
        assert run(model, tmp_path / name, ids, wanted, cache, **ORIGINAL) == {"found": found, "made": made} | left_out
        assert run(model, tmp_path / f"{name}-plain", ids, wanted, None, **ORIGINAL) is None
        assert digests(tmp_path / f"{name}-plain") == digests(tmp_path / name)


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_missing_is_made_behind_blocks_that_were_left_out(offload: bool, tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    cache, model = tmp_path / "cache", tiny("llama")
    run(model, tmp_path / "a", ids, FIRST, cache, **ORIGINAL)
    late = FIRST + steps("prune/wanda", match="*", sparsity=0.5)  # the head as well, and other statistics
    settings = Settings(cache=cache, offload=offload)
    made = compress(model, tmp_path / "b", ids, late, settings=settings, **ORIGINAL).values["cache"]
    assert made == {"found": 2, "made": 2, "blocks_left_out": 0}, "the third block and the head"
    compress(model, tmp_path / "c", ids, late, **ORIGINAL)
    assert digests(tmp_path / "b") == digests(tmp_path / "c")
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert run(model, tmp_path / "d", ids, late, cache, **ORIGINAL) == {"found": 0, "made": 4, "blocks_left_out": 0}
    assert digests(tmp_path / "d") == digests(tmp_path / "c")


def test_they_are_those_of_the_original(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    """A block comes out as it does where it is the only one that is compressed, so that all before it are the original's."""
    alone, everywhere = steps(match="model.layers.2.*", bits=2, group_size=16), steps(bits=2, group_size=16)
    found = [
        {row.site: row.sha256 for row in compress(tiny("llama"), tmp_path / name, ids, wanted, **more).rows if row.block == 2}
        for name, wanted, more in (("a", alone, {}), ("b", everywhere, ORIGINAL), ("c", everywhere, {}))
    ]
    assert found[0] == found[1] and len(found[0]) == 7
    assert all(found[2][site] != digest for site, digest in found[1].items())


def test_the_first_block_is_the_same_in_both(tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted, cache = steps(bits=3, group_size=16), tmp_path / "cache"
    run(tiny("llama"), tmp_path / "a", ids, wanted, cache)
    assert run(tiny("llama"), tmp_path / "b", ids, wanted, cache, **ORIGINAL) == {"found": 1, "made": 2, "blocks_left_out": 0}
    compress(tiny("llama"), tmp_path / "c", ids, wanted, **ORIGINAL)
    assert digests(tmp_path / "b") == digests(tmp_path / "c")


@pytest.mark.parametrize("settings", [{"snapshot_seconds": 0.0}, {"snapshot_seconds": 1e9}, {"offload": True}])
def test_a_run_on_the_originals_inputs_goes_on(settings: dict[str, Any], tiny: Tiny, ids: Path, tmp_path: Path) -> None:
    wanted, more = steps(bits=3, group_size=16), {**ORIGINAL, "watch": {"windows": 2}}

    def stop(block: int, *_: object) -> None:
        if block == 2:
            raise KeyboardInterrupt

    for cache in (None, tmp_path / "cache"):
        out = tmp_path / f"out-{cache is None}"
        with pytest.raises(KeyboardInterrupt):
            compress(tiny("llama"), out, ids, wanted, settings=Settings(cache=cache, **settings), progress=stop, **more)
        compress(tiny("llama"), out, ids, wanted, settings=Settings(cache=cache, **settings), **more)
        compress(tiny("llama"), tmp_path / "plain", ids, wanted, **more)
        assert digests(out) == digests(tmp_path / "plain")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"transforms": [{"method": "transform/drift"}]}, "drift corrects for what compressed blocks do to inputs"),
        ({"transforms": [{"method": "transform/awq"}]}, "awq looks at every block anew"),
        ({"tuning": [{"method": "tune/grid"}]}, "tune/grid works on whole blocks"),
        ({"steps": steps("quant/signround", bits=3, group_size=16)}, "quant/signround works on whole blocks"),
    ],
)
def test_what_means_nothing_beside_them_is_refused(
    more: dict[str, Any], message: str, tiny: Tiny, ids: Path, tmp_path: Path
) -> None:
    wanted = more.pop("steps", steps(bits=3, group_size=16))
    with pytest.raises(RecipeError, match=message):
        compress(tiny("llama"), tmp_path / "a", ids, wanted, **ORIGINAL, **more)
