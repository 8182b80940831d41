"""Ctrl-C and SIGTERM: the first asks the work to end in order, the next one ends it at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Counts the signals that asked the program to end; the first one cancels `task`."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.number: signal.Signals | None = None
        # Called at every signal after the first.
        self.end_at_once: Callable[[], None] = lambda: None
        self._task = task

    def receive(self, number: signal.Signals) -> None:
        """Takes note of one signal."""
        if self.number is None:
            self.number = number
            self._task.cancel()
        else:
            self.end_at_once()


def run_interruptible(work: Callable[[Interrupt], Coroutine[Any, Any, int]]) -> int:
    """Runs `work` to its end and returns its exit code, or 128 + n when signal n asked it to end."""
    return asyncio.run(_run(work))


async def _run(work: Callable[[Interrupt], Coroutine[Any, Any, int]]) -> int:
    task = asyncio.current_task()
    assert task is not None
    interrupt = Interrupt(task)
    loop = asyncio.get_running_loop()
    for number in NUMBERS:
        loop.add_signal_handler(number, interrupt.receive, number)
    try:
        return await work(interrupt)
    except asyncio.CancelledError:
        if interrupt.number is None:
            raise
        return 128 + interrupt.number
