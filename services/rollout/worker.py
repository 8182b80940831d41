"""The worker's state: which engine runs, which policy version it holds, and how much it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from perigee.errors import FailedPreconditionError, InternalError, ResourceExhaustedError, UnavailableError
from services.kit.telemetry import get_logger
from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine, EngineDiedError, WeightShard
from services.rollout.metrics import COMMIT_SECONDS, POLICY_VERSION, READY, RUNNING
from services.rollout.model_folder import ModelFolder
from services.rollout.wanted_tensors import WantedTensors, check_image

log = get_logger(__name__)


class WorkerStatus(IntEnum):
    """The numbers are those of perigee.rollout.v1.WorkerStatus."""

    STARTING = 1
    EMPTY = 2
    READY = 3
    DRAINING = 4


SETTLED = (WorkerStatus.EMPTY, WorkerStatus.READY)


@dataclass(frozen=True)
class HeldWeights:
    """A whole checkpoint in a file in shared memory."""

    run_id: str
    policy_version: int
    path: Path
    shards: Sequence[WeightShard]


class Worker:
    """One engine and what is known of it. Changes wake everybody who awaits `wait_change`."""

    def __init__(self, config: RolloutConfig, model: ModelFolder, engine: Engine, worker_id: str) -> None:
        self.config = config
        self.model = model
        self.engine = engine
        self.worker_id = worker_id
        self.wanted = WantedTensors(model.path)
        self.status = WorkerStatus.STARTING
        self.run_id = ""
        self.policy_version = 0
        self.running = 0
        self.generated_tokens = 0
        self.engine_restarts = 0
        self.broken = asyncio.Event()
        """Set when the engine must be restarted though its process lives."""
        self._committing = asyncio.Lock()
        self._commit: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def become(self, status: WorkerStatus, run_id: str = "", policy_version: int = 0) -> None:
        """Moves to a status, with the weights that go with it; DRAINING is final."""
        if self.status is WorkerStatus.DRAINING:
            return
        self.status, self.run_id, self.policy_version = status, run_id, policy_version
        READY.set(status is WorkerStatus.READY)
        POLICY_VERSION.set(policy_version)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self) -> None:
        """Returns at the next change of status or policy version."""
        await self._changed.wait()

    def check_ready(self, run_id: str, policy_version: int | None) -> None:
        """Raises FailedPreconditionError unless the worker holds these weights; an empty run id is any."""
        if self.status is not WorkerStatus.READY:
            raise FailedPreconditionError(
                f"Worker {self.worker_id} is {self.status.name.lower()} and holds no weights: push a policy version."
            )
        if run_id and run_id != self.run_id:
            raise FailedPreconditionError(f"Worker {self.worker_id} holds the weights of run {self.run_id!r}.")
        if policy_version is not None and policy_version != self.policy_version:
            raise FailedPreconditionError(
                f"Worker {self.worker_id} holds policy version {self.policy_version}, not {policy_version}."
            )

    @contextmanager
    def admit(self, sequences: int) -> Iterator[Admission]:
        """Counts sequences as running until they leave, at the latest when the block ends.

        Raises ResourceExhaustedError when the worker has too many.
        """
        limit = self.config.max_queued_sequences
        if self.running + sequences > limit:
            raise ResourceExhaustedError(
                f"Worker {self.worker_id} has {self.running} of at most {limit} sequences.", retry_after_s=1.0
            )
        admission = Admission(self, sequences)
        try:
            yield admission
        finally:
            admission.leave(admission.running)

    async def commit(self, weights: HeldWeights) -> None:
        """Puts a whole checkpoint from a shared-memory file into the engine, between two forward passes.

        Raises InvalidArgumentError when the checkpoint is not this model's (the old version goes on serving),
        UnavailableError when no engine runs, InternalError when the engine failed half-way and is restarted.
        """
        # A caller that goes away must not leave the engine half-loaded and paused.
        self._commit = asyncio.create_task(self._commit_alone(weights))
        await asyncio.shield(self._commit)

    async def _commit_alone(self, weights: HeldWeights) -> None:
        async with self._committing:
            await self._wait_started()
            await asyncio.to_thread(check_image, weights.path, weights.shards, self.wanted)
            if self.status not in SETTLED:
                raise UnavailableError("The engine died before the commit and is restarted.")
            await self._update(weights)

    async def refill(self, weights: HeldWeights | None) -> None:
        """Makes a started engine EMPTY, or READY again with weights that are still in memory.

        Commits wait until this is done. Raises what `commit` raises.
        """
        if weights is None:
            self.become(WorkerStatus.EMPTY)
        else:
            await self._update(weights)

    async def _wait_started(self) -> None:
        try:
            async with asyncio.timeout(self.config.commit_wait_seconds):
                while self.status is WorkerStatus.STARTING:
                    await self.wait_change()
        except TimeoutError as error:
            raise UnavailableError(f"The engine of worker {self.worker_id} did not start in time.") from error
        if self.status is WorkerStatus.DRAINING:
            raise UnavailableError(f"Worker {self.worker_id} shuts down.")

    async def _update(self, weights: HeldWeights) -> None:
        start = time.monotonic()
        generation = self.engine_restarts
        try:
            async with asyncio.timeout(self.config.update_timeout_seconds):
                await self.engine.update_weights(weights.path, weights.shards, weights.policy_version)
        except Exception as error:
            # Nobody knows which of its weights are new: this engine must not serve again.
            self.become(WorkerStatus.STARTING)
            self.broken.set()
            if isinstance(error, EngineDiedError):
                raise UnavailableError("The engine died during the commit and is restarted.") from error
            raise InternalError(f"The engine failed in the commit and is restarted: {error}") from error
        if self.engine_restarts != generation:
            raise UnavailableError("The engine died right after the commit and is restarted.")
        self.become(WorkerStatus.READY, weights.run_id, weights.policy_version)
        seconds = time.monotonic() - start
        COMMIT_SECONDS.observe(seconds)
        log.info(
            "weights in the engine",
            run=weights.run_id,
            policy_version=weights.policy_version,
            seconds=round(seconds, 4),
        )


class Admission:
    """Sequences that one call has running."""

    def __init__(self, worker: Worker, sequences: int) -> None:
        self._worker = worker
        self.running = 0
        self.leave(-sequences)

    def leave(self, sequences: int = 1) -> None:
        """Counts sequences that have ended."""
        self.running -= sequences
        self._worker.running -= sequences
        RUNNING.set(self._worker.running)
