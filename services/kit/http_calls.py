"""The HTTP requests under way: how many there may be, and how they end when the service stops."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from perigee.errors import ResourceExhaustedError, UnavailableError

RETRY_AFTER_S = 1.0


class Calls:
    """Counts the requests under way; `ended` is done when those still there must end. Belongs to the running loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Counts one request.

        Raises ResourceExhaustedError when there are too many, UnavailableError while the service stops.
        """
        if self._draining:
            raise UnavailableError("The service is stopping.", retry_after_s=RETRY_AFTER_S)
        if self._count >= self._limit:
            raise ResourceExhaustedError(
                f"{self._limit} requests are in flight, the server's limit.", retry_after_s=RETRY_AFTER_S
            )
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Lets no request in any more, and returns when the last has ended, by itself or after `seconds`."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            if not self.ended.done():
                self.ended.set_result(None)
            await self._idle.wait()
