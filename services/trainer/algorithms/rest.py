"""ReST: supervised learning on the responses of each iteration that are good enough (arXiv 2308.08998).

The baseline of the Kimi k1.5 report (arXiv 2501.12599, section 3.5), which gives wrong responses no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from services.kit.config import Model
from services.trainer.algorithms.base import Algorithm, FloatArray, LossBatch

if TYPE_CHECKING:
    import torch


class ReST(Algorithm):
    """Mean negative log-likelihood of the tokens of kept responses; the others are not even read."""

    settings: Settings
    skips_zero_advantages: ClassVar[bool] = True

    class Settings(Model):
        """Settings of ReST."""

        min_reward: float = Field(0.5, allow_inf_nan=False)
        """Reward from which a response is kept; a correct one has 1, before length reward and penalties."""
        keep: Literal["all", "best"] = "all"
        """Keep all responses of a group with that reward, or the best alone, the first of equals."""

    def advantages(self, rewards_K: FloatArray) -> FloatArray:
        """Returns 1 for kept responses, 0 for the others."""
        kept_K = rewards_K >= self.settings.min_reward
        if self.settings.keep == "best":
            kept_K &= np.arange(len(rewards_K)) == rewards_K.argmax()
        return kept_K.astype(np.float64)

    def loss(self, batch: LossBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns -(sum of log pi over the tokens of kept responses) / (number of these tokens in the minibatch)."""
        kept_N = batch.sum_by_trajectory(batch.logprobs_T)
        return -(batch.advantages_N * kept_N).sum() / batch.trained_tokens, {}
