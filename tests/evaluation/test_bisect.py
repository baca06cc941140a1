"""Bisection names the weight that was ruined, in a bounded number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import compress, ids_file, steps
from thorough import some

from compress.errors import CheckpointError
from compress.evaluation import bisect as module
from compress.recipe.data import Data

Tiny = Callable[..., Path]


NAMES = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_oss": "model.layers.{}.self_attn.v_proj",
}


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize(("family", "block"), some([(f, b) for f in NAMES for b in (0, 2)], ("llama", 2), ("gpt_oss", 0)))
def test_the_ruined_weight_is_found(family: str, block: int, tiny: Tiny, tmp_path: Path) -> None:
    """One weight at one bit, all others at eight; also where weights are stored transposed, and experts fused."""
    ruined = NAMES[family].format(block)
    recipe = steps("quant/rtn", match=ruined, bits=1, group_size=-1) + steps("quant/rtn", bits=8, group_size=-1)
    compress(tiny(family), tmp_path / "out", None, recipe)
    data = Data(name=str(ids_file(tmp_path / "ids.npy", samples=3, seed=5)))
    found = module.bisect(tmp_path / "out", str(tiny(family)), data, "cpu", "float32", quiet)
    assert (found.block, found.site) == (f"block {block}", ruined)
    assert found.site_kl < 0.2 * found.kl
    sites = next(t.sites for t in found.trials if t.what == f"block {block} dense")
    assert len(found.trials) <= 2 + 2 * math.ceil(math.log2(3)) + 2 * math.ceil(math.log2(sites))


def test_all_dense_is_the_original(tiny: Tiny, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "out", None, steps("quant/rtn", bits=2, group_size=16))
    found = module.bisect(tmp_path / "out", str(tiny("llama")), None, "cpu", "float32", quiet)
    assert found.kl > found.block_kl > 0
    assert found.trials[0].what == "as it is" and found.trials[0].sites == 0


def test_halving_ends_at_the_best_of_any_number_of_items() -> None:
    for count in (1, 2, 3, 5, 8):
        for worst in range(count):
            items = [[str(n)] for n in range(count)]
            found = module.halve(items, lambda sites, _, w=worst: 0.0 if str(w) in sites else 1.0, lambda _: "")  # type: ignore[misc]
            assert found == [str(worst)]


def test_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "out", None, steps("quant/rtn", bits=4, group_size=16))
    with pytest.raises(CheckpointError, match="another vocabulary"):
        module.bisect(tmp_path / "out", str(tiny("llama", vocab_size=97)), None, "cpu", "float32", quiet)
    with pytest.raises(CheckpointError, match="has no weight"):
        module.bisect(tmp_path / "out", str(tiny("llama", intermediate_size=96)), None, "cpu", "float32", quiet)
