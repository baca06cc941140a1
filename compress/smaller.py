"""Sizes of a model and of what is left of it, and the config that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.calibration.claims import settings
from compress.calibration.families import Family
from compress.checkpoint import Source
from compress.errors import RecipeError
from compress.importance import Score


@dataclass(frozen=True)
class Wish:
    """What is to go: shares of heads, KV groups and channels, and a number of blocks."""

    heads: float = 0.0
    kv_groups: float = 0.0
    channels: float = 0.0
    blocks: int = 0
    score: Score = "fisher"
    repair: bool = True
    multiple: int = 64  # of what is kept of channels, where the model is wide enough


@dataclass(frozen=True)
class Sizes:
    """How much of everything a block has, before or after."""

    heads: int
    kv_groups: int
    head_dim: int
    channels: int
    blocks: int


def sizes_of(source: Source, family: Family) -> Sizes:
    """Return how many heads, KV groups, channels and blocks a model has."""
    config = settings(source)
    heads = int(config.get("num_attention_heads", 0))
    groups = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or config.get("hidden_size", 0) // max(heads, 1))
    channels = int(config.get(family.channels.setting, 0)) if family.channels else 0
    return Sizes(heads, groups, dim, channels, int(config["num_hidden_layers"]))


def _left(name: str, share: float, count: int, step: int) -> int:
    """How many of `count` stay, a multiple of `step`. Raises RecipeError where nothing would go, or everything."""
    if not 0 <= share < 1:
        raise RecipeError(f"--{name} {share}: expected a share from 0 to below 1, as 0.25")
    left = round((1 - share) * count / step) * step
    if share and not 0 < left < count:
        shares = ", ".join(f"{1 - n * step / count:.3g}" for n in range(count // step - 1, 0, -1)[:8]) or "none"
        raise RecipeError(f"--{name} {share}: of {count} only multiples of {step} can stay; shares that can go are {shares}")
    return left if share else count


def after(wish: Wish, family: Family, before: Sizes) -> Sizes:
    """Return what is left of a model. Raises RecipeError for what it does not have or what cannot be loaded afterwards."""
    if not any((wish.heads, wish.kv_groups, wish.channels, wish.blocks)):
        raise RecipeError("nothing to cut; give --heads, --kv-groups, --channels or --blocks")
    if (wish.heads or wish.kv_groups) and family.heads is None:
        raise RecipeError(f"--heads: a {family.model_type} checkpoint cannot say that it has fewer; cut --channels or --blocks")
    if wish.channels and family.channels is None:
        raise RecipeError(f"--channels: not known for {family.model_type}; cut --blocks")
    if not 0 <= wish.blocks < before.blocks:
        raise RecipeError(f"--blocks {wish.blocks}: expected 1 to {before.blocks - 1} of {before.blocks}")
    if wish.heads and wish.kv_groups:
        raise RecipeError("--heads: not with --kv-groups, which takes all heads of a group; leave one of them out")
    groups = _left("kv-groups", wish.kv_groups, before.kv_groups, 1)
    per_group = before.heads // max(before.kv_groups, 1)
    # As many of each KV group, which keep their number; where every head has a group of its own, both go.
    heads = (
        groups * per_group
        if wish.kv_groups
        else _left("heads", wish.heads, before.heads, 1 if per_group == 1 else before.kv_groups)
    )
    step = wish.multiple
    while step > 1 and (step * 8 > before.channels or before.channels % step):
        step //= 2
    channels = _left("channels", wish.channels, before.channels, step)
    return Sizes(heads, heads if per_group == 1 else groups, before.head_dim, channels, before.blocks - wish.blocks)


def smaller_config(config: dict[str, Any], family: Family, before: Sizes, left: Sizes, kept: list[int]) -> dict[str, Any]:
    """Return a config with other sizes; settings that speak of single blocks go with them."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        return {**config, "text_config": smaller_config(inner, family, before, left, kept)}
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    result["num_hidden_layers"] = left.blocks
    for key, value in config.items():
        if isinstance(value, list) and len(value) == before.blocks and key == "layer_types":
            result[key] = [value[block] for block in kept]
        elif key in ("mlp_only_layers", "no_rope_layers") and isinstance(value, list):
            binary = key == "no_rope_layers" and len(value) == before.blocks
            result[key] = [value[b] for b in kept] if binary else [kept.index(b) for b in value if b in kept]
        elif key in ("max_window_layers", "first_k_dense_replace") and isinstance(value, int):
            result[key] = sum(block < value for block in kept)
    if left.heads < before.heads:
        result |= {"num_attention_heads": left.heads, "num_key_value_heads": left.kv_groups, "head_dim": before.head_dim}
    if family.channels is not None and left.channels < before.channels:
        result[family.channels.setting] = left.channels
    return result
