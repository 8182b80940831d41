"""Registry of the rollout workers: which are alive, which weights they have, which have room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from prometheus_client import Counter, Gauge

from perigee.errors import InvalidArgumentError, NotFoundError, UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from services.kit.telemetry import get_logger

log = get_logger(__name__)

WorkerStatus: TypeAlias = "rollout_pb2.WorkerStatus.ValueType"
STARTING, EMPTY, READY = (
    rollout_pb2.WORKER_STATUS_STARTING,
    rollout_pb2.WORKER_STATUS_EMPTY,
    rollout_pb2.WORKER_STATUS_READY,
)
AWAY = rollout_pb2.WORKER_STATUS_AWAY
# Workers renew their leases so often, and learn by it of a coordinator that started again.
RENEWALS_PER_LEASE = 3
# Weight of earlier rollout phases in a worker's speed, with each one after them.
SPEED_DECAY = 0.5

WORKERS = Gauge("perigee_coordinator_workers", "Rollout workers with a lease.")
FAILURES = Counter("perigee_coordinator_failures", "Failures by kind.", ["kind"])
for _kind in ("worker_call", "segment", "push", "judging"):
    FAILURES.labels(_kind)  # a rate over a counter that appears with its first failure misses that one
CAPACITY = Gauge("perigee_coordinator_sequence_capacity", "Sequences that the workers with a lease decode at once.")
RUNNING = Gauge("perigee_coordinator_running_sequences", "Sequences given to workers that have not ended.")


class PeerLostError(UnavailableError):
    """A peer stayed away for as long as the configuration allows: the run fails instead of waiting again."""


@dataclass(eq=False)
class Worker:
    """Rollout worker from its registration to the end of its lease."""

    worker_id: str
    address: str
    capacity: int
    lease_epoch: int
    client: RolloutClient
    expires: float
    status: WorkerStatus
    reported_version: int
    running: int = 0
    # The version that this coordinator had pushed to it. The version that a worker reports is not trusted: its weights
    # may come from an iteration that was rolled back.
    pushed_version: int | None = None
    # Sequences given to it that have not ended, and their work (`budgets.TokenCosts`).
    outstanding: int = 0
    work: float = 0.0
    # Work that it ended in rollout phases, and the seconds from its first call to the last end in each.
    ended_work: float = 0.0
    busy_seconds: float = 0.0
    # Why it gets no work until it renews its lease.
    suspect: str | None = None

    @property
    def ready(self) -> bool:
        """Whether its engine holds weights."""
        return self.status == READY

    @property
    def takes_weights(self) -> bool:
        """Whether its engine runs, or comes back with the weights."""
        return self.status in (EMPTY, READY, AWAY)

    def has_version(self, version: int) -> bool:
        """Returns whether it may be given work of a policy version."""
        return self.ready and self.suspect is None and self.pushed_version == version

    @property
    def load(self) -> float:
        """Sequences given to it per sequence that it decodes at once."""
        return self.outstanding / self.capacity

    @property
    def speed(self) -> float | None:
        """Work per second in the rollout phases so far, the latest of which weighs most; None before one has ended.

        Workers that are given work in proportion to it come to end together: one that ends before the others gets more
        in the next phase, though a step takes time whatever its sequences.
        """
        return self.ended_work / self.busy_seconds if self.busy_seconds else None

    def record_phase(self, work: float, seconds: float) -> None:
        """Counts a rollout phase for its speed."""
        self.ended_work = self.ended_work * SPEED_DECAY + work
        self.busy_seconds = self.busy_seconds * SPEED_DECAY + seconds


@dataclass
class WorkerRegistry:
    """Registered workers with their leases. Watchers are called on every change that may matter to them."""

    connect: Callable[[str], RolloutClient]
    lease_seconds: float
    clock: Callable[[], float] = time.monotonic
    # Receives a sentence for each worker that joins or leaves, and of each engine that dies or runs again.
    report: Callable[[str], None] = lambda text: None
    _workers: dict[str, Worker] = field(default_factory=dict)
    _watchers: set[Callable[[], None]] = field(default_factory=set)
    _epochs: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def __post_init__(self) -> None:
        self._known_at = self.clock() + self.lease_seconds / RENEWALS_PER_LEASE
        WORKERS.set_function(lambda: len(self._workers))
        CAPACITY.set_function(lambda: sum(worker.capacity for worker in list(self._workers.values())))
        RUNNING.set_function(lambda: sum(worker.outstanding for worker in list(self._workers.values())))

    def register(
        self, worker_id: str, address: str, capacity: int, policy_version: int, status: WorkerStatus
    ) -> Worker:
        """Begins a lease; an earlier one of the same worker ends, and its work is given out again."""
        if not worker_id:
            raise InvalidArgumentError.for_field("worker_id", "is required")
        if ":" not in address:
            raise InvalidArgumentError.for_field("address", f"must be host:port, got {address!r}")
        if capacity < 1:
            raise InvalidArgumentError.for_field("capacity", "must be at least 1")
        if worker_id in self._workers:
            self._remove(worker_id, "registered again")
        self._epochs += 1
        worker = Worker(
            worker_id=worker_id,
            address=address,
            capacity=capacity,
            lease_epoch=self._epochs,
            client=self.connect(address),
            expires=self.clock() + self.lease_seconds,
            status=status,
            reported_version=policy_version,
        )
        self._workers[worker_id] = worker
        self.report(f"{worker_id} joined, at {address}")
        log.info("worker registered", worker=worker_id, address=address, capacity=capacity, ready=worker.ready)
        self.notify()
        return worker

    def renew(self, worker_id: str, lease_epoch: int, running: int, policy_version: int, status: WorkerStatus) -> None:
        """Renews a lease and stores the worker's report; raises NotFoundError when the lease is lost."""
        worker = self._leased(worker_id, lease_epoch)
        worker.expires = self.clock() + self.lease_seconds
        worker.running = running
        changed = (worker.status, worker.reported_version) != (status, policy_version) or worker.suspect is not None
        if worker.status != status and STARTING in (worker.status, status):
            self.report(f"{worker_id}: its engine {'died and starts again' if status == STARTING else 'runs again'}")
        worker.status, worker.reported_version, worker.suspect = status, policy_version, None
        if changed:
            self.notify()

    def deregister(self, worker_id: str, lease_epoch: int) -> None:
        """Ends a lease; raises NotFoundError when it is lost already."""
        self._leased(worker_id, lease_epoch)
        self._remove(worker_id, "deregistered")
        self.notify()

    def expire(self) -> list[Worker]:
        """Ends the leases that ran out, and returns their workers."""
        now = self.clock()
        lost = [worker for worker in self._workers.values() if worker.expires <= now]
        for worker in lost:
            self._remove(worker.worker_id, f"silent for {self.lease_seconds:g} s")
        if lost:
            self.notify()
        return lost

    async def wait_known(self) -> None:
        """Returns once workers that a coordinator before this one had have had the time to register again."""
        if (left_s := self._known_at - self.clock()) > 0:
            await asyncio.sleep(left_s)

    async def sweep(self) -> None:
        """Ends leases as they run out, until cancelled."""
        pause_s = self.lease_seconds / 8
        while True:
            slept_at = self.clock()
            await asyncio.sleep(pause_s)
            self.excuse(self.clock() - slept_at - pause_s, pause_s)
            self.expire()

    def excuse(self, late_s: float, tolerance_s: float) -> None:
        """Extends all leases by the time in which this process stood still: the workers were not silent then."""
        if late_s > tolerance_s:
            for worker in self._workers.values():
                worker.expires += late_s

    def mark_pushed(self, worker: Worker, version: int) -> None:
        """Records that the worker has committed a version that this coordinator had pushed to it."""
        worker.pushed_version, worker.status, worker.suspect = version, READY, None
        self.notify()

    def suspect(self, worker: Worker, reason: str) -> None:
        """Gives the worker no work until it renews its lease."""
        worker.suspect = reason
        log.warning("worker failed a call", worker=worker.worker_id, reason=reason)
        self.notify()

    def invalidate(self) -> None:
        """Forgets which versions were pushed: every worker gets the weights again."""
        for worker in self._workers.values():
            worker.pushed_version = None

    def is_live(self, worker: Worker) -> bool:
        """Returns whether this very registration still has its lease."""
        return self._workers.get(worker.worker_id) is worker

    def all(self) -> list[Worker]:
        """Returns the workers with a lease, by id."""
        return [self._workers[worker_id] for worker_id in sorted(self._workers)]

    def with_version(self, version: int) -> list[Worker]:
        """Returns the workers that may be given work of a policy version, least loaded first."""
        return sorted((worker for worker in self.all() if worker.has_version(version)), key=lambda worker: worker.load)

    @contextmanager
    def watch(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Calls `watcher` on every change while the block runs."""
        self._watchers.add(watcher)
        try:
            yield
        finally:
            self._watchers.discard(watcher)

    def notify(self) -> None:
        """Calls the watchers."""
        for watcher in list(self._watchers):
            watcher()

    def _leased(self, worker_id: str, lease_epoch: int) -> Worker:
        worker = self._workers.get(worker_id)
        if worker is None or worker.lease_epoch != lease_epoch:
            raise NotFoundError(f"Worker {worker_id} has no lease {lease_epoch}: register again.")
        return worker

    def _remove(self, worker_id: str, reason: str) -> None:
        del self._workers[worker_id]
        self.report(f"{worker_id} left: {reason}")
        log.warning("worker left", worker=worker_id, reason=reason)
