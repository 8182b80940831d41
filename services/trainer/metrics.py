"""Prometheus metrics of the trainer."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from services.trainer.train_iteration import IterationResult

POLICY_VERSION = Gauge("perigee_trainer_policy_version", "Version of the policy that the trainer holds.")
TOKENS = Counter("perigee_trainer_trained_tokens", "Response tokens that took part in a loss.")
TRAJECTORIES = Counter("perigee_trainer_trajectories", "Trajectories trained on.")
PHASE_SECONDS = Gauge("perigee_trainer_phase_seconds", "Seconds of the last iteration's phases.", ["phase"])
LOGPROB_DIFFERENCE = Gauge(
    "perigee_trainer_logprob_difference_nats", "Largest |engine - trainer| log-probability of the last iteration."
)
GRADIENT_NORM = Gauge(
    "perigee_trainer_gradient_norm_ratio", "Mean gradient norm of the last iteration, before clipping."
)


def observe_iteration(figures: IterationResult) -> None:
    """Records an iteration's figures."""
    TOKENS.inc(figures.trained_tokens)
    TRAJECTORIES.inc(figures.trajectories)
    PHASE_SECONDS.labels("reference").set(figures.reference_seconds)
    PHASE_SECONDS.labels("update").set(figures.update_seconds)
    LOGPROB_DIFFERENCE.set(figures.max_logprob_difference)
    GRADIENT_NORM.set(figures.gradient_norm)
