"""Results by the caller's key: a request that is sent again gives the first one's result and is not run again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from perigee.errors import InvalidArgumentError, UnavailableError

T = TypeVar("T")


@dataclass(frozen=True)
class _Kept(Generic[T]):
    digest: bytes
    result: T
    size: int


@dataclass(eq=False)
class _Running(Generic[T]):
    digest: bytes
    task: asyncio.Task[T]
    callers: int = 0


class Once(Generic[T]):
    """Runs the work of a key once for all who ask, at the same time or within `ttl_s` of its end.

    At most `entries` results and `total_bytes` of them are kept, least recently used first to go. What raises is not
    kept, nor what `is_final` refuses (a failure that says nothing of the request), nor what is larger than
    `total_bytes` alone.
    """

    def __init__(
        self,
        *,
        entries: int,
        total_bytes: int,
        ttl_s: float,
        size_of: Callable[[T], int],
        is_final: Callable[[T], bool] = lambda result: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries = entries
        self._total_bytes = total_bytes
        self._ttl_s = ttl_s
        self._size_of = size_of
        self._is_final = is_final
        self._clock = clock
        self._kept: OrderedDict[str, _Kept[T]] = OrderedDict()  # by last use
        self._expiry: OrderedDict[str, float] = OrderedDict()  # by age
        self._kept_bytes = 0
        self._running: dict[str, _Running[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()

    @property
    def kept(self) -> int:
        """Results that are kept."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Their size."""
        return self._kept_bytes

    async def get(self, key: str, request: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """The key's result; `work` is run when there is none and nobody runs it.

        The same key with another request raises InvalidArgumentError. An empty key asks for nothing of this: the work
        is run. Work ends early only when all who wait for it have gone, and has ended when
        the last of them is told so.
        """
        if not key:
            return await work()
        digest = hashlib.sha256(request).digest()  # a request may be large, and is remembered as long as its result
        self._forget_expired()
        if (kept := self._kept.get(key)) is not None:
            _check_same(kept.digest, digest)
            self._kept.move_to_end(key)
            return kept.result
        running = self._running.get(key)
        if running is None:
            running = self._start(key, digest, work)
        _check_same(running.digest, digest)
        running.callers += 1
        try:
            await asyncio.wait({running.task})
        finally:
            running.callers -= 1
            if running.callers == 0 and not running.task.done():
                del self._running[key]
                running.task.cancel()
                await asyncio.wait({running.task})
        if running.task.cancelled():
            raise UnavailableError("the sandbox is stopping")
        return running.task.result()

    async def close(self) -> None:
        """Ends all work that is running."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, key: str, digest: bytes, work: Callable[[], Awaitable[T]]) -> _Running[T]:
        running = self._running[key] = _Running(digest, asyncio.create_task(_await(work)))
        self._tasks.add(running.task)

        def end(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            if self._running.get(key) is running:
                del self._running[key]
                if not task.cancelled() and task.exception() is None:
                    self._keep(key, digest, task.result())

        running.task.add_done_callback(end)
        return running

    def _keep(self, key: str, digest: bytes, result: T) -> None:
        size = self._size_of(result)
        if size > self._total_bytes or not self._is_final(result):
            return
        self._kept[key] = _Kept(digest, result, size)
        self._expiry[key] = self._clock() + self._ttl_s
        self._kept_bytes += size
        while len(self._kept) > self._entries or self._kept_bytes > self._total_bytes:
            self._forget(next(iter(self._kept)))

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._expiry:
            key, expires = next(iter(self._expiry.items()))
            if expires > now:
                return
            self._forget(key)

    def _forget(self, key: str) -> None:
        self._kept_bytes -= self._kept.pop(key).size
        del self._expiry[key]


def _check_same(known: bytes, digest: bytes) -> None:
    if known != digest:
        raise InvalidArgumentError.of("idempotency_key", "was used for another request")


async def _await(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
