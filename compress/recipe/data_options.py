"""A text as a call or a command line names it. Every command has it, so nothing that reads YAML is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataOptions:
    """A text, and how much of it is drawn. What is None is left to the recipe, or to the text's own defaults.

    `name`: a .txt, .jsonl, .parquet or .npy file, builtin (the text of this package), self (text that the model writes), a preset
    (c4, wikitext2, ...) or a dataset of the Hub; `samples` windows of `length` tokens, drawn by `seed`; `chat_template`: whether
    messages are written with the tokenizer's template; `bos`: whether windows begin with the tokenizer's bos token.
    """

    name: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    chat_template: bool | None = None
    bos: bool | None = None

    def values(self) -> dict[str, Any]:
        """The `data:` section of a recipe, as far as it is given."""
        return {key: value for key, value in asdict(self).items() if value is not None}
