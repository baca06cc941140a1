"""Options that all methods of retraining share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.methods.block import Block, TuningResult
from compress.methods.method import Method, StepBatches
from compress.methods.solvers.block_training import Settings, reconstruct
from compress.methods.solvers.trainable_weight import Trainable
from compress.weights.weight import CompressedWeight


class Retraining(Method):
    """Options of every method of retraining: block by block in `tuning:`, or the whole model with `compress retrain`."""

    scope: ClassVar[Literal["site", "block"]] = "block"
    compares: ClassVar[bool] = True

    epochs: Annotated[int, Field(ge=1, le=1000, description="rounds over the calibration, per block")] = 8
    batches: StepBatches = 1
    rate: Annotated[float, Field(gt=0, le=1, description="largest step of AdamW for the factors of LoRA")] = 2e-3
    relative_rate: Annotated[
        float, Field(gt=0, le=1, description="the same for norms, biases, scales and weights, relative to their size")
    ] = 5e-3
    norms: Annotated[bool, Field(description="train norms too")] = True
    biases: Annotated[bool, Field(description="train biases that the model has")] = True
    original: Annotated[
        float, Field(ge=0, le=1, description="target: 1 what the original gives for its own input, 0 for the compressed one's")
    ] = 1.0

    def statistics(self) -> tuple[type[Statistics], ...]:
        """The statistics of inputs that `moving` is to be given."""
        return ()

    def trainable(
        self, weight: CompressedWeight, dense: Tensor, square: Tensor | None, generator: torch.Generator
    ) -> Trainable | None:
        """Return what moves of a weight, given the original's (out, in) and the mean square of its input's channels (in,)."""
        raise NotImplementedError

    def __call__(self, block: Block, weights: dict[str, CompressedWeight]) -> TuningResult:
        """Train the weights of a block so that it gives what the original's does."""
        settings = Settings(
            self.epochs, self.batches, self.rate, self.relative_rate, self.norms, self.biases, self.original, self.statistics()
        )
        return reconstruct(block, weights, self.trainable, settings)
