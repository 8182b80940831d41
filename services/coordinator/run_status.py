"""Status of a run while it works, and the event stream that its watchers read: snapshots, iterations, evaluations."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

from prometheus_client import Gauge, Info

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import UnavailableError
from services.coordinator.run_log import RunLog, Timeline, numbers
from services.coordinator.workers import Worker, WorkerRegistry

RunPhase: TypeAlias = "pb.RunPhase.ValueType"

TERMINAL = frozenset((pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_FAILED, pb.RUN_PHASE_STOPPED))
# Seconds between snapshots at most.
WATCH_SECONDS = 0.5
# Snapshots that wait for a slow watcher.
WATCH_QUEUE = 64
# Events that are kept for watchers, and for the line of the iteration.
EVENTS_KEPT = 256
PHASE = Gauge("perigee_coordinator_run_phase", "1 for the phase that the newest run is in, else 0.", ["phase"])
RUN = Info("perigee_coordinator_run", "Newest run of this coordinator.")
PHASE_NAMES = {value: name.removeprefix("RUN_PHASE_").lower() for name, value in pb.RunPhase.items() if value}


@dataclass
class Cursor:
    """Last iteration and evaluation that a watcher has received; None for a kind that it does not ask for."""

    iteration: int | None = None
    evaluation: int | None = None


class RunStatus:
    """Phase, progress and latest metrics of one run."""

    def __init__(self, run_id: str, iterations: int, registry: WorkerRegistry) -> None:
        self._run_id = run_id
        RUN.info({"run": run_id})
        self._iterations = iterations
        self._registry = registry
        self._phase: RunPhase = pb.RUN_PHASE_WAITING
        self._waiting = False
        self._waiting_for = "trainer and buffer to answer"
        self._started = time.monotonic()
        self._phase_started = self._started
        self._ended: float | None = None
        # None ends a watch.
        self._watchers: set[asyncio.Queue[pb.RunSnapshot | None]] = set()
        self._closed = False
        self.earlier_seconds = 0.0
        self.iteration = 0
        # Iterations so far that do not count, because no group was trained.
        self.uncounted = 0
        self.policy_version = 0
        self.done = 0
        self.total = 0
        self.timeline = Timeline()
        self.metrics: Mapping[str, float] = {}
        self.error = ""
        self._events: deque[pb.RunEvent] = deque(maxlen=EVENTS_KEPT)
        self.event_count = 0
        # How many of them lines of metrics.jsonl have.
        self.events_recorded = 0
        self._store_restarts: int | None = None

    @property
    def phase(self) -> RunPhase:
        """Phase of the run, or WAITING while the phase waits for a peer."""
        return pb.RUN_PHASE_WAITING if self._waiting and self._phase not in TERMINAL else self._phase

    @property
    def elapsed_seconds(self) -> float:
        """Age of the run without the time in which no coordinator ran."""
        return self.earlier_seconds + (self._ended or time.monotonic()) - self._started

    def enter(self, phase: RunPhase, total: int = 0) -> None:
        """Begins a phase."""
        self._phase, self.done, self.total = phase, 0, total
        self._phase_started = time.monotonic()
        self._ended = self._phase_started if phase in TERMINAL else None
        self._publish()

    def set_waiting(self, waiting: bool, peer: str = "a rollout worker that has the weights") -> None:
        """Sets whether the phase waits for a worker or another peer."""
        self._waiting_for = peer
        if waiting != self._waiting:
            self._waiting = waiting
            self._publish()

    def report(self, text: str) -> None:
        """Adds an event."""
        self._events.append(pb.RunEvent(elapsed_seconds=self.elapsed_seconds, text=text))
        self.event_count += 1
        self._publish()

    def count_store_restarts(self, count: int) -> None:
        """Reports when the buffer's count of its server's restarts has grown; that of a new buffer begins at 0."""
        if self._store_restarts is not None and count > self._store_restarts:
            self.report("the buffer's Valkey server died and was started again")
        self._store_restarts = count

    def events_after(self, count: int) -> list[pb.RunEvent]:
        """Returns the events after the first `count`, as far as they are kept."""
        new = self.event_count - count
        return list(self._events)[-new:] if new else []

    def fail(self, error: str) -> None:
        """Enters the failed phase."""
        self.error = error
        self.enter(pb.RUN_PHASE_FAILED)

    def snapshot(self) -> pb.RunSnapshot:
        """Returns the status as a message."""
        return pb.RunSnapshot(
            run_id=self._run_id,
            phase=self.phase,
            iteration=self.iteration,
            iterations=self._iterations + self.uncounted,
            policy_version=self.policy_version,
            phase_done=self.done,
            phase_total=self.total,
            phase_seconds=time.monotonic() - self._phase_started,
            elapsed_seconds=self.elapsed_seconds,
            metrics=self.metrics,
            workers=worker_snapshots(self._registry),
            error=self.error,
            waiting_for=self._waiting_for if self.phase == pb.RUN_PHASE_WAITING else "",
            phases=dict.fromkeys(self.timeline.under_way),
        )

    async def watch(self) -> AsyncGenerator[pb.RunSnapshot, None]:
        """Yields snapshots on every change of phase and at least twice a second, until the run has ended.

        Raises UnavailableError after `close`.
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
                    async with asyncio.timeout(WATCH_SECONDS):
                        snapshot = await changes.get()
                except TimeoutError:
                    snapshot = self.snapshot()
        finally:
            self._watchers.discard(changes)

    def close(self) -> None:
        """Ends the watches because the process stops: watchers go on with the run's next coordinator."""
        self._closed = True
        for changes in self._watchers:
            changes.put_nowait(None)

    def _publish(self) -> None:
        for phase, name in PHASE_NAMES.items():
            PHASE.labels(name).set(phase == self.phase)
        if self._closed:
            return
        for changes in self._watchers:
            # A watcher that does not read loses the oldest snapshots.
            while changes.qsize() >= WATCH_QUEUE:
                changes.get_nowait()
            changes.put_nowait(self.snapshot())


def worker_snapshots(registry: WorkerRegistry) -> list[pb.WorkerSnapshot]:
    """Returns the workers with a lease as messages."""
    return [_worker_snapshot(worker, registry.clock()) for worker in registry.all()]


def _worker_snapshot(worker: Worker, now: float) -> pb.WorkerSnapshot:
    return pb.WorkerSnapshot(
        worker_id=worker.worker_id,
        address=worker.address,
        ready=worker.ready and worker.suspect is None,
        running=max(worker.running, worker.outstanding),
        policy_version=worker.reported_version if worker.pushed_version is None else worker.pushed_version,
        lease_remaining_seconds=max(0.0, worker.expires - now),
        status=worker.status,
    )


async def stream_events(
    status: RunStatus, log: RunLog, cursor: Cursor, events: bool = False
) -> AsyncGenerator[pb.WatchRunResponse, None]:
    """Yields snapshots until the run has ended, each after the results that were recorded before it was made.

    With `events`, also what happens meanwhile.
    """
    revision, sent = -1, status.event_count
    async with aclosing(status.watch()) as snapshots:
        async for snapshot in snapshots:
            if log.revision != revision:
                revision = log.revision
                for result in await asyncio.to_thread(read_results, log, cursor, snapshot.iterations):
                    yield result
            new, sent = status.events_after(sent), status.event_count
            for event in new if events else ():
                yield pb.WatchRunResponse(event=event)
            yield pb.WatchRunResponse(run=snapshot)


def read_results(log: RunLog, cursor: Cursor, iterations: int) -> list[pb.WatchRunResponse]:
    """Returns the results after the cursor by iteration, and moves the cursor behind them.

    Raises DataLossError when a file cannot be read.
    """
    found: list[tuple[int, pb.WatchRunResponse]] = []
    if cursor.iteration is not None:
        for line in log.iterations():
            if (number := int(line["iteration"])) > cursor.iteration:
                result = pb.IterationResult(
                    iteration=number, iterations=iterations, metrics=numbers(line), record=json.dumps(line)
                )
                result.samples.extend(log.samples("", number))
                found.append((number, pb.WatchRunResponse(iteration=result)))
                cursor.iteration = number
    if cursor.evaluation is not None:
        for number, line in enumerate(log.evaluations(), start=1):
            if number > cursor.evaluation:
                evaluation = evaluation_result(number, line)
                evaluation.samples.extend(log.samples(line.get("kind", ""), line["iteration"]))
                found.append((int(line["iteration"]), pb.WatchRunResponse(evaluation=evaluation)))
                cursor.evaluation = number
    # An evaluation comes after the iteration whose weights it measures: the sort keeps the order of equals.
    results = [response for _, response in sorted(found, key=lambda item: item[0])]
    if cursor.iteration is not None and (summary := log.summary()):
        results.append(pb.WatchRunResponse(summary=summary))
    return results


def evaluation_result(number: int, line: Mapping[str, Any]) -> pb.EvaluationResult:
    """Returns a line of evaluations.jsonl as a message."""
    result = pb.EvaluationResult(
        number=number, iteration=line["iteration"], policy_version=line["policy_version"], record=json.dumps(line)
    )
    for domain, estimates in line["accuracy"].items():
        greedy, sampled = (_estimate(estimates.get(kind)) for kind in ("greedy", "sampled"))
        result.accuracies.add(domain=domain, greedy=greedy, sampled=sampled)
    return result


def _estimate(values: Mapping[str, float | None] | None) -> pb.AccuracyEstimate | None:
    if values is None or values["mean"] is None:
        return None
    return pb.AccuracyEstimate(mean=values["mean"], low=values["low"], high=values["high"])
