"""Runs many producers at once and hands out what they emit, in batches, through one bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
Emit = Callable[[T], Awaitable[None]]
QUEUE_ITEMS = 1024


async def merge(producers: Iterable[Callable[[Emit[T]], Awaitable[None]]]) -> AsyncGenerator[list[T], None]:
    """Everything that is ready, each time something is; ends when all producers have.

    The first producer that raises cancels the others, and its error is raised here. Closing the iterator cancels all
    producers and waits for them. `producers` is read lazily on a task of its own, so it may start as it goes.
    """
    queue: asyncio.Queue[T | _End] = asyncio.Queue(QUEUE_ITEMS)

    async def run_all() -> None:
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for producer in producers:
                    group.create_task(_call(producer, queue.put))
        except BaseExceptionGroup as failed:
            error = failed
            # A producer may have a group of its own.
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
        await queue.put(_End(error))

    runner = asyncio.create_task(run_all())
    try:
        while True:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            if ready := [item for item in items if not isinstance(item, _End)]:
                yield ready
            if isinstance(end := items[-1], _End):
                if end.error is not None:
                    raise end.error
                return
    finally:
        runner.cancel()
        await asyncio.wait([runner])


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


async def _call(producer: Callable[[Emit[T]], Awaitable[None]], emit: Emit[T]) -> None:
    await producer(emit)
