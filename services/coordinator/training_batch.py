"""From complete groups to what the trainer trains on and what the commit records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from perigee.buffer.v1 import buffer_pb2
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.groups import Group, Trajectory
from services.coordinator.run_config import AlgorithmConfig, OptimizerConfig
from services.coordinator.shaping import JudgedResponse, ShapingWeights, is_uniform, shape_rewards


@dataclass
class TrainingBatch:
    """The complete groups of an iteration: those to train on, and all of them, which the commit consumes."""

    groups: list[pb.TrainingGroup] = field(default_factory=list)
    consumed: list[Group] = field(default_factory=list)
    # Groups left out because their rewards agree, or because fewer than two members could be judged.
    uniform: int = 0
    failed: int = 0
    tokens_by_version: Counter[int] = field(default_factory=Counter)
    increments: list[buffer_pb2.PromptStatistics] = field(default_factory=list)


def make_training_batch(groups: Iterable[Group], weights: ShapingWeights, drop_uniform: bool) -> TrainingBatch:
    """Shapes the rewards of the complete groups among `groups`; members whose judging failed take no part."""
    batch = TrainingBatch()
    for group in groups:
        if not group.complete:
            continue
        batch.consumed.append(group)
        judged = [trajectory for trajectory in group.trajectories if trajectory.reward is not None]
        if judged:
            correct = sum(trajectory.verdict == buffer_pb2.VERDICT_CORRECT for trajectory in judged)
            batch.increments.append(
                buffer_pb2.PromptStatistics(prompt_id=group.prompt.id, trajectories=len(judged), correct=correct)
            )
        if len(judged) < 2:
            batch.failed += 1
            continue
        rewards = shape_rewards([judged_response(trajectory) for trajectory in judged], weights)
        if drop_uniform and is_uniform(rewards):
            batch.uniform += 1
            continue
        members = [
            pb.TrainingTrajectory(
                trajectory_id=trajectory.id,
                reward=reward,
                prompt_tokens=len(group.prompt.token_ids),
                tokens_by_version=trajectory.tokens_by_version,
            )
            for trajectory, reward in zip(judged, rewards, strict=True)
        ]
        batch.groups.append(pb.TrainingGroup(group_id=group.id, trajectories=members))
        for trajectory in judged:
            batch.tokens_by_version.update(trajectory.tokens_by_version)
    return batch


def judged_response(trajectory: Trajectory) -> JudgedResponse:
    """What reward shaping looks at."""
    assert trajectory.reward is not None
    return JudgedResponse(
        tokens=trajectory.tokens,
        reward=trajectory.reward,
        correct=trajectory.verdict == buffer_pb2.VERDICT_CORRECT,
        repeated=trajectory.end_reason == buffer_pb2.END_REASON_REPETITION,
    )


def make_algorithm(config: AlgorithmConfig) -> pb.Algorithm:
    """Returns the algorithm's message."""
    algorithm = pb.Algorithm(name="policy_mirror_descent")
    algorithm.settings.update({"tau": config.tau, "baseline": config.baseline})
    return algorithm


def make_update(config: AlgorithmConfig, temperature: float) -> pb.UpdateSettings:
    """Returns what every algorithm is trained with."""
    return pb.UpdateSettings(
        minibatches=config.minibatches,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        max_staleness=config.max_staleness,
        token_scale=config.token_scale,
        temperature=temperature,
        tis_cap=config.tis_cap,
    )


def make_optimizer(config: OptimizerConfig) -> pb.Optimizer:
    """The optimizer's message."""
    return pb.Optimizer(
        learning_rate=config.learning_rate,
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        min_lr_ratio=config.min_lr_ratio,
    )


def learning_rate_at(config: AlgorithmConfig, progress: float) -> float:
    """The learning rate when a share of the run has passed: linear from the first iteration's to the final share."""
    return config.optimizer.learning_rate * (1.0 - (1.0 - config.final_learning_rate_share) * progress)
