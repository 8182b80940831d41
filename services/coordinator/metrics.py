"""Prometheus metrics of the coordinator."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

WORKERS = Gauge("perigee_coordinator_workers_count", "Rollout workers with a lease.")
ITERATION = Gauge("perigee_coordinator_iteration_count", "Iterations committed by the run.")
POLICY_VERSION = Gauge("perigee_coordinator_policy_version_number", "Policy version that the run has committed.")
REWARD = Gauge("perigee_coordinator_reward_mean", "Mean reward of the latest iteration.")
PHASE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
PHASE_SECONDS = Histogram("perigee_coordinator_phase_seconds", "Seconds per phase.", ["phase"], buckets=PHASE_BUCKETS)
GENERATED = Counter("perigee_coordinator_generated_tokens", "Tokens generated in training rollouts.")
TRAINED = Counter("perigee_coordinator_trained_trajectories", "Trajectories trained on.")
FAILURES = Counter("perigee_coordinator_failures_count", "Failures by kind.", ["kind"])
