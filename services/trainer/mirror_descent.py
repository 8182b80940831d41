"""The loss of policy mirror descent (k1.5 section 2.3.2, equation 3), free of models and machines."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch


class Baseline(Enum):
    """What stands for tau log Z."""

    MEAN = "mean"
    LOG_MEAN_EXP = "log_mean_exp"


def compute_advantages(rewards: Sequence[float], baseline: Baseline, tau: float) -> list[float]:
    """r_j minus the group's baseline: the mean reward, or tau log mean exp(r / tau)."""
    rewards_K = np.asarray(rewards, dtype=np.float64)
    if baseline is Baseline.MEAN:
        return list(rewards_K - rewards_K.mean())
    top = rewards_K.max()
    return list(rewards_K - (top + tau * np.log(np.mean(np.exp((rewards_K - top) / tau)))))


def policy_mirror_descent(
    policy_sums_N: torch.Tensor,
    weighted_sums_N: torch.Tensor,
    reference_sums_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    tau: float,
    token_scale: float,
) -> torch.Tensor:
    """Sum over N trajectories of weight * (-(advantage * S / c) + tau / 2 * (S / c - S_ref / c)^2).

    S is the sum of log pi over the trajectory's trained tokens (`policy_sums_N`), c is `token_scale`. The advantage
    term takes `weighted_sums_N`, which equals S unless importance sampling weighs the tokens. With weights of
    1 / (trajectories in the group * groups in the minibatch) this is the report's surrogate with the sign turned, so
    that descending it ascends the report's gradient.
    """
    shift_N = (policy_sums_N - reference_sums_N) / token_scale
    per_trajectory_N = -advantages_N * weighted_sums_N / token_scale + 0.5 * tau * shift_N**2
    return (weights_N * per_trajectory_N).sum()


def mask_stale_tokens(
    versions_T: npt.NDArray[np.int64], base_version: int, max_staleness: int
) -> npt.NDArray[np.bool_]:
    """True where a token's policy version is at most `max_staleness` older than the iteration's base version."""
    return base_version - versions_T <= max_staleness


def truncate_importance(
    trainer_logprobs_T: npt.NDArray[np.float32], engine_logprobs_T: npt.NDArray[np.float32], cap: float
) -> npt.NDArray[np.float32]:
    """Per-token weights min(pi_trainer / pi_engine, cap); all ones when `cap` is 0."""
    if cap == 0:
        return np.ones_like(trainer_logprobs_T)
    ratios_T: npt.NDArray[np.float32] = np.exp(trainer_logprobs_T - engine_logprobs_T)
    return np.minimum(ratios_T, np.float32(cap))
