"""Ranges that the metrics of an iteration stay in while a run is sound, and what to change when one leaves its range.

The bounds are rules of thumb; docs/architecture.md has their reasons and what runs of this repository had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricRange:
    """Range of a metric; a warning names its value, and the key of the recipe to change."""

    key: str
    label: str
    advice: str
    low: float | None = None
    high: float | None = None

    def warning(self, value: float) -> str | None:
        """Returns the warning of a value; None within the range."""
        if self.low is not None and value < self.low:
            return f"{self.label} is {value:.3g}, below {self.low:g}: {self.advice}"
        if self.high is not None and value > self.high:
            return f"{self.label} is {value:.3g}, above {self.high:g}: {self.advice}"
        return None


RANGES = (
    MetricRange(
        "train/kl_k3",
        "policy KL per token",
        "lower run.optimizer.learning_rate, or raise run.algorithm.tau of policy_mirror_descent, kl_coef of grpo",
        high=0.05,
    ),
    MetricRange(
        "train/entropy_ratio",
        "entropy per token, as a fraction of that in the run's first training,",
        "lower run.optimizer.learning_rate, or raise run.rollout.temperature",
        low=0.1,
    ),
    MetricRange(
        "train/train_infer_logprob_diff_mean",
        "mean log-probability difference of rollout and trainer",
        "keep run.update.tis_cap at 2, or set rollout.dtype and trainer.dtype to float32",
        high=0.05,
    ),
    MetricRange(
        "train/uniform_rate",
        "share of groups with equal rewards",
        "set run.prioritized.enabled, choose run.curriculum or run.prompts nearer to the model's level, or raise "
        "run.group_size",
        high=0.8,
    ),
    MetricRange(
        "reward/ungradable_rate",
        "share of responses without an answer to judge",
        "read them with `perigee samples --verdict ungradable`, then mend the prompt's template or its verifier's "
        "answer_marker",
        high=0.5,
    ),
    MetricRange(
        "rollout/capped_rate",
        "share of responses that the length limit cut",
        "raise run.rollout.max_response_tokens",
        high=0.5,
    ),
    MetricRange(
        "rollout/repetition_rate",
        "share of responses that repeat themselves",
        "lower run.optimizer.learning_rate, or set run.repetition_penalty",
        high=0.3,
    ),
)


def find_warnings(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Returns the warnings of an iteration's metrics by key; metrics that are not there or null have none."""
    found = {}
    for each in RANGES:
        value = metrics.get(each.key)
        if value is not None and (warning := each.warning(value)):
            found[each.key] = warning
    if metrics.get("train/groups") == 0:
        found["train/groups"] = _why_untrained(metrics)
    return found


def _why_untrained(metrics: Mapping[str, float | None]) -> str:
    if not metrics.get("reward/groups"):
        return (
            "the iteration trained nothing, and is not counted: no group was complete; raise run.rollout.token_budget "
            "or run.max_live_groups if this goes on"
        )
    return (
        "the iteration trained nothing, and is not counted: every complete group has equal rewards or could not be "
        "judged; read `perigee samples`"
    )
