"""Policy mirror descent, equation (3) of the Kimi k1.5 report (arXiv 2501.12599, section 2.3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from services.kit.config import Model
from services.trainer.algorithms.base import Algorithm, FloatArray, LossBatch

if TYPE_CHECKING:
    import torch


class PolicyMirrorDescent(Algorithm):
    """Advantages against the group, and a quadratic pull towards the policy that opens the iteration."""

    settings: Settings

    class Settings(Model):
        """Settings of policy mirror descent."""

        tau: float = Field(0.1, ge=0, allow_inf_nan=False)
        """Strength of the pull towards the policy that opens the iteration; `update.token_scale` says how far it lets a
        response move. Raise it when `train/kl_k3` passes its range."""
        baseline: Literal["mean", "log_mean_exp"] = "mean"
        """What stands for tau log Z: the group's mean reward, or tau log mean exp(r / tau)."""

        @model_validator(mode="after")
        def _check_tau(self) -> Self:
            if self.baseline == "log_mean_exp" and self.tau == 0:
                raise ValueError("tau has to be above 0 for the log_mean_exp baseline")
            return self

    def advantages(self, rewards_K: FloatArray) -> FloatArray:
        """Returns r_j minus the group's baseline."""
        if self.settings.baseline == "mean":
            return np.asarray(rewards_K - rewards_K.mean())
        tau, top = self.settings.tau, rewards_K.max()
        baseline: FloatArray = top + tau * np.log(np.mean(np.exp((rewards_K - top) / tau)))
        return rewards_K - baseline

    def loss(self, batch: LossBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the sum over trajectories of weight * (-(advantage * S / c) + tau / 2 * (S / c - S_ref / c)^2).

        S is the sum of log pi over the trajectory's trained tokens and c is `token_scale`; in the first term tokens
        count by their importance weights. This is the report's surrogate with the sign turned: descending it ascends
        the report's gradient.
        """
        scale = batch.token_scale
        gain_N = batch.advantages_N * batch.sum_by_trajectory(batch.logprobs_T * batch.importance_T) / scale
        shift_N = batch.sum_by_trajectory(batch.logprobs_T - batch.reference_logprobs_T) / scale
        loss_N = -gain_N + 0.5 * self.settings.tau * shift_N**2
        return (batch.weights_N * loss_N).sum(), {}
