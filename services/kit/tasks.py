"""Tasks: work that must not be left half done, and work beside a service."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs work to its end, also when the caller is cancelled meanwhile, and returns its result.

    For work that gives something back: a slot that is only half cleared would be lost, or leak into another job.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first one is raised below
                await asyncio.wait({task})
        task.result()  # its own error comes first
        raise


@contextlib.contextmanager
def keeping_cancellation() -> Iterator[None]:
    """Ends the block with a cancellation that came within it and that what it awaits has lost.

    For libraries that call asyncio.wait_for: that of Python 3.11 returns the result when it is there already.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


def start_tasks(*work: Coroutine[Any, Any, None]) -> list[asyncio.Task[None]]:
    """Starts work that a service needs for as long as it serves.

    Work that fails ends the process as SIGTERM does, with the error that `end_tasks` raises then.
    """
    tasks = [asyncio.create_task(each) for each in work]
    for task in tasks:
        task.add_done_callback(_end_process_of_failed)
    return tasks


def _end_process_of_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        signal.raise_signal(signal.SIGTERM)
