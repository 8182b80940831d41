"""Gathers what arrives within a few milliseconds, or while a batch is under way, into batches of bounded size."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from perigee.errors import InternalError, PerigeeError, UnavailableError
from services.kit.telemetry import get_logger

log = get_logger(__name__)

ResultT = TypeVar("ResultT")


@dataclass
class _Waiting(Generic[ResultT]):
    tokens: Sequence[int]
    future: asyncio.Future[ResultT]


class MicroBatcher(Generic[ResultT]):
    """Runs one batch at a time, in the order of arrival; `score` gives a result for each sequence of a batch.

    A batch takes at most `max_tokens` tokens, padding included, and at most `max_items` sequences; a longer sequence is
    a batch by itself. A batch that is not full waits `wait_s` for more.
    """

    def __init__(
        self,
        score: Callable[[list[Sequence[int]]], Awaitable[Sequence[ResultT]]],
        max_tokens: int,
        max_items: int,
        wait_s: float,
    ) -> None:
        self._score = score
        self._max_tokens = max_tokens
        self._max_items = max_items
        self._wait_s = wait_s
        # Bounded by the items that the service takes.
        self._waiting: deque[_Waiting[ResultT]] = deque()
        self._arrived = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to run batches."""
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends the batch under way; whoever waits gets UnavailableError."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            self._running = None
        self._fail(list(self._waiting), UnavailableError("the service is stopping"))
        self._waiting.clear()

    async def submit(self, tokens: Sequence[int]) -> ResultT:
        """The result of one sequence; raises what its batch raised."""
        waiting = _Waiting[ResultT](tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.future

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    while not self._is_full():
                        self._arrived.clear()
                        await self._arrived.wait()
            batch = self._take()
            if self._waiting:
                self._arrived.set()
            else:
                self._arrived.clear()
            if batch:
                await self._run_batch(batch)

    async def _run_batch(self, batch: list[_Waiting[ResultT]]) -> None:
        try:
            results = await self._score([waiting.tokens for waiting in batch])
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(result)
        except PerigeeError as error:
            self._fail(batch, error)
        except asyncio.CancelledError:
            self._fail(batch, UnavailableError("the service is stopping"))
            raise
        except Exception as error:  # a fault in one batch must not leave the others waiting for ever
            log.exception("batch failed")
            self._fail(batch, InternalError(f"{type(error).__name__}: {error}"))

    def _is_full(self) -> bool:
        return self._count_fitting() < len(self._waiting) or len(self._waiting) >= self._max_items

    def _take(self) -> list[_Waiting[ResultT]]:
        batch = [self._waiting.popleft() for _ in range(self._count_fitting())]
        return [waiting for waiting in batch if not waiting.future.done()]  # their callers have gone away

    def _count_fitting(self) -> int:
        longest = 0
        for count, waiting in enumerate(self._waiting):
            longest = max(longest, len(waiting.tokens))
            if count == self._max_items or (count and (count + 1) * longest > self._max_tokens):
                return count
        return len(self._waiting)

    @staticmethod
    def _fail(batch: Sequence[_Waiting[ResultT]], error: PerigeeError) -> None:
        for waiting in batch:
            if not waiting.future.done():
                waiting.future.set_exception(error)
