"""From responses to the rewards of a training batch: scoring, length reward, repetition and overlong penalty."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.client import RewardClient
from perigee.reward.scoring import RewardLostError, ScoringOptions, ScoringPipeline, Sink, scoring
from perigee.reward.v1 import reward_pb2
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.config import ScoringConfig
from services.coordinator.groups import Group, Trajectory
from services.coordinator.run_config import LengthRewardConfig, RunConfig
from services.coordinator.workers import FAILURES, PeerLostError
from services.kit.telemetry import get_logger
from services.kit.tracing import detached_span

log = get_logger(__name__)

# Least seconds between two reports of one call: each is a call to the buffer.
REPORT_SECONDS = 0.2


@asynccontextmanager
async def score_responses(client: RewardClient, config: ScoringConfig, sink: Sink) -> AsyncIterator[ScoringPipeline]:
    """Opens a pipeline that hands outcomes to `sink`; leaving the block without an error waits for all of them.

    Raises PeerLostError, which cancels the block, when the reward service was out of reach for `unavailable_s`.
    """

    async def report(outcomes: list[reward_pb2.ScoreResponse]) -> None:
        await sink(outcomes)
        for outcome in outcomes:
            if outcome.verdict == buffer_pb2.VERDICT_FAILED:
                FAILURES.labels("judging").inc()
                log.warning("response was not judged", response=outcome.id, reason=outcome.reason)

    options = ScoringOptions(
        batch=config.batch,
        concurrency=config.concurrency,
        attempts=config.attempts,
        # One late call must not look like an outage.
        call_timeout_s=min(config.call_timeout_s, config.unavailable_s),
        mib_timeout_s=config.mib_timeout_s,
        unavailable_s=config.unavailable_s,
        first_pause_s=config.retry_s,
        max_pending=config.queue,
        max_pending_bytes=config.queue_bytes,
        report_s=REPORT_SECONDS,
        around_call=lambda responses: detached_span("score", responses=responses),
    )
    try:
        async with scoring(client, options, report) as pipeline:
            yield pipeline
    except RewardLostError as error:
        raise PeerLostError(error.message) from error


def length_reward(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """Returns each response's length reward within its group, in [-0.5, 0.5].

    lambda = 0.5 - (length - min) / (max - min): a correct response gets lambda, a wrong one min(0, lambda), so that
    a short wrong response gains nothing; all get 0 when the lengths agree. Source: k1.5 section 2.3.3.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    rewards = []
    for length, is_correct in zip(lengths, correct, strict=True):
        value = 0.5 - (length - shortest) / (longest - shortest)
        rewards.append(value if is_correct else min(0.0, value))
    return rewards


def length_reward_weight(config: LengthRewardConfig, iteration: int) -> float:
    """Returns the weight at an iteration (from 1): 0 before the start, then rising linearly to the full weight."""
    steps = iteration - config.start_iteration + 1
    return config.weight * min(1.0, max(0, steps) / config.warmup_iterations)


def overlong_penalty(tokens: int, cap: int, buffer: int) -> float:
    """Returns 0 up to `cap - buffer` tokens, then falls linearly to -1 at `cap` tokens and more.

    Unlike the length reward it does not compare a response with its group, so that a group of long responses loses
    reward, too. Source: the soft overlong punishment of DAPO (arXiv 2503.14476).
    """
    return -min(1.0, max(0, tokens - (cap - buffer)) / buffer)


@dataclass(frozen=True)
class ShapingWeights:
    """Weights of reward shaping at one iteration."""

    length: float
    repetition_penalty: float
    overlong_penalty: float = 0.0
    # Response tokens with the whole overlong penalty, and those below it over which the penalty grows.
    overlong_cap: int = 1
    overlong_buffer: int = 1

    @classmethod
    def at(cls, config: RunConfig, iteration: int) -> Self:
        """Returns the weights of an iteration, from 1."""
        return cls(
            length=length_reward_weight(config.length_reward, iteration),
            repetition_penalty=config.repetition_penalty,
            overlong_penalty=config.overlong_penalty.weight,
            overlong_cap=config.overlong_cap,
            overlong_buffer=config.overlong_penalty.buffer,
        )


def shape_rewards(judged: Sequence[Trajectory], weights: ShapingWeights) -> list[float]:
    """Returns the rewards of the trajectories of one group that have a verdict which is not a failure."""
    if not judged:
        return []
    lengths = length_reward([trajectory.tokens for trajectory in judged], [trajectory.correct for trajectory in judged])
    rewards = []
    for trajectory, length in zip(judged, lengths, strict=True):
        assert trajectory.reward is not None
        repeated = trajectory.end_reason == buffer_pb2.END_REASON_REPETITION
        overlong = overlong_penalty(trajectory.tokens, weights.overlong_cap, weights.overlong_buffer)
        rewards.append(
            trajectory.reward
            + weights.length * length
            - weights.repetition_penalty * repeated
            + weights.overlong_penalty * overlong
        )
    return rewards


def is_uniform(rewards: Sequence[float]) -> bool:
    """Returns whether all rewards are equal up to rounding, so that every advantage is zero."""
    return max(rewards) - min(rewards) < 1e-9


def teaches_nothing(skips_zero_advantages: bool, judged: Sequence[Trajectory], rewards: Sequence[float]) -> bool:
    """Returns whether a group has equal rewards.

    For an algorithm that skips zero advantages, and compares no rewards, whether it has no correct response.
    """
    if skips_zero_advantages:
        return not any(trajectory.correct for trajectory in judged)
    return is_uniform(rewards)


@dataclass
class TrainingBatch:
    """Complete groups of an iteration: those to train on, and all of them, which the commit consumes."""

    groups: list[pb.TrainingGroup] = field(default_factory=list)
    consumed: list[Group] = field(default_factory=list)
    # Groups without a share in training: they teach nothing, or fewer than two members could be judged.
    uniform: int = 0
    failed: int = 0
    tokens_by_version: Counter[int] = field(default_factory=Counter)
    increments: list[buffer_pb2.PromptStatistics] = field(default_factory=list)

    @property
    def trajectories(self) -> list[Trajectory]:
        """Trajectories of the complete groups."""
        return [trajectory for group in self.consumed for trajectory in group.trajectories]


def make_training_batch(
    groups: Iterable[Group],
    weights: ShapingWeights,
    drop_uniform: bool,
    left_out: Collection[str] = (),
    skips_zero_advantages: bool = False,
) -> TrainingBatch:
    """Shapes the rewards of the complete groups; members whose judging failed take no part, nor groups of prompts that
    are left out.
    """
    batch = TrainingBatch()
    for group in groups:
        if not group.complete:
            continue
        batch.consumed.append(group)
        if group.prompt.id in left_out:
            batch.failed += 1
            continue
        judged = [trajectory for trajectory in group.trajectories if trajectory.reward is not None]
        if judged:
            correct = sum(trajectory.correct for trajectory in judged)
            batch.increments.append(
                buffer_pb2.PromptStatistics(prompt_id=group.prompt.id, trajectories=len(judged), correct=correct)
            )
        if len(judged) < 2:
            batch.failed += 1
            continue
        rewards = shape_rewards(judged, weights)
        if drop_uniform and teaches_nothing(skips_zero_advantages, judged, rewards):
            batch.uniform += 1
            continue
        training_group = pb.TrainingGroup(group_id=group.id)
        for trajectory, reward in zip(judged, rewards, strict=True):
            training_group.trajectories.add(
                trajectory_id=trajectory.id,
                reward=reward,
                prompt_tokens=group.prompt.tokens,
                tokens_by_version=trajectory.tokens_by_version,
            )
        batch.groups.append(training_group)
        for trajectory in judged:
            batch.tokens_by_version.update(trajectory.tokens_by_version)
    return batch
