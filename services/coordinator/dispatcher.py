"""Dispatches sequences to rollout workers in bounded calls, spread evenly by their work; failed ones to another."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from prometheus_client import Gauge

from perigee.errors import (
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnimplementedError,
    first_error,
)
from services.coordinator.config import DispatchConfig
from services.coordinator.workers import FAILURES, PeerLostError, Worker, WorkerRegistry
from services.kit.telemetry import get_logger
from services.kit.tracing import detached_span

log = get_logger(__name__)

WAITING = Gauge("perigee_coordinator_waiting_sequences", "Sequences of the phase under way that no worker has.")

# The same call would fail on every worker, so the run fails.
FATAL = (InvalidArgumentError, UnauthenticatedError, PermissionDeniedError, UnimplementedError, DataLossError)


@dataclass(frozen=True)
class Progress:
    """Sequences of a call that ended, and those that failed, each with its reason."""

    ended: Sequence[str] = ()
    failed: Sequence[tuple[str, str]] = ()


class PeerError(Exception):
    """Error of another peer than the worker, wrapped so that the worker is not taken for the cause."""

    def __init__(self, error: PerigeeError) -> None:
        super().__init__(error.message)
        self.error = error


# Makes one call to a worker and yields its progress. Closing the generator cancels the call.
Call = Callable[[Worker, list[str]], AsyncGenerator[Progress, None]]


@dataclass(frozen=True)
class Work:
    """Work of a sequence, and the worker, by its id, that is spared a part of it since it has the prefix."""

    work: float
    holder: str = ""
    saved: float = 0.0

    def on(self, worker: Worker) -> float:
        """Returns the work on a worker."""
        return self.work - self.saved if worker.worker_id == self.holder else self.work


def deal(work: Mapping[str, Work], rooms: Mapping[Worker, int]) -> dict[Worker, dict[str, float]]:
    """Deals sequences in their order to workers, each to the one that is done with it first; returns their work there.

    With the longest first, long ones are spread over the workers in proportion to their speeds (list scheduling, LPT).
    Before, a sequence whose prefix a worker has goes there while the worker has no more than its part of all work.
    Those beyond the workers' rooms, in sequences, are left out.
    """
    workers = list(rooms)
    by_id = {worker.worker_id: number for number, worker in enumerate(workers)}
    speed_N = np.array(list(relative_speeds(workers).values()))
    work_N = np.array([worker.work for worker in workers])
    room_N = np.array(list(rooms.values()))
    chosen: dict[str, int] = {}

    def choose(key: str, number: int) -> None:
        chosen[key] = number
        work_N[number] += work[key].on(workers[number])
        room_N[number] -= 1

    # Seconds, in the unit of the speeds, that all workers take together.
    fair = (work_N.sum() + sum(each.work - each.saved for each in work.values())) / speed_N.sum()
    for key, each in work.items():
        number = by_id.get(each.holder)
        if number is None or not each.saved or not room_N[number]:
            continue
        if work_N[number] + each.work - each.saved <= fair * speed_N[number]:
            choose(key, number)
    for key, each in work.items():
        if key in chosen or not room_N.any():
            continue
        done_N = (work_N + each.work) / speed_N
        if (number := by_id.get(each.holder)) is not None:
            done_N[number] -= each.saved / speed_N[number]
        choose(key, int(np.argmin(np.where(room_N > 0, done_N, np.inf))))
    dealt: dict[Worker, dict[str, float]] = {worker: {} for worker in workers}
    for key, each in work.items():
        if key in chosen:
            worker = workers[chosen[key]]
            dealt[worker][key] = each.on(worker)
    return dealt


def relative_speeds(workers: Sequence[Worker]) -> dict[Worker, float]:
    """Returns the speed of each worker; one that is not measured has that of the others, by its capacity."""
    measured = {worker: speed for worker in workers if (speed := worker.speed)}
    per_sequence = sum(measured.values()) / sum(worker.capacity for worker in measured) if measured else 1.0
    return {worker: measured.get(worker, worker.capacity * per_sequence) for worker in workers}


class Dispatcher:
    """Queue of sequences that every live worker with the policy version takes from as fast as it can.

    The sequences should come with the longest first, as `work` has them.

    `on_waiting` is called with True when work waits and no worker can take it, with False when one takes it.

    With `only`, workers of which it is false get nothing, and the others are waited for, however long, until `go_on`.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        policy_version: int,
        config: DispatchConfig,
        call: Call,
        on_waiting: Callable[[bool], None],
        only: Callable[[Worker], bool] | None = None,
        work: Callable[[str], Work] = lambda key: Work(1.0),
    ) -> None:
        self._registry = registry
        self._only = only
        self._version = policy_version
        self._config = config
        self._call = call
        self._work = work
        self._on_waiting = on_waiting
        self._queue: deque[str] = deque()
        self._failures: Counter[str] = Counter()
        self._calls: dict[asyncio.Task[None], Worker] = {}
        self._wake = asyncio.Event()
        self._waiting = False
        # Seconds since the last end of a sequence in which no worker had a call.
        self._idle_s = 0.0

    async def run(self, keys: Iterable[str]) -> None:
        """Runs until every sequence has ended.

        Raises PeerLostError when no worker takes work for `worker_wait_s`, InternalError when one sequence fails
        `attempts` times, and what peers other than workers raise.
        """
        self._queue.extend(keys)
        WAITING.set_function(lambda: len(self._queue))
        try:
            async with asyncio.TaskGroup() as tasks:
                with self._registry.watch(self._wake.set):
                    while self._queue or self._calls:
                        self._wake.clear()
                        self._cancel_calls_of_lost_workers()
                        self._start_calls(tasks)
                        await self._pause()
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        finally:
            self._set_waiting(False)
            self._queue.clear()

    def go_on(self, policy_version: int, keys: Iterable[str]) -> None:
        """Gives what follows, `keys` too, to every worker with a policy version; calls under way go on."""
        self._version, self._only = policy_version, None
        self._queue.extend(keys)
        self._wake.set()

    async def drain(self) -> None:
        """Starts no more calls, until `go_on`, and waits for the ends of those under way."""
        self._only = lambda worker: False
        if self._calls:
            await asyncio.wait(list(self._calls))

    def _start_calls(self, tasks: asyncio.TaskGroup) -> None:
        while self._queue:
            workers = [w for w in self._registry.with_version(self._version) if self._is_served(w)]
            rooms = {worker: room for worker in workers if (room := self._room(worker, len(workers)))}
            if not rooms:
                return
            keys = [self._queue.popleft() for _ in range(min(len(self._queue), sum(rooms.values())))]
            for worker, dealt in deal({key: self._work(key) for key in keys}, rooms).items():
                items, size = list(dealt.items()), self._call_size(worker)
                for begin in range(0, len(items), size):
                    self._start_call(tasks, worker, dict(items[begin : begin + size]))

    def _start_call(self, tasks: asyncio.TaskGroup, worker: Worker, batch: dict[str, float]) -> None:
        worker.outstanding += len(batch)
        worker.work += sum(batch.values())
        task = tasks.create_task(self._run_call(worker, batch))
        self._calls[task] = worker
        task.add_done_callback(self._forget)

    def _is_served(self, worker: Worker) -> bool:
        return self._only is None or self._only(worker)

    def _call_size(self, worker: Worker) -> int:
        """Returns the sequences of one call at most."""
        share = math.ceil(self._limit(worker) / self._config.calls_per_worker)
        return min(share, self._config.max_batch)

    def _limit(self, worker: Worker) -> int:
        return math.ceil(worker.capacity * self._config.overcommit)

    def _room(self, worker: Worker, workers: int) -> int:
        """Returns the sequences of the calls that fit, each as large as calls are, or an even part of the queue."""
        size = min(self._call_size(worker), math.ceil(len(self._queue) / workers))
        return max(0, self._limit(worker) - worker.outstanding) // size * size

    async def _run_call(self, worker: Worker, batch: dict[str, float]) -> None:
        remaining, version = dict(batch), self._version
        try:
            with detached_span("dispatch", worker=worker.worker_id, sequences=len(batch)):
                async with aclosing(self._call(worker, list(batch))) as stream:
                    async for progress in stream:
                        self._apply(worker, remaining, progress)
            if remaining:
                self._registry.suspect(worker, f"its call ended without {len(remaining)} of {len(batch)} sequences")
        except PeerError as wrapped:
            raise wrapped.error from wrapped
        except FATAL:
            raise
        except PerigeeError as error:
            if isinstance(error, FailedPreconditionError) and not (
                worker.has_version(version) and self._is_served(worker)
            ):
                return  # other weights overtook the call
            FAILURES.labels("worker_call").inc()
            if isinstance(error, FailedPreconditionError):
                # It restarted, or has other weights: no work until the weights are pushed again.
                worker.pushed_version = None
            self._registry.suspect(worker, error.message)
        finally:
            self._queue.extendleft(reversed(remaining))
            for key in list(remaining):
                self._take_back(worker, remaining, key)

    def _apply(self, worker: Worker, remaining: dict[str, float], progress: Progress) -> None:
        for key in progress.ended:
            if key in remaining:
                self._take_back(worker, remaining, key)
        for key, reason in progress.failed:
            if key not in remaining:
                continue
            self._take_back(worker, remaining, key)
            self._queue.append(key)
            self._failures[key] += 1
            FAILURES.labels("segment").inc()
            if self._failures[key] >= self._config.attempts:
                raise PeerError(InternalError(f"Sequence {key} failed {self._failures[key]} times, last: {reason}"))
        for reason, count in Counter(reason for _, reason in progress.failed).items():
            log.warning("sequences failed", sequences=count, worker=worker.worker_id, reason=reason)
        if progress.ended:
            self._idle_s = 0.0
        self._wake.set()

    def _take_back(self, worker: Worker, remaining: dict[str, float], key: str) -> None:
        worker.work -= remaining.pop(key)
        worker.outstanding -= 1
        if not worker.outstanding:
            worker.work = 0.0  # no rest of rounding stays

    def _cancel_calls_of_lost_workers(self) -> None:
        for task, worker in self._calls.items():
            if not self._registry.is_live(worker):
                task.cancel()

    async def _pause(self) -> None:
        """Waits for a change; raises PeerLostError after too much time without a call or an end."""
        if self._wake.is_set() or not (self._queue or self._calls):
            return
        if self._calls or self._only is not None:
            self._set_waiting(False)
            await self._wake.wait()
            return
        self._set_waiting(True)
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._config.worker_wait_s - self._idle_s):
                await self._wake.wait()
        except TimeoutError:
            raise PeerLostError(self._explain_wait()) from None
        finally:
            self._idle_s += time.monotonic() - started

    def _explain_wait(self) -> str:
        workers = self._registry.all()
        waited = f"for {self._config.worker_wait_s:g} s"
        if not workers:
            return f"No rollout worker has been registered {waited}: start one, or look at its log."
        reasons = "; ".join(f"{w.worker_id}: {w.suspect or ('ready' if w.ready else 'not ready')}" for w in workers)
        return f"No rollout worker could take work {waited} ({reasons}): look at its log."

    def _set_waiting(self, waiting: bool) -> None:
        if waiting != self._waiting:
            self._waiting = waiting
            self._on_waiting(waiting)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._calls.pop(task, None)
        self._wake.set()
