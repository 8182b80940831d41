"""Devices that trainer and rollout workers share: one side leaves before the other needs them (k1.5 section 2.6.3).

    rollout | leave, onload | training, checkpoint | convert, offload | weights: the workers come back | rollout

`WeightSync` hands them over, in two places: `trainers_turn` before the trainer trains, loads or exports, `push` before
workers take weights. Workers elsewhere never leave; those that do are the ones on the trainer's host, or the ones that
are named.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from perigee.errors import TRANSIENT, PerigeeError, UnavailableError
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.run_config import RunConfig
from services.coordinator.run_log import Timeline
from services.coordinator.workers import AWAY, Worker, WorkerRegistry
from services.kit.server import end_tasks
from services.kit.telemetry import get_logger

log = get_logger(__name__)


@dataclass
class SharedDevices:
    """The shared devices of one run; does nothing where `run.deployment` is `separate`."""

    run_id: str
    config: RunConfig
    settings: CoordinatorConfig
    registry: WorkerRegistry
    trainer: TrainerClient
    # Takes what people should know.
    report: Callable[[str], None]
    # Makes what workers take of a version that the trainer has loaded.
    convert: Callable[[int], Awaitable[None]]
    # Named in each call: workers and trainer refuse calls of an iteration before the last one named.
    iteration: int = 1
    timeline: Timeline = field(default_factory=Timeline)
    # Whether people know that no worker leaves.
    _has_reported: bool = False

    @property
    def are_shared(self) -> bool:
        """Whether there are any."""
        return self.config.deployment == "hybrid"

    @asynccontextmanager
    async def trainers_turn(self) -> AsyncIterator[None]:
        """Has the workers leave, then the trainer take its memory again; who registers during the block leaves, too.

        Raises UnavailableError when a worker is not known to have left: both would not fit.
        """
        if not self.are_shared:
            yield
            return
        await self.registry.wait_known()
        if self.registry.all() and not self._find_workers() and not self._has_reported:
            self._has_reported = True
            self.report(
                "no worker leaves the trainer's devices: none has its host in its address or is in run.hybrid.workers"
            )
        left: set[Worker] = set()
        with self.timeline.phase("leave"):
            await self._take_from_workers(left)
        with self.timeline.phase("onload"):
            await self.trainer.onload(
                trainer_pb2.OnloadRequest(run_id=self.run_id, iteration=self.iteration),
                timeout_s=self.settings.checkpoint_timeout_s,
            )
        keeping = asyncio.create_task(self._keep_away(left))
        try:
            yield
        finally:
            await end_tasks(keeping)

    async def give_to_workers(self, version: int) -> None:
        """Has the trainer make what workers take of the version, then leave its memory, unless it has left."""
        if not self.are_shared or self.config.hybrid.trainer == "keep":
            return
        try:
            state = await self.trainer.get_state(
                trainer_pb2.GetStateRequest(run_id=self.run_id), timeout_s=self.settings.control_timeout_s
            )
        except UnavailableError:
            return  # it has no memory, and workers may have the weights from others
        if state.offloaded:
            return
        with self.timeline.phase("convert"):
            await self.convert(version)
        with self.timeline.phase("offload"):
            await self.trainer.offload(
                trainer_pb2.OffloadRequest(run_id=self.run_id, iteration=self.iteration),
                timeout_s=self.settings.checkpoint_timeout_s,
            )

    async def bring_back(self, worker: Worker) -> int:
        """Has a worker that is away come back with the weights that it holds; returns their version."""
        request = rollout_pb2.ComeBackRequest(run_id=self.run_id, iteration=self.iteration)
        response = await worker.client.come_back(request, timeout_s=self.settings.weights.push_timeout_s)
        log.info("worker came back", worker=worker.worker_id, seconds=round(response.seconds, 3))
        return response.policy_version

    async def _keep_away(self, left: set[Worker]) -> None:
        """Has workers that register leave, until cancelled; reports those that do not."""
        changed = asyncio.Event()
        with self.registry.watch(changed.set):
            while True:
                changed.clear()
                try:
                    await self._take_from_workers(left)
                except UnavailableError as error:
                    log.warning("a worker is beside the trainer", error=error.message)
                    self.report(error.message)
                await changed.wait()

    async def _take_from_workers(self, left: set[Worker]) -> None:
        """Returns when every worker on the shared devices is among those that left, also who registers meanwhile."""
        deadline = time.monotonic() + self.settings.weights.push_timeout_s
        while staying := [worker for worker in self._find_workers() if worker not in left]:
            outcomes = await asyncio.gather(*(self._take_from(worker, deadline) for worker in staying))
            if reasons := [reason for reason in outcomes if reason is not None]:
                raise UnavailableError(f"Workers did not leave the shared devices: {'; '.join(reasons)}")
            left.update(staying)

    def _find_workers(self) -> list[Worker]:
        return [worker for worker in self.registry.all() if self.leaves(worker)]

    def leaves(self, worker: Worker) -> bool:
        """Returns whether a worker is on shared devices, which it leaves to the trainer."""
        if not self.are_shared:
            return False
        if names := self.config.hybrid.workers:
            return worker.worker_id in names
        return worker.address.rpartition(":")[0] == self.settings.trainer_address.rpartition(":")[0]

    async def _take_from(self, worker: Worker, deadline: float) -> str | None:
        """Has one worker leave; returns why it did not.

        One whose lease ends meanwhile has died or hangs: nobody waits for its answer.
        """
        leaving = asyncio.create_task(self._leave(worker, deadline))

        def give_up() -> None:
            if not self.registry.is_live(worker):
                leaving.cancel()

        try:
            with self.registry.watch(give_up):
                give_up()
                await asyncio.wait((leaving,))
            return None if leaving.cancelled() else leaving.result()
        finally:
            await end_tasks(leaving)

    async def _leave(self, worker: Worker, deadline: float) -> str | None:
        """Tells a worker to leave, again while it fails for a while; returns why it did not by the deadline."""
        request = rollout_pb2.LeaveRequest(
            run_id=self.run_id,
            iteration=self.iteration,
            residence=rollout_pb2.Residence.Value(f"RESIDENCE_{self.config.hybrid.engine.upper()}"),
        )
        while True:
            left_s = deadline - time.monotonic()
            try:
                response = await worker.client.leave(request, timeout_s=max(1.0, left_s))
            except PerigeeError as error:
                log.warning("worker did not leave", worker=worker.worker_id, error=error.message)
                if left_s <= 0 or not isinstance(error, TRANSIENT):
                    return f"{worker.worker_id}: {error.message}"
            else:
                worker.status = AWAY
                log.info("worker left its memory", worker=worker.worker_id, freed_bytes=response.freed_bytes)
                return None
            await asyncio.sleep(self.settings.weights.retry_s)
