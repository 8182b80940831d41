"""Work that must not be left half done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of work that is done to its end; whoever is cancelled meanwhile is told so when it is done.

    For what gives something back: a place that is only half emptied would be lost, or be another job's.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first one is raised below
                await asyncio.wait({task})
        task.result()  # its own failure goes before
        raise
