"""Failure of the sandbox, and work that must not be left half done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from perigee.errors import FailedPreconditionError, UnavailableError

T = TypeVar("T")


class SandboxFailedError(UnavailableError):
    """Failure of the sandbox and not of the program: the job may be tried again."""


class UnjudgeableError(FailedPreconditionError):
    """Fault of a problem's own tests, checker or interactor: trying again does not help."""


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
