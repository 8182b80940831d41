"""Configuration of the coordinator's process; that of a run is `run_config.RunConfig`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from services.kit.config import Model, ServiceConfig


class DispatchConfig(Model):
    """Dispatch of sequences to rollout workers."""

    calls_per_worker: int = Field(4, ge=1)
    """Calls in flight per worker when there is enough work; each has an equal part of its sequences."""
    overcommit: float = Field(2.0, ge=1.0)
    """Sequences given to a worker at once, in multiples of what it decodes at once."""
    max_batch: int = Field(256, ge=1)
    """Sequences per call at most."""
    attempts: int = Field(5, ge=1)
    """Failures of one sequence that end the run."""
    call_timeout_s: float = Field(1800.0, gt=0)
    """Deadline of one call to a worker, beside what its tokens add."""
    token_timeout_s: float = Field(0.1, ge=0)
    """Seconds that each token of a call's longest sequence adds to its deadline, those that it has and may get counted,
    and once more for each time that the worker is overcommitted."""
    worker_wait_s: float = Field(300.0, gt=0)
    """Seconds that a run waits for a ready worker before it fails."""

    def deadline_s(self, longest: int) -> float:
        """Returns the deadline of a call whose longest sequence has so many tokens at its end."""
        return self.call_timeout_s + self.token_timeout_s * longest * self.overcommit


class ScoringConfig(Model):
    """Scoring of finished responses by the reward service."""

    batch: int = Field(64, ge=1)
    """Responses per call at most."""
    concurrency: int = Field(4, ge=1)
    """Calls in flight at once."""
    queue: int = Field(4096, ge=1)
    """Responses without a verdict at once; rollout streams pause while there are more."""
    queue_bytes: int = Field(32 << 20, ge=1)
    """Bytes of their texts together, beyond which rollout streams pause, too."""
    attempts: int = Field(6, ge=1)
    """Attempts to judge a response while the failure may pass; afterwards its verdict is FAILED."""
    retry_s: float = Field(0.5, gt=0)
    """Pause before the second attempt; doubles with each further one."""
    call_timeout_s: float = Field(240.0, gt=0)
    """Deadline of one call, at most `unavailable_s`, beside what its texts add; responses without a verdict by then are
    called again."""
    mib_timeout_s: float = Field(60.0, ge=0)
    """Seconds that each MiB of a call's texts adds to its deadline; a call has 3 MiB at most."""
    unavailable_s: float = Field(300.0, gt=0)
    """Seconds that the reward service may be out of reach before the run fails."""


class WeightsConfig(Model):
    """How policy versions reach the workers."""

    transfer: Literal["push", "pull"] = "push"
    """Whether the trainer gathers the weights and pushes them to every worker, or each of its processes lends what it
    owns and the workers pull it, those on other hosts from one another."""
    push_timeout_s: float = Field(600.0, gt=0)
    """Deadline of one push to all workers, or of one worker's pull."""
    retry_s: float = Field(2.0, gt=0)
    """Pause before a worker whose push failed is tried again."""


class DirectoryConfig(Model):
    """Where it stands which workers lend the weights that are pulled."""

    etcd: str | None = None
    """host:port of etcd, or a name that resolves to all of its members; without it the coordinator's memory has the
    directory alone."""
    prefix: str = Field("/perigee", min_length=1)
    """Beginning of the keys in etcd."""
    lease_seconds: int = Field(60, ge=2)
    """Seconds that the entries in etcd outlive the coordinator, for one that starts again."""
    user: str | None = None
    """User of etcd; where it knows users by their certificates, `cert_file` is enough."""
    password: SecretStr | None = None
    """Password of `user`."""
    ca_file: str | None = None
    """PEM roots of etcd's certificate; without them etcd is reached in clear. Files are read anew when they change."""
    cert_file: str | None = None
    """PEM certificate chain to show to etcd."""
    key_file: str | None = None
    """PEM private key of `cert_file`."""
    server_name: str | None = None
    """Name in etcd's certificate, where it is not that of the address."""

    @model_validator(mode="after")
    def _check_credentials(self) -> Self:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password are given together or not at all")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file are given together or not at all")
        if self.ca_file is None and (self.cert_file is not None or self.server_name is not None):
            raise ValueError("cert_file and server_name need ca_file, since etcd is reached in clear without it")
        return self


class CoordinatorConfig(ServiceConfig):
    """Configuration of the coordinator's process."""

    section: ClassVar[str] = "coordinator"

    buffer_address: str = "127.0.0.1:50052"
    """host:port of the replay buffer."""
    trainer_address: str = "127.0.0.1:50054"
    """host:port of the trainer."""
    reward_address: str = "127.0.0.1:50055"
    """host:port of the reward service."""
    run_path: str | None = None
    """Folder of a run that this process resumes when it starts and finds it unfinished there; where its runs have other
    folders, it resumes the last of them. A run whose own folder this machine does not see goes to `runs/<run id>` in
    it, as do all runs where it is a URL such as s3://bucket/folder."""
    lease_seconds: float = Field(10.0, gt=0)
    """Seconds without a sign of a rollout worker after which its trajectories are given to others."""
    control_timeout_s: float = Field(30.0, gt=0)
    """Deadline of a small call to a peer."""
    train_timeout_s: float = Field(86_400.0, gt=0)
    """Deadline of one training job, a supervised stage included."""
    train_token_timeout_s: float = Field(0.05, ge=0)
    """Seconds that each token of an iteration adds to the deadline of its training."""
    checkpoint_timeout_s: float = Field(1800.0, gt=0)
    """Deadline of writing or reading a checkpoint or an export."""
    recovery_wait_s: float = Field(300.0, gt=0)
    """Seconds that a run waits for a peer that went away before it fails."""
    recoveries: int = Field(5, ge=0)
    """Losses of a peer in a row, without a committed iteration between them, after which the run fails."""
    dispatch: DispatchConfig = DispatchConfig()
    """Dispatch of sequences to rollout workers."""
    scoring: ScoringConfig = ScoringConfig()
    """Scoring of finished responses by the reward service."""
    weights: WeightsConfig = WeightsConfig()
    """How policy versions reach the workers."""
    directory: DirectoryConfig = DirectoryConfig()
    """Where it stands which workers lend the weights that are pulled."""
