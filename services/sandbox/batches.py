"""Runs the items of a batch side by side, and tells each one's outcome as soon as it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from perigee.errors import PerigeeError, ResourceExhaustedError

T = TypeVar("T")
_AT_ONCE = 32
_PAUSE_S = 0.5


async def run_batch(
    works: Sequence[Callable[[], Awaitable[T]]],
) -> AsyncGenerator[tuple[int, T | None, PerigeeError | None], None]:
    """Position and either result or error of each item, in the order in which they end; leaving the iteration ends all.

    A batch is work for its whole deadline: an item that is refused for want of a slot is tried again.
    """
    left = asyncio.Semaphore(_AT_ONCE)
    # Unbounded in type only: one entry an item, and items are bounded by the request.
    done: asyncio.Queue[tuple[int, T | None, PerigeeError | None]] = asyncio.Queue()

    async def run(index: int, work: Callable[[], Awaitable[T]]) -> None:
        async with left:
            while True:
                try:
                    done.put_nowait((index, await work(), None))
                except ResourceExhaustedError as error:
                    await asyncio.sleep(max(_PAUSE_S, error.retry_after_s or 0.0))
                    continue
                except PerigeeError as error:
                    done.put_nowait((index, None, error))
                return

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(index, work)) for index, work in enumerate(works)]
        try:
            for _ in works:
                yield await done.get()
        finally:
            for task in tasks:
                task.cancel()
