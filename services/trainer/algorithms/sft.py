"""Supervised fine-tuning: the likelihood of the responses of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.trainer.algorithms.base import ExampleBatch, SupervisedAlgorithm

if TYPE_CHECKING:
    import torch


class SFT(SupervisedAlgorithm):
    """Mean negative log-likelihood of the tokens of responses."""

    def loss(self, batch: ExampleBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns -(sum of log pi over the tokens of responses) / (number of these tokens in the step)."""
        return -batch.sums_KP.sum() / batch.trained_tokens, {}
