"""What a recipe may say, as strict types."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from compress import registry
from compress.recipe.data import Data

SHRINK = "shrink"
LONGEST_GLOB = 1000  # characters, as of the name of a tensor
_STAGE_KINDS = {"transforms": ("transform",), "tuning": ("tune", "retrain"), "retraining": ("retrain",)}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _short_globs(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Refuse patterns that would take long to compare with every name of a model."""
    for glob in (value,) if isinstance(value, str) else value:
        if len(glob) > LONGEST_GLOB:
            raise ValueError(f"a pattern of {len(glob):,} characters, {glob[:20]!r}...; expected at most {LONGEST_GLOB:,}")
    return value


class Step(_Strict):
    """A method for the sites whose disk names match."""

    match: str | tuple[str, ...]
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    min_tokens: Annotated[int, Field(ge=0)] | None = None  # None: the number of columns for experts, else 0
    fallback: str = SHRINK  # below min_tokens: a method, or "shrink" towards the mean Hessian of the block's experts
    _short = field_validator("match")(_short_globs)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs of this step."""
        return (self.match,) if isinstance(self.match, str) else self.match

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        stages = [kind for kinds in _STAGE_KINDS.values() for kind in kinds]
        known = registry.methods(tuple(kind for kind in registry.KINDS if kind not in stages))
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"no method {value!r}; known are {', '.join(known)}{hint}")
        return value

    @field_validator("fallback")
    @classmethod
    def _known_fallback(cls, value: str) -> str:
        return value if value == SHRINK else cls._known_method(value)


class Stage(_Strict):
    """A method that runs on every block before or after its weights are compressed, on the sites whose disk names match."""

    method: str
    match: str | tuple[str, ...] = "*.*"
    options: dict[str, Any] = Field(default_factory=dict)
    _short = field_validator("match")(_short_globs)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs of this stage."""
        return (self.match,) if isinstance(self.match, str) else self.match


class Retrain(Stage):
    """Training of the whole compressed model on the original's predictions, for the weights whose disk names match."""

    steps: Annotated[int, Field(ge=1)] = 200
    batch: Annotated[int, Field(ge=1)] = 8  # windows of text per step
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of both models' predictions
    labels: Annotated[float, Field(ge=0)] = 0.0  # weight of the text's cross-entropy relative to the divergence
    data: Data | None = None  # the recipe's if None


class Watch(_Strict):
    """The check during a run: windows held out of the calibration pass through the original and the compressed blocks."""

    windows: Annotated[int, Field(ge=1)] = 4
    limit: Annotated[float, Field(gt=0)] = 1.0  # |compressed - original| / |original| of hidden states that stops the run


class Recipe(_Strict):
    """Everything, except the source, that determines the bytes of a result."""

    description: str = ""
    transforms: tuple[Stage, ...] = ()  # changes of a block before it is calibrated, in this order
    steps: tuple[Step, ...]
    tuning: tuple[Stage, ...] = ()  # adjustments of a block's compressed weights, in this order
    retraining: tuple[Retrain, ...] = ()  # training of the whole compressed model, in this order
    data: Data | None = None
    # Inputs of the statistics: those after the compressed blocks, or the original's own, which hold for any recipe.
    inputs: Literal["compressed", "original"] = "compressed"
    copy_: tuple[str, ...] = Field(default=(), alias="copy")  # globs of tensors to copy although no family rule names them
    drop: tuple[str, ...] = ()  # globs of tensors to leave out
    watch: Watch | None = None  # stop early when the model has broken
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the calibration's forward passes
    batch_tokens: Annotated[int, Field(ge=1)] = 8192  # tokens that pass through a block at a time
    max_shard_size: str = "5GB"

    _short = field_validator("copy_", "drop")(_short_globs)

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        parse_size(value)
        return value

    @field_validator("transforms", "tuning", "retraining")
    @classmethod
    def _right_kind(cls, value: tuple[Stage, ...], info: ValidationInfo) -> tuple[Stage, ...]:
        known = registry.methods(_STAGE_KINDS[str(info.field_name)])
        for stage in value:
            if stage.method not in known:
                close = difflib.get_close_matches(stage.method, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"no method {stage.method!r} here; known are {', '.join(known)}{hint}")
        return value

    @model_validator(mode="after")
    def _some_step(self) -> Self:
        if not self.steps:
            raise ValueError("a recipe needs at least one step")
        return self


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as 5GB, 500MB or 4GiB. Raises ValueError."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    digits = text.strip().rstrip("aAbBiIgGkKmMtT ").strip()
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        size = int(float(digits) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write it as 5GB, 500MB or 4GiB") from None
    if size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return size
