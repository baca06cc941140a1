"""Sizes of a model before and after cutting, and the config that states them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from compress.architecture.config import number_of_blocks, settings
from compress.architecture.family import Channels, Family
from compress.checkpoint.source import Source
from compress.errors import RecipeError
from compress.structured_pruning.importance import GATED, GRADIENTS, Score

CHANNELS = ("channels", "expert_channels", "shared_channels")  # the sizes that `--channels` cuts, all by the same share
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names in configs


@dataclass(frozen=True)
class Wish:
    """What to cut: shares of heads, KV groups, channels and experts, and a number of blocks."""

    heads: float = 0.0
    kv_groups: float = 0.0
    channels: float = 0.0
    blocks: int = 0
    experts: float = 0.0
    score: Score = "fisher"
    repair: bool = True
    uneven: bool = False  # blocks share the remaining KV groups and channels by need
    rounds: int = 1  # rounds of removal; the other groups are scored again after each
    multiple: int = 64  # the number of kept channels is a multiple of this where the model is wide enough


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, before or after cutting."""

    heads: int
    kv_groups: int
    head_dim: int
    channels: int
    blocks: int
    experts: int = 0
    expert_channels: int = 0
    shared_channels: int = 0  # channels of experts that see all tokens


def sizes_of(source: Source, family: Family) -> Sizes:
    """Return how many heads, KV groups, channels and blocks a model has."""
    config = settings(source)
    heads = int(config.get("num_attention_heads", config.get("n_head", 0)))
    groups = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or config.get("hidden_size", config.get("n_embd", 0)) // max(heads, 1))
    experts = next((int(config[key]) for key in EXPERT_COUNTS if key in config), 0) if family.experts else 0
    counts = {c.size: _channels(config, c) for c in family.channels if _has(source, family, c)}
    return Sizes(heads, groups, dim, counts.pop("channels", 0), number_of_blocks(source), experts, **counts)


def _channels(config: dict[str, Any], channels: Channels) -> int:
    """The value of the setting of a kind of channels, or its default."""
    return int(config.get(channels.setting) or 4 * int(config.get(channels.width or "", 0)))


def _has(source: Source, family: Family, channels: Channels) -> bool:
    """Whether a model has channels of this kind: all of its blocks may have experts, or none."""
    layout = family.experts
    if channels.size == "expert_channels":
        return layout is not None and any(f".{layout.disk}." in name for name in source.entries)
    return any(name.endswith(f".{channels.output}.weight") for name in source.entries)


def _left(name: str, share: float, count: int, step: int) -> int:
    """How many of `count` stay, a multiple of `step`. Raises RecipeError where nothing or everything would go."""
    if not 0 <= share < 1:
        raise RecipeError(f"--{name} {share}: expected a share from 0 to below 1, as 0.25")
    left = round((1 - share) * count / step) * step
    if share and not 0 < left < count:
        shares = ", ".join(f"{1 - n * step / count:.3g}" for n in range(count // step - 1, 0, -1)[:8]) or "none"
        raise RecipeError(f"--{name} {share}: of {count} only multiples of {step} can stay; shares that can go are {shares}")
    return left if share else count


def after(wish: Wish, family: Family, before: Sizes) -> Sizes:
    """Return the sizes after cutting. Raises RecipeError for what the model does not have or could not be loaded without."""
    if not any((wish.heads, wish.kv_groups, wish.channels, wish.blocks, wish.experts)):
        raise RecipeError("nothing to cut; give --heads, --kv-groups, --channels, --experts or --blocks")
    if (wish.heads or wish.kv_groups) and family.heads is None:
        raise RecipeError(f"--heads: a {family.model_type} checkpoint cannot say that it has fewer; cut --channels or --blocks")
    if wish.channels and not any(getattr(before, channels.size) for channels in family.channels):
        raise RecipeError(f"--channels: not known for {family.model_type}; cut --blocks")
    if wish.experts and not before.experts:
        raise RecipeError(f"--experts: {family.model_type} has none, or its config does not say how many; cut something else")
    if wish.uneven:
        _check_uneven(wish, family, before)
    if wish.rounds < 1:
        raise RecipeError(f"--rounds {wish.rounds}: expected 1 or more")
    if wish.rounds > 1 and (wish.uneven or wish.score not in GATED or not (wish.heads or wish.kv_groups or wish.channels)):
        raise RecipeError(
            f"--rounds {wish.rounds}: heads and channels go in rounds by scores of {', '.join(GATED)}, as many of each block; "
            "leave --rounds out, or choose these"
        )
    if not 0 <= wish.blocks < before.blocks:
        raise RecipeError(f"--blocks {wish.blocks}: expected 1 to {before.blocks - 1} of {before.blocks}")
    if wish.heads and wish.kv_groups:
        raise RecipeError("--heads: not with --kv-groups, which takes all heads of a group; leave one of them out")
    groups = _left("kv-groups", wish.kv_groups, before.kv_groups, 1)
    per_group = before.heads // max(before.kv_groups, 1)
    # Each KV group loses the same number of heads, and all groups stay; where every head has a group of its own, both go.
    heads = (
        groups * per_group
        if wish.kv_groups
        else _left("heads", wish.heads, before.heads, 1 if per_group == 1 else before.kv_groups)
    )
    groups = heads if per_group == 1 else groups
    experts = _left("experts", wish.experts, before.experts, 1)
    counts = {
        name: _left("channels", wish.channels, count, channel_step(wish, count)) if count else 0
        for name, count in ((name, getattr(before, name)) for name in CHANNELS)
    }
    return replace(before, heads=heads, kv_groups=groups, blocks=before.blocks - wish.blocks, experts=experts, **counts)


def channel_step(wish: Wish, count: int) -> int:
    """Return the number of which the channels kept of `count` are a multiple."""
    step = wish.multiple
    while step > 1 and (step * 8 > count or count % step):
        step //= 2
    return step


def _check_uneven(wish: Wish, family: Family, before: Sizes) -> None:
    """Raise RecipeError for what cannot differ between blocks."""
    if not (wish.kv_groups or wish.channels):
        raise RecipeError("--uneven: only KV groups and channels can differ between blocks; give --kv-groups or --channels")
    if wish.heads:
        raise RecipeError("--uneven: not with --heads, whose number per KV group is one for all blocks; give --kv-groups instead")
    if wish.channels and before.expert_channels:
        raise RecipeError("--uneven: not with --channels of experts, which are one tensor in transformers; give --kv-groups")
    if wish.kv_groups and family.heads is not None and (family.heads.joint or family.heads.single):
        raise RecipeError(
            f"--uneven: {family.model_type} takes the number of its heads from config.json, one for all blocks; give --channels"
        )
    if wish.score not in GRADIENTS:
        raise RecipeError(
            f"--uneven: scores of {wish.score} do not compare between blocks; use one of {', '.join(GRADIENTS)}, from gradients"
        )


def expert_sets(config: dict[str, Any], left: Sizes, before: Sizes) -> int:
    """Return how many sets of neighbouring experts a router chooses among, each of which has to keep the same number.

    Raises RecipeError where a token would be sent to more experts than there are.
    """
    sets = int(config.get("n_group") or 1)
    most = left.experts
    if sets > 1:
        if left.experts % sets or before.experts % sets:
            raise RecipeError(
                f"--experts: {left.experts} would stay, in {sets} sets that need the same number; cut another share"
            )
        most = int(config.get("topk_group") or sets) * left.experts // sets
    if (each := int(config.get("num_experts_per_tok") or config.get("moe_topk") or 1)) > most:
        raise RecipeError(f"--experts: a token goes to {each} experts, and could choose from {most}; cut a smaller share")
    return sets


def smaller_config(config: dict[str, Any], family: Family, before: Sizes, left: Sizes, kept: list[int]) -> dict[str, Any]:
    """Return a config with the new sizes; settings of single blocks are reduced to the blocks kept."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        return {**config, "text_config": smaller_config(inner, family, before, left, kept)}
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    result["n_layer" if "n_layer" in config else "num_hidden_layers"] = left.blocks
    for key, value in config.items():
        if isinstance(value, list) and len(value) == before.blocks and key == "layer_types":
            result[key] = [value[block] for block in kept]
        elif key in ("mlp_only_layers", "no_rope_layers") and isinstance(value, list):
            binary = key == "no_rope_layers" and len(value) == before.blocks
            result[key] = [value[b] for b in kept] if binary else [kept.index(b) for b in value if b in kept]
        elif key in ("max_window_layers", "first_k_dense_replace") and isinstance(value, int):
            result[key] = sum(block < value for block in kept)
    if left.heads < before.heads:
        result |= {"num_attention_heads": left.heads, "num_key_value_heads": left.kv_groups}
        if family.heads is not None and family.heads.setting is not None:
            result[family.heads.setting] = before.head_dim
    for channels in family.channels:
        if getattr(left, channels.size) < getattr(before, channels.size):
            result[channels.setting] = getattr(left, channels.size)
    if left.experts < before.experts:
        result |= {key: left.experts for key in EXPERT_COUNTS if key in config}
    return result
