"""Families that nothing is written for: what is found in their modules and in the names that transformers maps.

The tiny models are those of bench/families.py. A few stand for the rest: each has something that none of the others has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from any_tiny import any_checkpoint
from runs import compress as run
from runs import steps
from tiny import TINY
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import compress  # noqa: F401  (registers the format with transformers)
from compress.architecture.config import sees
from compress.architecture.family import Scaling
from compress.architecture.inventory import take_inventory
from compress.architecture.known import family_of
from compress.blockwise.forward import last_hidden
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.source import Source
from compress.model.detect import find_family, infer

CPU = torch.device("cpu")
TOLERANCE = 2e-5  # experts and joined products add up in another order

REPRESENTATIVE = [
    "qwen3_5_moe",  # a model that sees, linear attention with a short convolution, experts fused on disk as (experts, out, in)
    "llama4_text",  # experts as (experts, in, out), called with the rows of all
    "gemma3n_text",  # four streams of hidden states, and a table of the tokens for each block
    "nemotron_h",  # blocks of one mixer each, experts without a gate, names with another prefix
    "deepseek_v4",  # several hidden states, and products in groups that are no linears
]
MORE = [
    "falcon",  # linears of a class of their own, blocks that give tuples
    "granitemoe",  # a fused tensor of another name on disk
    "olmo_hybrid",  # three tensors on disk that are one parameter
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_5",
    "qwen3_next",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen2_vl",
    "qwen2_5_vl",
    "llama4",
    "mistral3",
    "llava",
    "internvl",
    "smolvlm",
    "idefics3",
    "paligemma",
    "mllama",
    "glm4v",
    "glm46v",
    "lfm2",
    "lfm2_vl",
    "granitemoeshared",
    "granitemoehybrid",
    "phimoe",
    "minimax",
    "minimax_m2",
    "ernie4_5_moe",
    "kimi_linear",
    "falcon_h1",
    "bamba",
    "jamba",
    "gpt_neox",
    "bloom",
    "gptj",
    "codegen",
    "mpt",
    "laguna",
    "mimo_v2_flash",
    "hy_v3",
    "aya_vision",
    "cohere2_vision",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "smollm3",
    "ministral3",
    "llava_next",
    "llava_onevision",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = any_checkpoint(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get


def token_ids() -> torch.Tensor:
    return torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def whole(folder: Path, source: Source) -> torch.Tensor:
    build = AutoModelForImageTextToText if sees(source.config) else AutoModelForCausalLM
    loaded, said = build.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said.get("missing_keys")
    assert not said.get("mismatched_keys")
    with torch.no_grad():
        logits: torch.Tensor = loaded.eval()(input_ids=token_ids(), use_cache=False).logits
    return logits


def streamed(source: Source) -> torch.Tensor:
    model, hidden = last_hidden(source, token_ids(), torch.float32, CPU)
    with model.embeddings_and_head():
        return model.logits(token_ids(), hidden)


def check(folder: Path, out: Path, method: str, data: Path | None) -> None:
    source = Source.open(folder)
    original = whole(folder, source)
    torch.testing.assert_close(streamed(source), original, rtol=TOLERANCE, atol=TOLERANCE)
    inventory = take_inventory(source, find_family(source))
    claimed = [*{site.tensor for site in inventory.sites}, *inventory.copied, *inventory.dropped]
    assert sorted(claimed) == sorted(source.entries)
    assert inventory.sites
    run(folder, out, data, steps(method, bits=8, group_size=32))
    packed = PackedSource.open_packed(out)
    assert len(packed.table) == len([site for site in inventory.sites if site.block is not None or site.name == "*.*"])
    logits = whole(out, packed)
    torch.testing.assert_close(logits, streamed(packed), rtol=TOLERANCE, atol=TOLERANCE)
    assert 0 < (logits - original).norm() / original.norm() < 0.3


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_model_of_any_family_is_streamed_compressed_and_loaded(
    model_type: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    check(model(model_type), tmp_path / "out", "quant/rtn", None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*REPRESENTATIVE, *MORE])
def test_calibration_passes_through_any_family(model_type: str, model: Callable[[str], Path], ids: Path, tmp_path: Path) -> None:
    check(model(model_type), tmp_path / "out", "quant/gptq", ids)


def place(scaling: Scaling) -> tuple[str, frozenset[str], str]:
    return scaling.producer, frozenset(scaling.readers), scaling.rows


# What is written about layouts of rows in one linear for several, and about what an activation keeps, is more than a call shows.
WRITTEN_ONLY = ("stacked", "interleaved", "second half")


@pytest.mark.parametrize("family", [name for name in TINY if name not in ("gemma3", "gpt_oss")])
def test_what_a_call_shows_is_what_is_written(family: str, tiny: Callable[..., Path]) -> None:
    source, written = Source.open(tiny(family)), family_of(family)
    found = infer(source, 3, "")
    sites = {site.kind for site in take_inventory(source, written).sites if site.expert is None and site.block is not None}
    groups = {frozenset(group) & sites for group in written.taps} - {frozenset()}
    assert {frozenset(group) for group in found.taps} == groups
    assert found.norm_offset == written.norm_offset
    expected = {place(s): bool(s.where) for s in written.scalings if s.rows not in WRITTEN_ONLY}
    there = sites | {name.removesuffix(".weight") for name in found.keep}

    def read(readers: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name in readers if name in there or "*" in name)

    shown = {(producer, read(readers), rows) for producer, readers, rows in map(place, found.scalings)}
    wanted = {(producer, read(readers), rows): depends for (producer, readers, rows), depends in expected.items()}
    assert shown <= wanted.keys(), "nothing that is not written"
    attention = {one for one in wanted if one[2] == "values"} if family == "gemma2" else set()  # capped, so not torch's own
    assert shown >= {one for one, depends in wanted.items() if one[1] and not depends} - attention
