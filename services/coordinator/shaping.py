"""From verdicts to the rewards that the trainer sees: base reward, length reward, repetition and overlong penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from services.coordinator.length_reward import length_reward, length_reward_weight
from services.coordinator.overlong_penalty import overlong_penalty
from services.coordinator.run_config import RunConfig


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
    overlong_penalty: float = 0.0
    # Response tokens at which the overlong penalty is whole, and those below over which it grows.
    overlong_cap: int = 1
    overlong_buffer: int = 1

    @classmethod
    def at(cls, config: RunConfig, iteration: int) -> Self:
        """The weights of an iteration, from 1."""
        return cls(
            length=length_reward_weight(config.length_reward, iteration),
            repetition_penalty=config.repetition_penalty,
            overlong_penalty=config.overlong_penalty.weight,
            overlong_cap=config.overlong_cap,
            overlong_buffer=config.overlong_penalty.buffer,
        )


def shape_rewards(group: Sequence[JudgedResponse], weights: ShapingWeights) -> list[float]:
    """The rewards of a group's judged responses. Responses whose judging failed have no reward and take no part."""
    if not group:
        return []
    lengths = length_reward([response.tokens for response in group], [response.correct for response in group])
    return [
        response.reward
        + weights.length * length
        - weights.repetition_penalty * response.repeated
        + weights.overlong_penalty * overlong(response, weights)
        for response, length in zip(group, lengths, strict=True)
    ]


def overlong(response: JudgedResponse, weights: ShapingWeights) -> float:
    """The response's overlong penalty, in [-1, 0]."""
    return overlong_penalty(response.tokens, weights.overlong_cap, weights.overlong_buffer)


def is_uniform(rewards: Sequence[float]) -> bool:
    """Whether all rewards are equal up to rounding, so that every advantage is zero."""
    return max(rewards) - min(rewards) < 1e-9
