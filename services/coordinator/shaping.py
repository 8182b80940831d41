"""From verdicts to the rewards that the trainer sees: base reward, length reward, repetition penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.coordinator.length_reward import length_reward


@dataclass(frozen=True)
class JudgedResponse:
    """A finished trajectory with a verdict that is not a failure."""

    tokens: int
    reward: float
    correct: bool
    repeated: bool


@dataclass(frozen=True)
class ShapingWeights:
    """Weights of one iteration."""

    length: float
    repetition_penalty: float


def shape_rewards(group: Sequence[JudgedResponse], weights: ShapingWeights) -> list[float]:
    """The rewards of a group's judged responses. Responses whose judging failed have no reward and take no part."""
    if not group:
        return []
    lengths = length_reward([response.tokens for response in group], [response.correct for response in group])
    return [
        response.reward + weights.length * length - weights.repetition_penalty * response.repeated
        for response, length in zip(group, lengths, strict=True)
    ]


def is_uniform(rewards: Sequence[float]) -> bool:
    """Whether all rewards are equal up to rounding, so that every advantage is zero."""
    return max(rewards) - min(rewards) < 1e-9
