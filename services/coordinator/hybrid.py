"""Devices that trainer and rollout workers share: one side leaves before the other needs them (k1.5 section 2.6.3).

    rollout | leave, onload | training, checkpoint | convert, offload | weights: the workers come back | rollout

Workers elsewhere never leave; those that do are the ones on the trainer's host, or the ones that are named. What the
trainer does outside of an iteration, supervised stages, loading and the export, finds the workers gone as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from perigee.errors import TRANSIENT, PerigeeError, UnavailableError
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.context import RunContext
from services.coordinator.run_log import Timeline
from services.coordinator.workers import AWAY, Worker
from services.kit.telemetry import get_logger

log = get_logger(__name__)


class SharedDevices:
    """The shared devices of one iteration; does nothing where `run.deployment` is `separate`."""

    def __init__(
        self,
        context: RunContext,
        convert: Callable[[int], Awaitable[None]],
        iteration: int,
        timeline: Timeline | None = None,
    ) -> None:
        self._context = context
        self._convert = convert
        self._iteration = iteration
        self._timeline = timeline or Timeline()
        self._hybrid = context.config.hybrid
        self._is_shared = context.config.deployment == "hybrid"

    async def give_to_trainer(self) -> None:
        """Has the workers leave, then the trainer take its memory again.

        Raises UnavailableError when a worker is not known to have left: both would not fit.
        """
        if not self._is_shared:
            return
        with self._timeline.phase("leave"):
            await self._take_from_workers()
        with self._timeline.phase("onload"):
            await self._context.peers.trainer.onload(
                trainer_pb2.OnloadRequest(run_id=self._context.run_id, iteration=self._iteration),
                timeout_s=self._context.settings.checkpoint_timeout_s,
            )

    async def give_to_workers(self, version: int) -> None:
        """Has the trainer make the image that is pushed, then leave its memory; the push has workers come back."""
        if not self._is_shared or self._hybrid.trainer == "keep":
            return
        trainer, run_id = self._context.peers.trainer, self._context.run_id
        if (await trainer.get_state(trainer_pb2.GetStateRequest(run_id=run_id))).offloaded:
            return
        with self._timeline.phase("convert"):
            await self._convert(version)
        with self._timeline.phase("offload"):
            await trainer.offload(
                trainer_pb2.OffloadRequest(run_id=run_id, iteration=self._iteration),
                timeout_s=self._context.settings.checkpoint_timeout_s,
            )

    async def _take_from_workers(self) -> None:
        """Returns when every worker on the shared devices has left; one that died keeps its lease for a while."""
        settings = self._context.settings.weights
        deadline = time.monotonic() + settings.push_timeout_s
        if self._context.registry.all() and not self._find_workers():
            self._context.status.report(
                "no worker leaves the trainer's devices: none has its host in its address or is in run.hybrid.workers"
            )
        left: set[Worker] = set()
        while staying := [worker for worker in self._find_workers() if worker not in left]:
            outcomes = await asyncio.gather(*map(self._leave, staying))
            failures = {worker: each for worker, each in zip(staying, outcomes, strict=True) if each is not None}
            left |= {worker for worker in staying if worker not in failures}
            is_final = time.monotonic() > deadline or not all(isinstance(e, TRANSIENT) for e in failures.values())
            if failures and is_final:
                reasons = "; ".join(f"{worker.worker_id}: {each.message}" for worker, each in failures.items())
                raise UnavailableError(f"Workers did not leave the shared devices: {reasons}")
            if failures:
                await asyncio.sleep(settings.retry_s)

    def _find_workers(self) -> list[Worker]:
        """Returns the workers on the shared devices."""
        names, host = self._hybrid.workers, self._context.settings.trainer_address.rpartition(":")[0]
        return [
            worker
            for worker in self._context.registry.all()
            if (worker.worker_id in names if names else worker.address.rpartition(":")[0] == host)
        ]

    async def _leave(self, worker: Worker) -> PerigeeError | None:
        """Has one worker leave; returns why it did not, unless its lease has ended as well."""
        request = rollout_pb2.LeaveRequest(
            run_id=self._context.run_id,
            iteration=self._iteration,
            residence=rollout_pb2.Residence.Value(f"RESIDENCE_{self._hybrid.engine.upper()}"),
        )
        try:
            response = await worker.client.leave(request, timeout_s=self._context.settings.weights.push_timeout_s)
        except PerigeeError as error:
            log.warning("worker did not leave", worker=worker.worker_id, error=error.message)
            return error if self._context.registry.is_live(worker) else None
        worker.status = AWAY
        log.info("worker left its memory", worker=worker.worker_id, freed_bytes=response.freed_bytes)
        return None
