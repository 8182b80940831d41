"""The length reward (k1.5 section 2.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from services.coordinator.run_config import LengthRewardConfig


def length_reward(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Each response's length reward within its group, in [-0.5, 0.5].

    lambda = 0.5 - (length - min) / (max - min): a correct response gets lambda, a wrong one min(0, lambda), so that
    a short wrong response gains nothing; all get 0 when the lengths agree. Source: k1.5 section 2.3.3.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    rewards = []
    for length, is_correct in zip(lengths, correct, strict=True):
        share = 0.5 - (length - shortest) / (longest - shortest)
        rewards.append(share if is_correct else min(0.0, share))
    return rewards


def length_reward_weight(config: LengthRewardConfig, iteration: int) -> float:
    """The weight at an iteration (from 1): 0 before the start, then rising linearly to the full weight."""
    steps = iteration - config.start_iteration + 1
    return config.weight * min(1.0, max(0, steps) / config.warmup_iterations)
