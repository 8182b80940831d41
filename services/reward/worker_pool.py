"""Worker processes that answer one JSON line with one JSON line, and are killed when they do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

from perigee.errors import UnavailableError
from services.kit.telemetry import get_logger

log = get_logger(__name__)


class WorkerDiedError(UnavailableError):
    """The worker went away or fell silent during a request; asking again starts another."""


class _Slot:
    """A place for one worker; the process is started when it is needed and is not there."""

    def __init__(self, command: Sequence[str], start_timeout_s: float) -> None:
        self._command = command
        self._start_timeout_s = start_timeout_s
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        if self.process is not None and self.process.returncode is None:
            return
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            await self._read_reply(self._start_timeout_s)  # the line that says that it is ready
        except BaseException:
            await self.end()
            raise

    async def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        await self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            # Reading begins at once: a worker that died cannot hold the writer up.
            return await self._read_reply(timeout_s)
        except BaseException:
            await self.end()
            raise

    async def end(self) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _read_reply(self, timeout_s: float) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        except TimeoutError as error:
            raise WorkerDiedError(f"the worker process did not answer within {timeout_s:g} s") from error
        if not line:
            raise WorkerDiedError("the worker process died")
        reply: dict[str, Any] = json.loads(line)
        return reply


class WorkerPool:
    """A fixed number of workers; requests wait their turn."""

    def __init__(self, command: Sequence[str], workers: int, start_timeout_s: float) -> None:
        self._slots = [_Slot(command, start_timeout_s) for _ in range(workers)]
        self._idle: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()

    async def start(self) -> None:
        """Starts all workers; UnavailableError when one does not get ready."""
        await asyncio.gather(*(slot.start() for slot in self._slots))
        for slot in self._slots:
            self._idle.put_nowait(slot)

    async def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The reply to a request, which gets `timeout_s` from the moment when its worker takes it.

        A worker that fails to answer, or whose caller goes away, is killed; the next request starts another.

        Raises WorkerDiedError.
        """
        slot = await self._idle.get()
        try:
            return await slot.ask(request, timeout_s)
        except WorkerDiedError as error:
            log.warning("worker process replaced", reason=error.message)
            raise
        finally:
            self._idle.put_nowait(slot)

    async def close(self) -> None:
        """Ends all workers."""
        await asyncio.gather(*(slot.end() for slot in self._slots))

    @property
    def is_busy(self) -> bool:
        """Whether all workers have a request."""
        return self._idle.empty()

    @property
    def pids(self) -> list[int]:
        """The processes that are there."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]
