"""Statistics that are kept: a recipe finds what is still true for it, and its result is that of a run without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import compress, digests, ids_file, steps

from compress.pipeline import Settings

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
        compress(tiny("llama"), tmp_path / "a", ids, wanted, settings=settings, listen=stop)
    first = compress(tiny("llama"), tmp_path / "a", ids, wanted, settings=settings).values["cache"]
    assert first["found"] == 0 and first["made"] == 4, "the four taps of the last block"
    assert compress(tiny("llama"), tmp_path / "b", ids, wanted, settings=settings).values["cache"] == {"found": 12, "made": 0}
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
