"""Bounded queue of jobs in front of a number of equal slots."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from perigee.errors import PerigeeError, ResourceExhaustedError, UnavailableError

T = TypeVar("T")

_SMOOTHING = 0.1
_SHORTEST_RETRY_S = 0.1


@dataclass(eq=False)
class _Waiter(Generic[T]):
    """Waiting job; the queue is ordered by `due`, the arrival put off by the job's cost."""

    due: float
    slot: asyncio.Future[T]


class JobQueue(Generic[T]):
    """Leases slots, one to each job, by arrival time plus the job's cost, at most `priority_window_s` of it.

    Small jobs thus go before large ones, but only if they come within `priority_window_s` of a large one's arrival: no
    job starves. At most `max_waiting` jobs wait, none for longer than `max_wait_s` or its caller's time; a job that
    would wait longer is refused with ResourceExhaustedError and an estimate of when to try again.
    """

    def __init__(
        self,
        *,
        max_waiting: int,
        max_wait_s: float,
        priority_window_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._priority_window_s = priority_window_s
        self._clock = clock
        self._free: deque[T] = deque()
        self._started: dict[int, float] = {}
        self._waiting: list[_Waiter[T]] = []
        self._service_s: float | None = None
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Number of slots that are leased."""
        return len(self._started)

    @property
    def free(self) -> int:
        """Number of slots that are free."""
        return len(self._free)

    def add(self, slot: T) -> None:
        """Adds a slot."""
        assert id(slot) not in self._started, "the slot is leased"
        self._offer(slot)

    @asynccontextmanager
    async def lease(self, cost_s: float, remaining_s: float | None = None) -> AsyncIterator[T]:
        """Leases a slot for the time of the block; arguments and errors as for `acquire`."""
        slot = await self.acquire(cost_s, remaining_s)
        try:
            yield slot
        finally:
            self.release(slot)

    async def acquire(self, cost_s: float, remaining_s: float | None = None) -> T:
        """Leases a slot, which the caller releases.

        `cost_s` is what the job may take, `remaining_s` how long its caller still waits, None without a limit. Raises
        ResourceExhaustedError at once when the queue is full or the wait is estimated to be too long, later when it
        was; UnavailableError when the queue is closed.
        """
        if self._is_closed:
            raise UnavailableError("the sandbox is stopping")
        if self._free:
            return self._lease(self._free.popleft())
        loop = asyncio.get_running_loop()
        waiter: _Waiter[T] = _Waiter(self._due(cost_s), loop.create_future())
        self._refuse_hopeless(waiter.due, remaining_s)
        insort(self._waiting, waiter, key=_due)
        patience_s = self._max_wait_s if remaining_s is None else min(remaining_s, self._max_wait_s)
        timer = loop.call_later(patience_s, self._give_up, waiter, patience_s)
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        finally:
            timer.cancel()

    def release(self, slot: T) -> None:
        """Ends a lease."""
        seconds = self._clock() - self._started.pop(id(slot))
        known = seconds if self._service_s is None else self._service_s
        self._service_s = known + _SMOOTHING * (seconds - known)
        self._offer(slot)

    def estimate_wait_s(self, cost_s: float) -> float:
        """Estimates the wait of a job that comes now: the mean lease for each job before it, over the number of slots.

        0 while no lease has ended yet.
        """
        return 0.0 if self._free else self._estimate_s(self._due(cost_s))

    def close(self) -> None:
        """Refuses waiting and further jobs; leased slots can still be released."""
        self._is_closed = True
        for waiter in self._waiting:
            _refuse(waiter, UnavailableError("the sandbox is stopping"))
        self._waiting.clear()

    def _due(self, cost_s: float) -> float:
        return self._clock() + min(cost_s, self._priority_window_s)

    def _estimate_s(self, due: float) -> float:
        ahead = bisect_right(self._waiting, due, key=_due)
        slots = max(1, len(self._free) + len(self._started))
        return (ahead + 1) * (self._service_s or 0.0) / slots

    def _refuse_hopeless(self, due: float, remaining_s: float | None) -> None:
        wait_s = self._estimate_s(due)
        if len(self._waiting) >= self._max_waiting:
            raise self._exhausted(f"{len(self._waiting)} jobs wait already")
        if remaining_s is not None and wait_s >= remaining_s:
            raise self._exhausted(f"the wait of about {wait_s:.1f} s is longer than the {remaining_s:.1f} s left")

    def _exhausted(self, reason: str) -> ResourceExhaustedError:
        retry_after_s = min(self._estimate_s(float("inf")), self._max_wait_s)
        return ResourceExhaustedError(reason, retry_after_s=max(_SHORTEST_RETRY_S, retry_after_s))

    def _give_up(self, waiter: _Waiter[T], patience_s: float) -> None:
        if not waiter.slot.done():
            self._waiting.remove(waiter)
            _refuse(waiter, self._exhausted(f"no slot was free for {patience_s:.1f} s"))

    def _leave(self, waiter: _Waiter[T]) -> None:
        """Removes a job that was cancelled while it waited, or just after it got a slot."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
        elif not waiter.slot.cancelled() and waiter.slot.exception() is None:
            slot = waiter.slot.result()
            del self._started[id(slot)]
            self._offer(slot)

    def _offer(self, slot: T) -> None:
        while self._waiting:
            waiter = self._waiting.pop(0)
            if not waiter.slot.done():  # else it is being cancelled
                waiter.slot.set_result(self._lease(slot))
                return
        self._free.append(slot)

    def _lease(self, slot: T) -> T:
        self._started[id(slot)] = self._clock()
        return slot


def _due(waiter: _Waiter[T]) -> float:
    return waiter.due


def _refuse(waiter: _Waiter[T], error: PerigeeError) -> None:
    if not waiter.slot.done():
        waiter.slot.set_exception(error)
