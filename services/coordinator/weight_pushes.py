"""Keeps the rollout workers at the policy version of the run: has the trainer push it to those that lack it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from perigee.errors import FailedPreconditionError, PerigeeError
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator import metrics
from services.coordinator.config import CoordinatorConfig
from services.coordinator.run_errors import PeerLostError
from services.coordinator.workers import Worker, WorkerRegistry
from services.kit.telemetry import get_logger

log = get_logger(__name__)


class WeightKeeper:
    """Pushes the run's version to workers. The trainer must be free; `hold_version` brings it to the version."""

    def __init__(
        self,
        run_id: str,
        trainer: TrainerClient,
        registry: WorkerRegistry,
        config: CoordinatorConfig,
        on_waiting: Callable[[bool], None],
        hold_version: Callable[[int], Awaitable[None]],
    ) -> None:
        self._hold_version = hold_version
        self._run_id = run_id
        self._trainer = trainer
        self._registry = registry
        self._config = config
        self._on_waiting = on_waiting
        # When a worker whose push failed may be tried again.
        self._retry_at: dict[Worker, float] = {}

    async def push(self, version: int) -> int:
        """Pushes to every live worker that lacks the version; returns how many workers hold it.

        A worker whose push fails is left out until it works; errors of the trainer itself are raised.
        """
        lacking = [worker for worker in self._registry.all() if not worker.holds(version) and self._may_try(worker)]
        missing = [worker for worker in lacking if not await self._holds_by_its_word(worker, version)]
        if missing:
            await self._push_to(missing, version)
        return len(self._registry.holding(version))

    async def require(self, version: int) -> None:
        """Pushes until at least one worker holds the version; raises PeerLostError after `worker_wait_s`."""
        deadline = time.monotonic() + self._config.dispatch.worker_wait_s
        while await self.push(version) == 0:
            self._on_waiting(True)
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"No rollout worker took the weights for {self._config.dispatch.worker_wait_s:g} s: "
                    "start one, or look at its log."
                )
            await self._wait_for_change()
        self._on_waiting(False)

    @asynccontextmanager
    async def keeping(self, version: int) -> AsyncIterator[None]:
        """Pushes to workers that come, or come back, while the block runs. A push under way is finished at the end."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._keep(version, stop))
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        finally:
            stop.set()
            self._registry.notify()
            await asyncio.wait([task])
        task.result()

    async def _keep(self, version: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self.push(version)
            except PerigeeError as error:
                log.warning("weights could not be pushed", version=version, error=error.message)
            if not stop.is_set():
                await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        """Until a worker changes or a retry is due."""
        changed = asyncio.Event()
        with self._registry.watch(changed.set), contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), timeout=self._config.weights.retry_s)

    def _may_try(self, worker: Worker) -> bool:
        self._retry_at = {w: at for w, at in self._retry_at.items() if self._registry.is_live(w)}
        return self._retry_at.get(worker, 0.0) <= time.monotonic()

    async def _holds_by_its_word(self, worker: Worker, version: int) -> bool:
        """A worker that was pushed this version and reported otherwise may have reported before the commit: ask it."""
        if worker.pushed_version != version:
            return False
        try:
            state = await worker.client.get_state(
                rollout_pb2.GetStateRequest(), timeout_s=self._config.control_timeout_s
            )
        except PerigeeError as error:
            self._put_off(worker, error.message)
            return True
        if state.status == rollout_pb2.WORKER_STATUS_READY and state.policy_version == version:
            if worker.suspect is None:
                self._registry.mark_pushed(worker, version)
            return True
        return False

    async def _push_to(self, workers: list[Worker], version: int) -> None:
        request = pb.PushWeightsRequest(
            run_id=self._run_id,
            policy_version=version,
            targets=[pb.PushTarget(worker_id=worker.worker_id, address=worker.address) for worker in workers],
        )
        timeout_s = self._config.weights.push_timeout_s
        try:
            response = await self._trainer.push_weights(request, timeout_s=timeout_s)
        except FailedPreconditionError:
            # A trainer that started again holds the base model until it is told otherwise.
            await self._hold_version(version)
            response = await self._trainer.push_weights(request, timeout_s=timeout_s)
        by_id = {worker.worker_id: worker for worker in workers}
        for outcome in response.outcomes:
            worker = by_id[outcome.worker_id]
            if outcome.committed and self._registry.is_live(worker):
                self._registry.mark_pushed(worker, version)
            elif not outcome.committed:
                metrics.FAILURES.labels("push").inc()
                self._put_off(worker, outcome.reason)

    def _put_off(self, worker: Worker, reason: str) -> None:
        log.warning("worker did not take the weights", worker=worker.worker_id, reason=reason)
        self._retry_at[worker] = time.monotonic() + self._config.weights.retry_s
