"""What a run shows of itself while it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import TypeAlias

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import UnavailableError
from services.coordinator.workers import Worker, WorkerRegistry

RunPhase: TypeAlias = "pb.RunPhase.ValueType"

TERMINAL = frozenset((pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_FAILED, pb.RUN_PHASE_STOPPED))
# A watcher sees at least this many seconds' news at once.
WATCH_SECONDS = 0.5
# Snapshots that wait for a slow watcher.
WATCH_QUEUE = 64


class StatusBoard:
    """The state of one run that snapshots are made of."""

    def __init__(self, run_id: str, iterations: int, registry: WorkerRegistry) -> None:
        self._run_id = run_id
        self._iterations = iterations
        self._registry = registry
        self._phase: RunPhase = pb.RUN_PHASE_WAITING
        self._waiting = False
        self._started = time.monotonic()
        self._phase_started = self._started
        self._ended: float | None = None
        # None ends a watch.
        self._watchers: set[asyncio.Queue[pb.RunSnapshot | None]] = set()
        self._closed = False
        self.earlier_seconds = 0.0
        self.iteration = 0
        self.policy_version = 0
        self.done = 0
        self.total = 0
        self.metrics: Mapping[str, float] = {}
        self.error = ""

    @property
    def phase(self) -> RunPhase:
        """The phase, or WAITING while the phase waits for a peer."""
        return pb.RUN_PHASE_WAITING if self._waiting and self._phase not in TERMINAL else self._phase

    @property
    def elapsed_seconds(self) -> float:
        """Age of the run, time in which no coordinator ran left out."""
        return self.earlier_seconds + (self._ended or time.monotonic()) - self._started

    def enter(self, phase: RunPhase, total: int = 0) -> None:
        """Begins a phase."""
        self._phase, self.done, self.total = phase, 0, total
        self._phase_started = time.monotonic()
        self._ended = self._phase_started if phase in TERMINAL else None
        self._tell()

    def set_waiting(self, waiting: bool) -> None:
        """Shows that the phase waits for a worker or another peer."""
        if waiting != self._waiting:
            self._waiting = waiting
            self._tell()

    def fail(self, error: str) -> None:
        """Ends the run with an error."""
        self.error = error
        self.enter(pb.RUN_PHASE_FAILED)

    def snapshot(self) -> pb.RunSnapshot:
        """The state as a message."""
        return pb.RunSnapshot(
            run_id=self._run_id,
            phase=self.phase,
            iteration=self.iteration,
            iterations=self._iterations,
            policy_version=self.policy_version,
            phase_done=self.done,
            phase_total=self.total,
            phase_seconds=time.monotonic() - self._phase_started,
            elapsed_seconds=self.elapsed_seconds,
            metrics=self.metrics,
            workers=worker_snapshots(self._registry),
            error=self.error,
        )

    async def watch(self) -> AsyncGenerator[pb.RunSnapshot, None]:
        """Snapshots on every change of phase and at least twice a second, until the run has ended.

        Raises UnavailableError once the board is closed.
        """
        changes: asyncio.Queue[pb.RunSnapshot | None] = asyncio.Queue()
        self._watchers.add(changes)
        snapshot = None if self._closed else self.snapshot()
        try:
            while True:
                if snapshot is None:
                    raise UnavailableError("The coordinator is stopping.")
                yield snapshot
                if snapshot.phase in TERMINAL:
                    return
                try:
                    snapshot = await asyncio.wait_for(changes.get(), timeout=WATCH_SECONDS)
                except TimeoutError:
                    snapshot = self.snapshot()
        finally:
            self._watchers.discard(changes)

    def close(self) -> None:
        """Ends the watches, since the process stops; the run's next coordinator is to be watched."""
        self._closed = True
        for changes in self._watchers:
            changes.put_nowait(None)

    def _tell(self) -> None:
        if self._closed:
            return
        for changes in self._watchers:
            # A watcher that does not read loses what is old.
            while changes.qsize() >= WATCH_QUEUE:
                changes.get_nowait()
            changes.put_nowait(self.snapshot())


def worker_snapshots(registry: WorkerRegistry) -> list[pb.WorkerSnapshot]:
    """The workers with a lease."""
    return [_worker_snapshot(worker, registry.clock()) for worker in registry.all()]


def _worker_snapshot(worker: Worker, now: float) -> pb.WorkerSnapshot:
    return pb.WorkerSnapshot(
        worker_id=worker.worker_id,
        address=worker.address,
        ready=worker.ready and worker.suspect is None,
        running=max(worker.running, worker.outstanding),
        policy_version=worker.reported_version if worker.pushed_version is None else worker.pushed_version,
        lease_remaining_seconds=max(0.0, worker.expires - now),
    )
