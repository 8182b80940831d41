"""Configuration of the coordinator's process; what a run does is `run_config.RunConfig`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from services.kit.config import Model, ServiceConfig


class DispatchConfig(Model):
    """How work is spread over rollout workers."""

    calls_per_worker: int = Field(4, ge=1)
    """Calls that a worker has in flight at once when there is work enough; each is an equal share of its load."""
    overcommit: float = Field(2.0, ge=1.0)
    """Sequences given to a worker at once, in multiples of what it decodes at once."""
    max_batch: int = Field(256, ge=1)
    """Sequences per call at most."""
    attempts: int = Field(5, ge=1)
    """How often one sequence may fail before the run does."""
    call_timeout_s: float = Field(1800.0, gt=0)
    """Deadline of one call to a worker."""
    worker_wait_s: float = Field(300.0, gt=0)
    """How long a run waits for a worker to be ready before it fails."""


class ScoringConfig(Model):
    """How finished responses go to the reward service."""

    batch: int = Field(64, ge=1)
    """Responses per call at most."""
    concurrency: int = Field(4, ge=1)
    """Calls in flight at once."""
    queue: int = Field(4096, ge=1)
    """Responses without a verdict; rollout streams stand still while there are more."""
    attempts: int = Field(6, ge=1)
    """How often a response is judged while that fails in a way that may pass; afterwards it is FAILED."""
    retry_s: float = Field(0.5, gt=0)
    """Pause before the second attempt; doubles with each further one."""
    call_timeout_s: float = Field(240.0, gt=0)
    """Deadline of one call, at most `unavailable_s`; responses without a verdict by then are called again."""
    unavailable_s: float = Field(300.0, gt=0)
    """How long the reward service may be out of reach before the run fails."""


class WeightsConfig(Model):
    """How policy versions reach the workers."""

    push_timeout_s: float = Field(600.0, gt=0)
    """Deadline of one push to all workers."""
    retry_s: float = Field(2.0, gt=0)
    """Pause before a worker whose push failed is tried again."""


class CoordinatorConfig(ServiceConfig):
    """The coordinator's process."""

    section: ClassVar[str] = "coordinator"

    buffer_address: str = "127.0.0.1:50052"
    """host:port of the replay buffer."""
    trainer_address: str = "127.0.0.1:50054"
    """host:port of the trainer."""
    reward_address: str = "127.0.0.1:50055"
    """host:port of the reward service."""
    run_path: str | None = None
    """Folder of a run that this process goes on with when it starts and finds it unfinished there."""
    lease_seconds: float = Field(10.0, gt=0)
    """A rollout worker that is silent for so long loses its trajectories to others."""
    control_timeout_s: float = Field(30.0, gt=0)
    """Deadline of a small call to a peer."""
    train_timeout_s: float = Field(86_400.0, gt=0)
    """Deadline of one training job, a supervised stage included."""
    checkpoint_timeout_s: float = Field(1800.0, gt=0)
    """Deadline of writing or reading a checkpoint or an export."""
    recovery_wait_s: float = Field(300.0, gt=0)
    """How long a run waits for a peer that went away before it fails."""
    recoveries: int = Field(5, ge=0)
    """How often in a row a run may lose a peer without closing an iteration before it fails."""
    dispatch: DispatchConfig = DispatchConfig()
    """How work is spread over rollout workers."""
    scoring: ScoringConfig = ScoringConfig()
    """How finished responses go to the reward service."""
    weights: WeightsConfig = WeightsConfig()
    """How policy versions reach the workers."""
