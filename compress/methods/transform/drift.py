"""Drift correction: weights make up for what compressed blocks did to their inputs (asymmetric calibration, arXiv 2504.02692).

Problem     after the compressed blocks a linear reads x where it reads y in the original model. It should give W y: minimise
            sum over tokens |W y - Q x|^2 rather than |W x - Q x|^2. With H = mean x x^T and C = mean (y - x) x^T,
                |W y - Q x|^2 = (Q - W*) H (Q - W*)^T + a term without Q,    W* = W + W C H^-1
            so any rounding that is good for W under H will do, with W* in place of W.
Steps       1. Every batch passes through the block as it is twice, with its input after the compressed blocks and with that in
               the original model; H and C of every input are collected. Experts see the tokens that the first pass routes to them
               in both.
            2. W <- W + share * n / (n + in) * W C (H + damp mean(diag H) I)^-1, n the tokens of the input.
            The inputs of o_proj and down_proj drift partly because of what the block's own q, k, v, gate and up read, which
            step 2 has corrected by then: the method that rounds takes statistics of the corrected block.
Shapes      W (out, in), H and C (in, in).
Defaults    share 0.3. GPTQ, mean KL to the original on held-out text by share. Small llama of 6 blocks, groups of 128, 3 bits:
            0.0287 (0), 0.0265 (0.25), 0.0258 (0.5), 0.0254 (0.75); a real model of 30 blocks (SmolLM2), groups of 64, 4 bits:
            0.173 (0), 0.152 (0.1), 0.1325 (0.3), 0.483 (0.75). Every block of a deep model corrects the same error of the
            residual stream again, and W* shrinks outputs towards what noisy inputs can predict: much of it does harm.
            n / (n + in) keeps experts that few tokens reach from overfitting them.
Failures    the first block has no drift. Where the inputs of a linear are few and similar, damping decides.
Source      the asymmetric objective is that of GPTAQ, which changes GPTQ's update column by column; taken out of that loop
            as a new target, it serves every rounding and every pruning alike.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.statistics import Drift, Statistics
from compress.errors import CalibrationError
from compress.methods.block import Block, TransformResult
from compress.methods.method import Method
from compress.methods.solvers.error_feedback import full_precision


def correction(second: Tensor, cross: Tensor, damp: float) -> Tensor | None:
    """Return C H^-1 (in, in) from sums of x x^T and of (y - x) x^T, both (in, in); None where H cannot be inverted."""
    damped = second.clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, damp * mean, 1.0))
    lower, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else torch.cholesky_solve(cross.T, lower).T


class DriftCorrection(Method):
    """Options of drift correction."""

    may_need: ClassVar[tuple[type[Statistics], ...]] = (Drift,)
    scope: ClassVar[Literal["site", "block"]] = "block"
    compares: ClassVar[bool] = True

    share: Annotated[float, Field(gt=0, le=1, description="of the drift that weights make up for")] = 0.3
    damp: Annotated[float, Field(gt=0, le=100, description="added to the diagonal of the Hessian, over its mean")] = 0.01

    def __call__(self, block: Block) -> TransformResult:
        """Correct the weights of a block."""
        weights: dict[str, Tensor] = {}
        notes: dict[str, Any] = {}
        with torch.no_grad(), full_precision():
            for sites, drift in block.drift_in_turn():
                if not bool(drift.cross.any()):
                    notes |= {site: {"moved": 0.0} for site in sites}
                    continue
                if not bool(drift.second.isfinite().all() and drift.cross.isfinite().all()):
                    raise CalibrationError(
                        f"{sites[0]}: its inputs are not finite; look for activations that overflow the model's dtype"
                    )
                change = correction(drift.second, drift.cross, self.damp)
                if change is None:
                    notes |= {
                        site: {"moved": 0.0, "fallback": "as it was, the Hessian is not positive definite"} for site in sites
                    }
                    continue
                change *= self.share * drift.tokens / (drift.tokens + len(change))
                for site in sites:
                    before = block.weight(site)
                    step = before.double() @ change
                    weights[site] = (before + step).float()
                    notes[site] = {"moved": _moved(before.double(), step, drift.second)}
        return TransformResult(weights, notes=notes)


def _moved(weight: Tensor, step: Tensor, second: Tensor) -> float:
    """The change's share of the output: tr(S H S^T) / tr(W H W^T) for a step S of weight W (out, in)."""
    whole = float(((weight @ second) * weight).sum())
    return float(((step @ second) * step).sum()) / whole if whole > 0 else 0.0


METHOD = DriftCorrection
