"""Keeps trainer and workers at the policy version of the run: checkpoints are loaded, weights are pushed or pulled.

Where they share devices, this is where these change hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.errors import TRANSIENT, DeadlineExceededError, FailedPreconditionError, PerigeeError, UnavailableError
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.v1 import weights_pb2
from services.coordinator.context import RunContext
from services.coordinator.directory import plan_sources
from services.coordinator.hybrid import SharedDevices
from services.coordinator.run_log import Timeline
from services.coordinator.workers import AWAY, EMPTY, FAILURES, READY, PeerLostError, Worker
from services.kit.server import end_tasks
from services.kit.telemetry import get_logger

log = get_logger(__name__)

TRAINER_POLL_SECONDS = 0.25


class WeightSync:
    """Policy version of one run on trainer and workers. Pushes and loads need a trainer without another job."""

    def __init__(self, context: RunContext) -> None:
        self._run_id = context.run_id
        self._trainer = context.peers.trainer
        self._registry = context.registry
        self._config = context.settings
        self._status = context.status
        self._connect_receiver = context.peers.connect_receiver
        self._directory = context.directory
        self._devices = SharedDevices(
            context.run_id,
            context.config,
            context.settings,
            context.registry,
            context.peers.trainer,
            context.status.report,
            self._convert,
        )
        # Workers that a push or a pull is under way to.
        self._underway: dict[Worker, None] = {}
        # When a worker whose push failed may be tried again.
        self._retry_at: dict[Worker, float] = {}
        # Why it last failed.
        self._problems: dict[Worker, str] = {}

    def begin(self, iteration: int, timeline: Timeline) -> None:
        """Counts what follows to an iteration, and its seconds to that iteration's timeline."""
        self._devices.iteration, self._devices.timeline = iteration, timeline
        self._status.timeline = timeline

    def stays(self, worker: Worker) -> bool:
        """Returns whether a worker may get work in the trainer's turn: it does not leave, nor is it pushed weights."""
        return worker not in self._underway and not self._devices.leaves(worker)

    async def wait_until_free(self) -> pb.GetStateResponse:
        """Returns the trainer's state once it has no job: one of a coordinator that died may still be ending.

        Raises DeadlineExceededError after `recovery_wait_s`.
        """
        deadline = time.monotonic() + self._config.recovery_wait_s
        while True:
            state = await self._trainer.get_state(
                pb.GetStateRequest(run_id=self._run_id), timeout_s=self._config.control_timeout_s
            )
            if not state.busy:
                return state
            if time.monotonic() > deadline:
                raise DeadlineExceededError(
                    f"The trainer has been busy with another job for {self._config.recovery_wait_s:g} s."
                )
            await asyncio.sleep(TRAINER_POLL_SECONDS)

    async def has_loaded(self, version: int) -> bool:
        """Returns whether the trainer has the version loaded, once it has no job."""
        state = await self.wait_until_free()
        return state.policy_version == version and state.run_id in ("", self._run_id)

    async def ensure_version(self, version: int) -> None:
        """Has the trainer load the version's checkpoint unless it has the version loaded."""
        if not await self.has_loaded(version):
            async with self.trainers_turn(version):
                pass  # it has loaded the version

    @asynccontextmanager
    async def trainers_turn(self, version: int) -> AsyncIterator[None]:
        """The trainer has the shared devices, and the version loaded, while the block lasts: it can train or export."""
        is_loaded = await self.has_loaded(version)
        async with self._devices.trainers_turn():
            if not is_loaded:
                await self._trainer.load_checkpoint(
                    pb.LoadCheckpointRequest(run_id=self._run_id, policy_version=version),
                    timeout_s=self._config.checkpoint_timeout_s,
                )
            yield

    async def save(self, version: int, pinned: bool = False) -> None:
        """Has the trainer write the checkpoint of the version that it has loaded; a pinned one stays for ever."""
        response = await self._trainer.save_checkpoint(
            pb.SaveCheckpointRequest(run_id=self._run_id, policy_version=version, pinned=pinned),
            timeout_s=self._config.checkpoint_timeout_s,
        )
        if response.upload_error:
            log.warning("the checkpoint is on the trainer's machine only", version=version, error=response.upload_error)

    async def push(self, version: int) -> int:
        """Pushes to every live worker that lacks the version and whose engine runs; returns how many workers have it.

        The trainer leaves shared devices before, and workers that are away come back. One that a push is under way to
        is left to it. A worker whose push fails gets no work and is tried again later; errors of the trainer itself are
        raised.
        """
        if self._find_lacking(version):
            try:
                await self._push_to_lacking(version)
            except FailedPreconditionError:
                # A trainer that restarted has the base model loaded.
                await self.ensure_version(version)
                await self._push_to_lacking(version)
        return len(self._registry.with_version(version))

    def _find_lacking(self, version: int) -> list[Worker]:
        return [
            worker
            for worker in self._registry.all()
            if worker.takes_weights
            and not worker.has_version(version)
            and self._may_try(worker)
            and worker not in self._underway
        ]

    async def _push_to_lacking(self, version: int) -> None:
        await self._devices.give_to_workers(version)
        with self._devices.timeline.phase("weights"):
            lacking, earlier = self._find_lacking(version), list(self._underway)
            self._underway |= dict.fromkeys(lacking)
            try:
                have = await asyncio.gather(*(self._reports_version(worker, version) for worker in lacking))
                missing = [worker for worker, has_it in zip(lacking, have, strict=True) if not has_it]
                if missing and self._config.weights.transfer == "pull":
                    await self._pull_to(missing, version, earlier)
                elif missing:
                    await self._push_to(missing, version)
            finally:
                for worker in lacking:
                    del self._underway[worker]

    async def _convert(self, version: int) -> None:
        """Has the trainer make what workers are pushed, or pull, of the version that it has loaded."""
        if self._config.weights.transfer == "pull":
            self._directory.publish(self._run_id, version, await self._publish(version))
            return
        request = pb.PushWeightsRequest(run_id=self._run_id, policy_version=version)
        await self._trainer.push_weights(request, timeout_s=self._config.weights.push_timeout_s)

    async def ensure(self, version: int) -> None:
        """Pushes unless a worker has the version, until one has; raises PeerLostError after `worker_wait_s`."""
        deadline = time.monotonic() + self._config.dispatch.worker_wait_s
        while not self._registry.with_version(version) and await self.push(version) == 0:
            self._status.set_waiting(True)
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"No rollout worker took the weights for {self._config.dispatch.worker_wait_s:g} s: "
                    "start one, or look at its log."
                )
            await self._wait_for_change()
        self._status.set_waiting(False)

    @asynccontextmanager
    async def run(self, version: int) -> AsyncIterator[None]:
        """Pushes to workers that register while the block runs. At the end nobody needs a push that is under way.

        On shared devices it is waited for: a worker ends it alone, and would come back after it was told to leave.
        """
        ending = asyncio.Event()
        pushing = asyncio.create_task(self._keep_pushing(version, ending))
        try:
            yield
            if self._devices.are_shared:
                ending.set()
                self._registry.notify()
                await pushing
        finally:
            await end_tasks(pushing)
        # A push that had no image yet keeps the trainer until it has one; a trainer that is away has no push.
        with contextlib.suppress(UnavailableError):
            await self.wait_until_free()

    async def _keep_pushing(self, version: int, ending: asyncio.Event) -> None:
        """Pushes at every change: a worker that joins does not wait for the end of another one's push.

        On shared devices it does: these may change hands in a push.
        """
        async with asyncio.TaskGroup() as pushes:
            while not ending.is_set():
                push = pushes.create_task(self._try_push(version))
                if self._devices.are_shared:
                    await push
                if not ending.is_set():
                    await self._wait_for_change()

    async def _try_push(self, version: int) -> None:
        try:
            await self.push(version)
        except PerigeeError as error:
            log.warning("weights could not be pushed", version=version, error=error.message)

    async def _wait_for_change(self) -> None:
        """Waits until a worker changes or a retry is due."""
        changed = asyncio.Event()
        with self._registry.watch(changed.set), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.weights.retry_s):
                await changed.wait()

    def _may_try(self, worker: Worker) -> bool:
        self._retry_at = {w: at for w, at in self._retry_at.items() if self._registry.is_live(w)}
        self._problems = {w: text for w, text in self._problems.items() if self._registry.is_live(w)}
        return self._retry_at.get(worker, 0.0) <= time.monotonic()

    async def _reports_version(self, worker: Worker, version: int) -> bool:
        """Asks a worker that was pushed the version whether it has it: its report may be older than the commit."""
        if worker.pushed_version != version:
            return False
        try:
            state = await worker.client.get_state(
                rollout_pb2.GetStateRequest(), timeout_s=self._config.control_timeout_s
            )
        except PerigeeError as error:
            self._postpone(worker, error.message)
            return True
        if state.status == AWAY and state.policy_version == version:
            return await self._comes_back(worker, version)
        if state.status == READY and state.policy_version == version:
            if worker.suspect is None:
                self._record(worker, version)
            return True
        return state.status not in (EMPTY, READY, AWAY)

    async def _comes_back(self, worker: Worker, version: int) -> bool:
        """Has a worker that left with the version come back with it; returns whether it did, or else lacks it."""
        try:
            is_back = await self._devices.bring_back(worker) == version
        except PerigeeError as error:
            log.warning("worker did not come back", worker=worker.worker_id, error=error.message)
            return False
        if is_back:
            self._record(worker, version)
        return is_back

    async def _push_to(self, workers: list[Worker], version: int) -> None:
        request = pb.PushWeightsRequest(
            run_id=self._run_id,
            policy_version=version,
            targets=[pb.PushTarget(worker_id=worker.worker_id, address=worker.address) for worker in workers],
        )
        response = await self._trainer.push_weights(request, timeout_s=self._config.weights.push_timeout_s)
        by_id = {worker.worker_id: worker for worker in workers}
        for outcome in response.outcomes:
            worker = by_id[outcome.worker_id]
            if outcome.committed:
                self._record(worker, version)
            else:
                FAILURES.labels("push").inc()
                self._postpone(worker, outcome.reason)

    async def _pull_to(self, workers: list[Worker], version: int, earlier: list[Worker]) -> None:
        """Has every worker pull the version, from workers that have it or pull it, too, `earlier` ones among them."""
        published = self._find_held(version)
        # A trainer that is away or busy is not waited for where others have the weights, unless these failed before.
        if published is None or any(worker in self._retry_at for worker in workers):
            published = await self._publish(version)
        self._directory.publish(self._run_id, version, published)
        holders = self._directory.holders(published.image_id)
        # Those that a coordinator before this one knew as holders have nothing to pull.
        addresses = sorted((worker.address for worker in workers), key=lambda address: address not in holders)
        sources = plan_sources(published.source, [*holders, *(worker.address for worker in earlier)], addresses)
        await asyncio.gather(
            *(self._pull(worker, version, published.image_id, sources[worker.address]) for worker in workers)
        )

    async def _pull(self, worker: Worker, version: int, image_id: str, sources: list[str]) -> None:
        request = weights_pb2.PullRequest(image_id=image_id, sources=sources)
        try:
            async with self._connect_receiver(worker.address) as receiver:
                report = await receiver.pull(request, timeout_s=self._config.weights.push_timeout_s)
        except PerigeeError as error:
            FAILURES.labels("push").inc()
            self._postpone(worker, error.message)
            return
        if report.warning:
            self._registry.report(f"{worker.worker_id}: {report.warning}")
        self._directory.add(image_id, worker)
        self._record(worker, version)

    def _record(self, worker: Worker, version: int) -> None:
        """Records that a worker has a version, unless its lease has ended; its failures are forgotten then."""
        if self._registry.is_live(worker):
            self._retry_at.pop(worker, None)
            self._problems.pop(worker, None)
            self._registry.mark_pushed(worker, version)

    async def _publish(self, version: int) -> pb.PublishWeightsResponse:
        """Has the trainer publish the version; while it is away, workers that have the version do without it."""
        request = pb.PublishWeightsRequest(run_id=self._run_id, policy_version=version)
        try:
            published = await self._trainer.publish_weights(request, timeout_s=self._config.weights.push_timeout_s)
        except TRANSIENT:
            if (known := self._find_held(version)) is None:
                raise
            return known
        return published

    def _find_held(self, version: int) -> pb.PublishWeightsResponse | None:
        """Returns the export of a version that workers hold."""
        known = self._directory.find(self._run_id, version)
        return known if known is not None and self._directory.holders(known.image_id) else None

    def _postpone(self, worker: Worker, reason: str) -> None:
        log.warning("worker did not take the weights", worker=worker.worker_id, reason=reason)
        # Once, however often it is tried again.
        if self._problems.get(worker) != reason:
            self._problems[worker] = reason
            self._registry.report(f"{worker.worker_id} did not take the weights: {reason}")
        self._retry_at[worker] = time.monotonic() + self._config.weights.retry_s
