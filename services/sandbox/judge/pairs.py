"""Runs two sandboxes that talk over pipes: a submission and the program that judges it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.kit.tasks import finish
from services.sandbox.runtime.sandboxes import Sandbox

_PATIENCE_S = 2.0
"""Time for which one side may continue after the other has ended."""

T = TypeVar("T")


@dataclass(frozen=True)
class Pipes:
    """Descriptors of the two pipes; each side reads what the other writes."""

    to_program: int
    from_judge: int
    to_judge: int
    from_program: int


@contextmanager
def pipes() -> Iterator[Pipes]:
    """Yields two pipes, closed at the end of the block."""
    first, second = os.pipe(), os.pipe()
    try:
        yield Pipes(*first, *second)
    finally:
        for descriptor in (*first, *second):
            os.close(descriptor)


class PairedRun(Generic[T]):
    """Runs of a submission and of its judge, side by side."""

    def __init__(self, program: Sandbox, program_run: Awaitable[T], judge: Sandbox, judge_run: Awaitable[T]) -> None:
        self._sandboxes = (program, judge)
        self._tasks = (asyncio.ensure_future(program_run), asyncio.ensure_future(judge_run))

    async def begin(self) -> None:
        """Returns when both have sent their requests, and the pipes with them.

        The caller then closes its copies of the pipes, so that each side sees when the other is gone.
        """
        try:
            await asyncio.sleep(0)
        except BaseException:
            await self._end()
            raise

    async def finish(self) -> tuple[T, T, bool]:
        """Returns both results, and whether the submission ended first; the slower side is stopped 2 s later."""
        program_run, judge_run = self._tasks
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            program_first = not judge_run.done()
            slower = 1 if program_first else 0
            await asyncio.wait([self._tasks[slower]], timeout=_PATIENCE_S)
            if not self._tasks[slower].done():
                self._sandboxes[slower].stop()
            await asyncio.gather(program_run, judge_run)
        finally:
            await self._end()
        return program_run.result(), judge_run.result(), program_first

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await finish(_gather(self._tasks))


async def _gather(tasks: tuple[asyncio.Future[T], ...]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
