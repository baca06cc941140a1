"""Numbers of a model from its config: context, vocabulary, blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.architecture.family import Family
from compress.checkpoint.source import Source
from compress.errors import CheckpointError


def settings(source: Source) -> dict[str, Any]:
    """The config of the language model: of a model that also sees or hears, its text part on top of the rest."""
    text = source.config.get("text_config")
    return {**source.config, **text} if isinstance(text, dict) else source.config


_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # settings that have the number of blocks
_KINDS = ("layers_block_type", "layer_types")  # and those that have an entry for each


def sees(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that takes images too, which has another class of transformers."""
    return isinstance(config.get("vision_config"), dict)


def context_length(source: Source) -> int | None:
    """The longest text that the model was made for, in tokens, if the config tells."""
    length = settings(source).get("max_position_embeddings", settings(source).get("n_positions"))
    return length if isinstance(length, int) else None


def vocabulary(source: Source) -> int:
    """Number of token ids. Raises CheckpointError."""
    size = settings(source).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{source.folder}/config.json: vocab_size is {size!r}; expected a whole number")
    return size


def tied(source: Source, family: Family) -> bool:
    """Whether the head is the embedding."""
    return bool(settings(source).get("tie_word_embeddings", family.tied))


def number_of_blocks(source: Source) -> int:
    """Return how many decoder blocks the config says there are. Raises CheckpointError."""
    found = settings(source)
    count = next((found[key] for key in _BLOCKS if found.get(key) is not None), None)
    if count is None and (kinds := next((found[key] for key in _KINDS if isinstance(found.get(key), list)), None)):
        count = len(kinds)
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"{source.folder}/config.json: num_hidden_layers is {count!r}; expected a whole number of blocks")
    return count
