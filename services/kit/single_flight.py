"""Single-flight cache: the work of a key runs once for all who ask, and its result is kept for those who ask later."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from perigee.errors import InvalidArgumentError, UnavailableError

K = TypeVar("K", bound=Hashable)
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


class SingleFlightCache(Generic[K, T]):
    """Results by key: work of a key that is running is joined, work that has ended is not run again.

    At most `entries` results, `total_bytes` of them by `size_of`, are kept for `ttl_s`; the least recently used go
    first. What raises is not kept, nor a result that `is_final` refuses: a failure that says nothing of the request.
    """

    def __init__(
        self,
        entries: int,
        *,
        total_bytes: float = float("inf"),
        ttl_s: float = float("inf"),
        size_of: Callable[[T], int] = lambda result: 0,
        is_final: Callable[[T], bool] = lambda result: True,
        key_field: str = "key",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._entries = entries
        self._total_bytes = total_bytes
        self._ttl_s = ttl_s
        self._size_of = size_of
        self._is_final = is_final
        self._key_field = key_field
        self._clock = clock
        self._kept: OrderedDict[K, _Kept[T]] = OrderedDict()  # by last use
        self._expiry: OrderedDict[K, float] = OrderedDict()  # by age
        self._kept_bytes = 0
        self._running: dict[K, _Running[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()

    @property
    def kept(self) -> int:
        """Number of results that are kept."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Size of the results that are kept."""
        return self._kept_bytes

    async def get(self, key: K, work: Callable[[], Awaitable[T]], request: bytes = b"") -> tuple[T, bool]:
        """Returns the key's result, and whether another caller's work gave it.

        Work is cancelled when all who wait for it have gone away, and has ended when the last of them returns. Raises
        InvalidArgumentError, naming `key_field`, when the key came with other `request` bytes before, and
        UnavailableError when the cache was closed.
        """
        digest = hashlib.sha256(request).digest()  # a request may be large, and is remembered as long as its result
        self._forget_expired()
        if (kept := self._kept.get(key)) is not None:
            self._check_same(kept.digest, digest)
            self._kept.move_to_end(key)
            return kept.result, True
        running = self._running.get(key)
        is_shared = running is not None
        if running is None:
            running = self._start(key, digest, work)
        self._check_same(running.digest, digest)
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
            raise UnavailableError("the service is stopping")
        return running.task.result(), is_shared

    async def close(self) -> None:
        """Ends all work that is running."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, key: K, digest: bytes, work: Callable[[], Awaitable[T]]) -> _Running[T]:
        """Starts the work of a key and keeps its result when it ends."""
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

    def _keep(self, key: K, digest: bytes, result: T) -> None:
        """Keeps a final result, and drops the least recently used ones above the limits."""
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

    def _forget(self, key: K) -> None:
        self._kept_bytes -= self._kept.pop(key).size
        del self._expiry[key]

    def _check_same(self, known: bytes, digest: bytes) -> None:
        if known != digest:
            raise InvalidArgumentError.for_field(self._key_field, "was used for another request")


async def _await(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
