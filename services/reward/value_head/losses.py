"""The two losses of a reward model, as sums, so that micro-batches add up to the whole batch."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def pointwise_loss(scores_N: torch.Tensor, correct_N: torch.Tensor) -> torch.Tensor:
    """Sum over responses of -log p(label), where the score is the log-odds that the response is right."""
    return binary_cross_entropy_with_logits(scores_N, correct_N.to(scores_N.dtype), reduction="sum")


def pairwise_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of -log p(chosen preferred), after Bradley and Terry (1952): p = sigmoid(chosen - rejected)."""
    return -logsigmoid(chosen_P - rejected_P).sum()
