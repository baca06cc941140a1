"""The `data:` section of a recipe: which text, how many windows, how long. Recipes are read without torch, so this has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
BUILTIN = "builtin"  # the mixed text that is part of this package
SELF = "self"  # text that the model itself writes
OWN = (BUILTIN, SELF)  # texts that are always there
OWN_SHAPE = (128, 512)  # their windows, and tokens of a window, where nothing is asked for


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

    `samples` and `length` that are not given follow the data: an .npy file keeps its own shape, `builtin` and `self` give 128
    windows of 512 tokens, and a model with a shorter context gets shorter windows. Given ones are taken at their word. What was
    given is known from `model_fields_set`, so a recipe that is saved for later must be dumped with `exclude_unset=True`, or with
    the numbers that were used in the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1,
        description=f"builtin, self, a preset ({', '.join(PRESETS)}), a dataset of the Hub, or a {', '.join(SUFFIXES)} file",
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
    bos: bool | None = Field(
        default=None,
        description="true: every window begins with the tokenizer's bos token; false: nothing is put in front; not given: as "
        "the tokenizer itself begins a text",
    )

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and tokens of a window: what was given, or the defaults for this kind of text."""
        samples, length = OWN_SHAPE if self.name in OWN else (self.samples, self.length)
        given = self.model_fields_set
        return self.samples if "samples" in given else samples, self.length if "length" in given else length

    @property
    def said(self) -> str:
        """What is said of a text that is neither a file nor a dataset; empty for others."""
        windows = "{} windows of {} tokens".format(*self.shape)
        if self.name == BUILTIN:
            return f"Calibration text: builtin, {windows} of the text that comes with compress; --data gives another"
        return f"Calibration text: self, {windows} that the model itself writes" if self.name == SELF else ""

    @property
    def suffix(self) -> str | None:
        """The suffix when `name` is a local file of a kind that is read, else None."""
        suffix = PurePath(self.name).suffix.lower()
        return suffix if self.name not in PRESETS and suffix in SUFFIXES else None

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        """Refuse what would be ignored, so that a setting in the wrong place is not lost without a word."""
        unused: list[str] = []
        if self.name in OWN:
            unused = ["split", "config", "column"]
        elif self.suffix is not None:
            unused = ["split", "config"] + ([] if self.suffix in (".jsonl", ".parquet") else ["column", "chat_template"])
        if self.suffix == ".npy":
            unused.append("bos")
        what = self.name if self.name in OWN else f"a {self.suffix} file"
        for field in unused:
            if getattr(self, field) is not None:
                raise ValueError(f"`{field}` means nothing for {what}; remove it")
        return self
