"""Scales move between tensors without a change of function, for every family; what cannot take part is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformed
from tiny import TINY
from torch import Tensor

from compress.architecture.inventory import take_inventory
from compress.blockwise.scalable import producing_rows
from compress.checkpoint.source import Source
from compress.methods.block import Block, Scalable, TransformResult
from compress.methods.transform._scaling import Moved
from compress.model.detect import find_family

Tiny = Callable[..., Path]


class Random:
    """A transform that moves large random scales wherever it may."""

    path = "transform/random"

    def __init__(self) -> None:
        self.places: list[Scalable] = []
        self.weights: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}

    def __call__(self, block: Block) -> TransformResult:
        moved, generator = Moved(block), block.generator()
        for place in block.scalables:
            self.places.append(place)
            if place.obstacle is None:
                moved.move(place, torch.exp(torch.randn(moved.number(place), generator=generator)))
        self.weights |= moved.weights
        self.others |= moved.others
        return moved.changed({})

    @property
    def obstacles(self) -> dict[str, str]:
        """What is in the way, by producer."""
        return {place.producer: place.obstacle for place in self.places if place.obstacle is not None}


def run(folder: Path, method: Random | None, match: str | list[str] = "*.*", copy: tuple[str, ...] = ()) -> Tensor:
    """Logits of a model after the transform alone; its own if it is None."""
    return transformed.run(folder, method, match, copy)[0]


@pytest.mark.parametrize("family", TINY)
def test_logits_stay_in_every_family(family: str, tiny: Tiny) -> None:
    before, method = run(tiny(family), None), Random()
    torch.testing.assert_close(run(tiny(family), method), before, rtol=1e-5, atol=2e-5)
    free = [place for place in method.places if place.obstacle is None]
    assert len(free) >= 3 * len({place.producer.split(".layers.")[-1].split(".")[0] for place in free})
    assert set(method.obstacles.values()) <= {"activation_function is 'gelu_new', not 'relu'"}
    assert (not method.obstacles) == (family != "gpt2")
    source = Source.open(tiny(family))
    for name, value in method.others.items():
        assert not torch.equal(value, source.tensor(name)), name


def test_every_norm_before_linears_is_a_producer_in_every_family(tiny: Tiny) -> None:
    """And every tap of a block is read at one place at most, whole."""
    for family in TINY:
        source = Source.open(tiny(family))
        inventory, method = take_inventory(source, find_family(source)), Random()
        run(tiny(family), method)
        readers = [site for place in method.places for site in place.sites]
        assert len(readers) == len(set(readers))
        left = {site.kind for site in inventory.sites if site.block is not None and site.name not in readers}
        assert left <= {"mlp.experts.down_proj"}, family
        by_tap: dict[tuple[Any, str], set[str]] = {}
        place_of = {site: place.producer for place in method.places for site in place.sites}
        for site in inventory.sites:
            by_tap.setdefault((site.block, site.tap), set()).add(place_of.get(site.name, ""))
        assert all(len(producers) == 1 for producers in by_tap.values()), family


def test_routers_and_gates_are_rescaled_with_the_experts(tiny: Tiny) -> None:
    method = Random()
    run(tiny("qwen2_moe"), method)
    copied = {name for place in method.places for name in place.copied}
    assert "model.layers.1.mlp.gate.weight" in copied
    assert "model.layers.1.mlp.shared_expert_gate.weight" in copied
    assert copied <= set(method.others)


def edited(model: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_a_norm_that_makes_the_residual_stream_is_left(tiny: Tiny, tmp_path: Path) -> None:
    """OPT with norms behind attention and MLP, and one with another activation."""
    behind = edited(tiny("opt"), tmp_path / "behind", do_layer_norm_before=False)
    method, before = Random(), run(behind, None)
    torch.testing.assert_close(run(behind, method), before, rtol=1e-5, atol=2e-5)
    base = "model.decoder.layers.0"
    assert set(method.obstacles) >= {f"{base}.self_attn_layer_norm.weight", f"{base}.final_layer_norm.weight"}
    assert f"{base}.fc1" not in method.obstacles
    smooth = edited(tiny("opt"), tmp_path / "smooth", activation_function="gelu")
    method, before = Random(), run(smooth, None)
    torch.testing.assert_close(run(smooth, method), before, rtol=1e-5, atol=2e-5)
    assert method.obstacles[f"{base}.fc1"] == "activation_function is 'gelu', not 'relu'"


def test_a_reader_that_stays_as_it_is_keeps_the_rest(tiny: Tiny) -> None:
    before = run(tiny("mixtral"), None)
    for match, copy, obstacle in (
        (["*.experts.[01].*", "*.self_attn.*"], (), "is not compressed by this recipe, or not matched"),
        (["*.experts.*", "*.self_attn.*"], ("*.block_sparse_moe.gate.weight",), None),
        (["*.experts.*", "*.self_attn.[qkv]_proj"], ("*.experts.0.w1.weight",), "experts.0.w1.weight is copied as it is"),
    ):
        method = Random()
        torch.testing.assert_close(run(tiny("mixtral"), method, match, copy), before, rtol=1e-5, atol=2e-5)
        found = method.obstacles.get("model.layers.0.post_attention_layernorm.weight")
        assert (found is None) == (obstacle is None)
        assert obstacle is None or obstacle in str(found)


@pytest.mark.parametrize(
    ("layout", "rows", "columns", "config", "expected"),
    [
        ("all", 4, 4, {}, None),
        ("all", 4, 6, {}, "4 rows for 6 columns"),
        ("values", 4, 8, {"num_attention_heads": 4}, [0, 1, 0, 1, 2, 3, 2, 3]),
        ("values", 8, 8, {"n_head": 4}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("values", 6, 8, {"num_attention_heads": 4}, "not those of 4 heads of 2"),
        ("values", 8, 8, {}, "not those of None heads"),
        ("stacked", 16, 8, {"num_attention_heads": 4}, [12, 13, 12, 13, 14, 15, 14, 15]),
        ("stacked", 24, 8, {"num_attention_heads": 4}, [16, 17, 18, 19, 20, 21, 22, 23]),
        ("stacked", 14, 8, {"num_attention_heads": 4}, "not those"),
        ("interleaved", 10, 4, {"num_attention_heads": 2}, [3, 4, 8, 9]),
        ("interleaved", 3, 4, {"num_attention_heads": 2}, "3 rows"),
        ("second half", 8, 4, {}, [4, 5, 6, 7]),
        ("second half", 4, 4, {}, "4 rows"),
    ],
)
def test_columns_know_the_rows_they_come_from(layout: str, rows: int, columns: int, config: Any, expected: Any) -> None:
    found = producing_rows(layout, rows, columns, config)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert expected in found
    else:
        assert (found.tolist() if isinstance(found, Tensor) else found) == expected


class Fake:
    """As much of a block as scales in a norm need."""

    def __init__(self, norm: Tensor, dtype: torch.dtype) -> None:
        self.norm, self.dtype, self.sites = norm, dtype, {"a": (3, norm.numel())}

    def others(self) -> dict[str, Tensor]:
        return {"norm": self.stored("norm", self.norm)}

    def stored(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.dtype).float()

    def weight(self, site: str) -> Tensor:
        return torch.arange(3 * self.norm.numel(), dtype=torch.float32).view(3, -1)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_readers_get_what_a_norm_in_few_bits_was_really_divided_by(offset: float) -> None:
    norm = torch.tensor([1.0, -0.7, 0.0, 3e-39, -1.0, 0.3])
    block: Any = Fake(norm, torch.bfloat16)
    moved = Moved(block)
    place = Scalable("norm", ("a",), norm=True, offset=offset)
    wanted = torch.tensor([1.7, 0.31, 2.0, 3.3, 0.9, 1.003])
    moved.move(place, wanted)
    before, after = block.others()["norm"].double() + offset, moved.others["norm"].double() + offset
    scales = moved.columns["a"].double()
    torch.testing.assert_close(after * scales, before, rtol=1e-6, atol=1e-12)
    assert torch.equal(moved.weights["a"], block.weight("a") * moved.columns["a"])
    zero = (norm.bfloat16().float() + offset) == 0
    assert (scales[zero] == 1).all()
    assert ((scales / wanted - 1).abs()[~zero] < 0.1).logical_or(scales[~zero] == 1).all()
    assert (scales[:2] != 1).all()
