"""GRPO (arXiv 2402.03300) with the options of DAPO (2503.14476), Dr. GRPO (2503.20783) and GSPO (2507.18071)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from services.kit.config import Model
from services.trainer.algorithms.base import Algorithm, FloatArray, LossBatch

if TYPE_CHECKING:
    import torch

# Added to the standard deviation, so that nearly equal rewards are not blown up.
_EPSILON = 1e-6


class GRPO(Algorithm):
    """Advantages against the group in units of its standard deviation, and a clipped policy ratio.

    Ratios and KL are against the policy that opens the iteration.
    """

    settings: Settings

    class Settings(Model):
        """Settings of GRPO."""

        scale_by_std: bool = True
        """Divide advantages by the standard deviation of the group's rewards; Dr. GRPO does not."""
        clip_low: float = Field(0.2, gt=0, le=1)
        """A ratio below 1 minus this gets no gradient from a negative advantage."""
        clip_high: float = Field(0.2, gt=0, allow_inf_nan=False)
        """A ratio above 1 plus this gets no gradient from a positive advantage; DAPO takes 0.28 (clip-higher)."""
        dual_clip: float = Field(0.0, ge=0, allow_inf_nan=False)
        """Ratio above which a negative advantage gives no gradient either; above 1 + clip_high, such as 3; 0 is off."""
        ratio: Literal["token", "sequence"] = "token"
        """Ratio of each token, or the geometric mean of a response's ratios for all of its tokens (GSPO)."""
        aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
        """token_mean: the mean over the minibatch's tokens (DAPO). sequence_mean: over responses of means over their
        tokens (GRPO's paper). constant: over responses of sums divided by `update.token_scale` (Dr. GRPO)."""
        kl_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
        """Weight in the loss of the KL from the policy that opens the iteration, by its k3 estimate; 0 is none."""

        @model_validator(mode="after")
        def _check_dual_clip(self) -> Self:
            if 0 < self.dual_clip <= 1 + self.clip_high:
                raise ValueError(f"dual_clip has to be 0 or above 1 + clip_high, which is {1 + self.clip_high:g}")
            return self

    def advantages(self, rewards_K: FloatArray) -> FloatArray:
        """Returns r_j minus the group's mean, divided by its standard deviation (of a sample, n - 1)."""
        centered_K: FloatArray = rewards_K - rewards_K.mean()
        if not self.settings.scale_by_std or len(rewards_K) == 1:
            return centered_K
        return np.asarray(centered_K / (rewards_K.std(ddof=1) + _EPSILON))

    def loss(self, batch: LossBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the aggregated tokens of -min(rho A, clip(rho) A) * importance + kl_coef * k3; k3 = e^d - 1 - d,
        d = log pi_ref - log pi.
        """
        options = self.settings
        ratios_T, advantages_T = self._ratios(batch), batch.advantages_N[batch.sequence_T]
        clipped_T = ratios_T.clamp(1 - options.clip_low, 1 + options.clip_high)
        capped_T = ratios_T.clamp(max=options.dual_clip) if options.dual_clip else ratios_T
        losses_T = -(capped_T * advantages_T).minimum(clipped_T * advantages_T) * batch.importance_T
        if options.kl_coef:
            distance_T = batch.reference_logprobs_T - batch.logprobs_T
            losses_T = losses_T + options.kl_coef * (distance_T.exp() - 1 - distance_T)
        low_T = (ratios_T < 1 - options.clip_low) & (advantages_T < 0) & batch.trained_T
        high_T = (ratios_T > 1 + options.clip_high) & (advantages_T > 0) & batch.trained_T
        return self._aggregate(batch, losses_T), {"ratio_clip_low": low_T.sum(), "ratio_clip_high": high_T.sum()}

    def _ratios(self, batch: LossBatch) -> torch.Tensor:
        """Returns pi / pi_ref of each token, or of its response: exp of the mean over the response's tokens."""
        shifts_T = batch.logprobs_T - batch.reference_logprobs_T
        if self.settings.ratio == "token":
            return shifts_T.exp()
        return (batch.sum_by_trajectory(shifts_T) / batch.tokens_N).exp()[batch.sequence_T]

    def _aggregate(self, batch: LossBatch, losses_T: torch.Tensor) -> torch.Tensor:
        """Returns the micro-batch's part of the minibatch's loss."""
        sums_N = batch.sum_by_trajectory(losses_T)
        if self.settings.aggregation == "token_mean":
            return sums_N.sum() / batch.trained_tokens
        if self.settings.aggregation == "sequence_mean":
            return (batch.weights_N * sums_N / batch.tokens_N).sum()
        return (batch.weights_N * sums_N).sum() / batch.token_scale
