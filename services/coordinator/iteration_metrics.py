"""A line of metrics.jsonl: what one iteration generated, judged and trained.

`tokens_by_version` counts the tokens of the trained trajectories by the policy version that generated them. `phases`
gives each phase's offset from the iteration's start and its length in seconds. Accuracies and rewards are means over
the trajectories that finished in the iteration and have a verdict; null when there is none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from perigee.buffer.v1 import buffer_pb2
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.dispatch import RolloutCounts
from services.coordinator.groups import Trajectory
from services.coordinator.shaping import ShapingWeights
from services.coordinator.timeline import PhaseTime, Timeline
from services.coordinator.training_batch import TrainingBatch

END_NAMES = {
    buffer_pb2.END_REASON_STOP: "stop",
    buffer_pb2.END_REASON_REPETITION: "repetition",
    buffer_pb2.END_REASON_RESPONSE_CAP: "response_cap",
    buffer_pb2.END_REASON_BUDGET: "budget",
}

TRAINING_PHASES = ("read", "reference", "update")


@dataclass(frozen=True)
class IterationFacts:
    """What is known of an iteration when it closes."""

    iteration: int
    policy_version: int
    elapsed_seconds: float
    counts: RolloutCounts
    judging_failures: int
    batch: TrainingBatch
    result: trainer_pb2.TrainResult | None
    learning_rate: float
    weights: ShapingWeights
    live_groups: int
    workers: int


def describe_iteration(facts: IterationFacts, timeline: Timeline) -> dict[str, Any]:
    """The line, without the phases that are not over yet."""
    ended = Counter(END_NAMES[reason] for reason in facts.counts.ended.values())
    segments = sum(ended.values())
    finished = facts.counts.finished
    judged = [trajectory for trajectory in finished if trajectory.reward is not None]
    line: dict[str, Any] = {
        "iteration": facts.iteration,
        "policy_version": facts.policy_version,
        "elapsed_seconds": round(facts.elapsed_seconds, 3),
        "reward": {"mean": mean([trajectory.reward or 0.0 for trajectory in judged])},
        "accuracy": accuracies(judged),
        "response_tokens": length_statistics([trajectory.tokens for trajectory in finished]),
        "finished": len(finished),
        "ended": {name: ended[name] for name in END_NAMES.values()},
        "share_partial": ended["budget"] / segments if segments else 0.0,
        "share_repeated": ended["repetition"] / len(finished) if finished else 0.0,
        "share_overlong": share_overlong(finished, facts.weights),
        "tokens_generated": facts.counts.tokens,
        "cached_tokens": facts.counts.cached_tokens,
        "tokens_per_second": tokens_per_second(facts.counts.tokens, timeline.phases.get("rollout")),
        "tokens_by_version": {str(key): tokens for key, tokens in sorted(facts.batch.tokens_by_version.items())},
        "groups": {
            "trained": len(facts.batch.groups),
            "uniform": facts.batch.uniform,
            "failed": facts.batch.failed,
            "live": facts.live_groups,
        },
        "learning_rate": facts.learning_rate,
        "length_reward_weight": facts.weights.length,
        "failures": {"segments": facts.counts.failures, "judging": facts.judging_failures},
        "workers": facts.workers,
        **describe_training(facts.result),
    }
    add_phases(line, timeline)
    return line


def describe_training(result: trainer_pb2.TrainResult | None) -> dict[str, Any]:
    """What the trainer told; zero trajectories and nulls when nothing was trained."""
    if result is None:
        nothing = dict.fromkeys(("loss", "gradient_norm", "policy_kl", "max_logprob_difference"))
        return {"trajectories_trained": 0, "trajectories_multi_version": 0, "tokens_trained": 0, **nothing}
    return {
        "trajectories_trained": result.trajectories,
        "trajectories_multi_version": result.trajectories_multi_version,
        "tokens_trained": result.trained_tokens,
        "loss": result.metrics["train/loss"],
        "gradient_norm": result.metrics["train/grad_norm"],
        "policy_kl": result.metrics["train/kl_k1"],
        "max_logprob_difference": result.metrics["train/train_infer_logprob_diff_max"],
        "mean_logprob_difference": result.metrics["train/train_infer_logprob_diff_mean"],
        "training": {f"{phase}_seconds": result.metrics[f"time/{phase}_seconds"] for phase in TRAINING_PHASES},
    }


def add_phases(line: dict[str, Any], timeline: Timeline) -> None:
    """Sets the phases and the iteration's length as known so far."""
    line["iteration_seconds"] = round(timeline.seconds, 4)
    line["phases"] = {
        name: {key: round(value, 4) for key, value in asdict(phase).items()} for name, phase in timeline.phases.items()
    }


def accuracies(judged: Sequence[Trajectory]) -> dict[str, float | None]:
    """Share of correct responses, overall and by domain."""
    by_domain: dict[str, list[float]] = defaultdict(list)
    for trajectory in judged:
        by_domain[trajectory.group.prompt.domain].append(float(trajectory.verdict == buffer_pb2.VERDICT_CORRECT))
    every = [value for values in by_domain.values() for value in values]
    return {"overall": mean(every), **{domain: mean(by_domain[domain]) for domain in sorted(by_domain)}}


def length_statistics(lengths: Sequence[int]) -> Mapping[str, float | None]:
    """Mean, 95th percentile and maximum of response lengths in tokens."""
    if not lengths:
        return {"mean": None, "p95": None, "max": None}
    return {"mean": mean(lengths), "p95": float(np.percentile(lengths, 95)), "max": max(lengths)}


def share_overlong(finished: Sequence[Trajectory], weights: ShapingWeights) -> float:
    """Share of finished responses that the overlong penalty takes something from."""
    if not finished or not weights.overlong_penalty:
        return 0.0
    return sum(trajectory.tokens > weights.overlong_cap - weights.overlong_buffer for trajectory in finished) / len(
        finished
    )


def tokens_per_second(tokens: int, rollout: PhaseTime | None) -> float | None:
    """Tokens generated per second of the rollout phase."""
    return round(tokens / rollout.seconds, 1) if rollout is not None and rollout.seconds > 0 else None


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return round(sum(values) / len(values), 6) if values else None
