"""The `data:` section of a recipe: which text, how many windows, how long. Recipes are read without torch, so this has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")


@dataclass(frozen=True)
class Preset:
    """Where a dataset lies on the Hugging Face Hub and how its rows are read."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    streaming: bool | None = None  # None: by its size
    rows_per_document: int = 1  # more than one where a row is a line of running text, not a document


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "wikitext2": Preset("Salesforce/wikitext", "wikitext-2-raw-v1", column="text", streaming=False, rows_per_document=1000),
        "c4": Preset("allenai/c4", "en", column="text", streaming=True),
        "pile": Preset("NeelNanda/pile-10k", column="text", streaming=False),
        "ultrachat": Preset("HuggingFaceH4/ultrachat_200k", split="train_sft", column="messages", streaming=True),
        "code": Preset("codeparrot/codeparrot-clean-valid", column="content", streaming=True),
        "math": Preset("open-web-math/open-web-math", column="text", streaming=True),
    }
)


class Data(BaseModel):
    """The calibration data of a run.

    `samples` and `length` that are not given follow the data: an .npy file keeps its own shape, and a model with a shorter
    context gets shorter windows. Given ones are taken at their word. What was given is known from `model_fields_set`, so a
    recipe that is saved for later must be dumped with `exclude_unset=True`, or with the numbers that were used in the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1, description=f"a preset ({', '.join(PRESETS)}), a dataset of the Hub, or a {', '.join(SUFFIXES)} file"
    )
    samples: int = Field(default=256, ge=1, description="windows")
    length: int = Field(default=2048, ge=2, description="tokens of a window")
    seed: int = Field(default=0, ge=0, lt=2**63, description="draws the documents and the windows")
    split: str | None = Field(default=None, description="split of a dataset; train, or the preset's")
    config: str | None = Field(default=None, description="configuration of a dataset, or the preset's")
    column: str | None = Field(default=None, description="column with the text or the messages; text, messages or conversations")
    chat_template: bool | None = Field(
        default=None,
        description="true: rows must hold messages, written by the tokenizer's chat template; false: their contents as "
        "plain text; not given: the template wherever a row holds messages",
    )

    @property
    def suffix(self) -> str | None:
        """The suffix when `name` is a local file of a kind that is read, else None."""
        suffix = PurePath(self.name).suffix.lower()
        return suffix if self.name not in PRESETS and suffix in SUFFIXES else None

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        """Refuse what would be ignored, so that a setting in the wrong place is not lost without a word."""
        if self.suffix is None:
            return self
        unused = ["split", "config"] if self.suffix in (".jsonl", ".parquet") else ["split", "config", "column", "chat_template"]
        for field in unused:
            if getattr(self, field) is not None:
                raise ValueError(f"`{field}` means nothing for a {self.suffix} file; remove it")
        return self
