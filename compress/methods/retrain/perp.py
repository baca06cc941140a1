"""PERP: what a pruned block lost is learned back by few parameters (Zimmer et al., arXiv 2312.15230).

Problem   minimise the squared error of a block's outputs over its norms, its biases and, in its pruned weights, over what few
          parameters can reach without making any zero nonzero.
Weights   W + c M (BA) with a pair of thin factors, merged at the end (MaskLoRA); see `trainable_weight` for the others:
          `scale_lora`, `lora_prune`, `full` (all kept weights), `lora` (a low-rank part of its own), `none` (norms and biases
          alone).
Codes     stay: of a quantized base, scales and offsets are trained, or with `lora` an added low-rank part.
Training  `block_training`; of the whole model against the original's predictions with `compress retrain`.
Zeros     stay exactly 0: in training, as gradients pass the mask; in merging, which is masked; and on disk, where a separate
          mask says what is kept.
Bound     with `perturbation` p and `lora`, the weight stays within p |W| of the original throughout training, or within its
          distance at the start if that is larger, in the Frobenius norm; see `trainable_weight`. PELA (arXiv 2310.10700) limits
          the perturbation of factors in training by a term of the loss; this hard bound is ours.
Defaults  rank 16, alpha 32 (the paper's code). Rates and rounds are ours; docs/results.md has their results. The paper starts
          ScaleLoRA from equal numbers in both factors, whose rows then stay equal for ever and have rank one; ours start as
          LoRA's do.
Biases    existing ones; with `add_biases` every linear gets one where the model's config has a setting for it (llama:
          `attention_bias` and `mlp_bias`; qwen3: `attention_bias`), which is then set. They are stored, and count in the bytes.
Failures  `lora_prune` trains a weight other than the one it stores, and loses at high sparsity.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.methods.retrain._options import Retraining
from compress.methods.solvers.trainable_weight import Bound, Trainable, Variant, trainable
from compress.weights.low_rank import low_rank_bits
from compress.weights.weight import CompressedWeight


class Perp(Retraining):
    """Options of parameter-efficient retraining."""

    weights: Annotated[Variant, Field(description="how values of dense bases move")] = "mask_lora"
    rank: Annotated[int, Field(ge=1, description="of the factors")] = 16
    alpha: Annotated[float, Field(gt=0, description="their product counts alpha / rank times")] = 32.0
    add_biases: Annotated[bool, Field(description="give linears without a bias one, where the config has a place for it")] = False
    perturbation: Annotated[
        float, Field(ge=0, description="largest |V - W| over |W| that factors of `lora` may train a weight to; 0: no bound")
    ] = 0.0
    scales: Annotated[bool, Field(description="train scales and offsets of quantized bases")] = True

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.perturbation and self.weights != "lora":
            raise ValueError(f"perturbation bounds the factors of `weights: lora`; with {self.weights} leave it out")
        return self

    def added_bits(self, shape: tuple[int, int]) -> int:
        """Bits that are added to a weight of this shape (out, in)."""
        return low_rank_bits(shape, self.rank) if self.weights == "lora" else 0

    def trainable(
        self, weight: CompressedWeight, dense: Tensor, square: Tensor | None, generator: torch.Generator
    ) -> Trainable | None:
        """Return the trainable part of a weight."""
        bound = Bound(dense, self.perturbation) if self.perturbation else None
        return trainable(weight, self.weights, self.rank, self.alpha, self.scales, generator, bound)


METHOD = Perp
