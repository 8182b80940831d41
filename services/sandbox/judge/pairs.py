"""Two boxes that talk over pipes: a submission and whoever judges it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.sandbox.runtime.helper_process import finish
from services.sandbox.runtime.sandboxes import Box

_LAST_WORD_S = 2.0
"""How long one side may go on when the other has ended."""

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
    """Two pipes, closed at the end of the block."""
    first, second = os.pipe(), os.pipe()
    try:
        yield Pipes(*first, *second)
    finally:
        for descriptor in (*first, *second):
            os.close(descriptor)


class Pair(Generic[T]):
    """A submission's run and its judge's, begun by their coroutines' first steps."""

    def __init__(self, program: Box, saying: Awaitable[T], judge: Box, judging: Awaitable[T]) -> None:
        self._boxes = (program, judge)
        self._tasks = (asyncio.ensure_future(saying), asyncio.ensure_future(judging))

    async def begin(self) -> None:
        """Returns when both have sent their orders, and with them the pipes; the caller's ends are to be closed then,
        so that each side sees when the other is gone.
        """
        try:
            await asyncio.sleep(0)
        except BaseException:
            await self._end()
            raise

    async def finish(self) -> tuple[T, T, bool]:
        """What became of both, and whether the submission ended first; the slower side is stopped if it does not end
        soon after.
        """
        saying, judging = self._tasks
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            program_first = not judging.done()
            slower = 1 if program_first else 0
            await asyncio.wait([self._tasks[slower]], timeout=_LAST_WORD_S)
            if not self._tasks[slower].done():
                self._boxes[slower].stop()
            await asyncio.gather(saying, judging)
        finally:
            await self._end()
        return saying.result(), judging.result(), program_first

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await finish(_gather(self._tasks))


async def _gather(tasks: tuple[asyncio.Future[T], ...]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
