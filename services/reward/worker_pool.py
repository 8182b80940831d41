"""Worker processes that answer JSON lines with JSON lines, several at a time, and are killed when they fall silent."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from perigee.errors import UnavailableError
from services.kit.telemetry import get_logger

log = get_logger(__name__)

# Requests on their way to one worker: enough that it never waits for the next, few enough to keep the order fair.
WINDOW = 8


class WorkerDiedError(UnavailableError):
    """The worker went away or fell silent during a request; asking again starts another."""


class Worker:
    """One worker; its process is started when it is needed and is not there.

    It says that it is ready with a line of its own, then answers {"id", ...} with {"id", ...} in any order; {"cancel":
    id} tells it that nobody waits for that request.
    """

    def __init__(self, command: Sequence[str], start_timeout_s: float, silence_s: float) -> None:
        self._command = command
        self._start_timeout_s = start_timeout_s
        self._silence_s = silence_s
        self._ids = itertools.count()
        self._starting = asyncio.Lock()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._reader: asyncio.Task[None] | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.load = 0

    async def start(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self.process is None:
                self.process = await self._launch()
                self._reader = asyncio.create_task(self._read(self.process))
            return self.process

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.load += 1
        request_id = next(self._ids)
        try:
            process = await self.start()
            assert process.stdin is not None
            future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self._pending[request_id] = future
            process.stdin.write(json.dumps(message | {"id": request_id}).encode() + b"\n")
            self._listen()
            try:
                return await future
            except asyncio.CancelledError:
                if self.process is process and request_id in self._pending:
                    process.stdin.write(json.dumps({"cancel": request_id}).encode() + b"\n")
                raise
        finally:
            self._pending.pop(request_id, None)
            self.load -= 1

    async def end(self) -> None:
        reader = self._reader
        self._kill("the service is stopping")
        if reader is not None:
            await reader

    async def _launch(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        try:
            # The line that says that it is ready.
            if not await asyncio.wait_for(process.stdout.readline(), self._start_timeout_s):
                raise WorkerDiedError("the worker process died at its start")
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise WorkerDiedError(f"no worker process within {self._start_timeout_s:g} s") from error
            raise
        return process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self._heard = time.monotonic()
            reply = json.loads(line)
            future = self._pending.get(reply["id"])
            if future is not None and not future.done():
                future.set_result(reply)
        if self.process is process:
            self._kill("the worker process died")
        await process.wait()

    def _listen(self) -> None:
        """A worker that has requests must answer one of them within `silence_s`; while it has none it may be silent."""
        if len(self._pending) == 1:
            self._heard = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(self._silence_s, self._check_silence)

    def _check_silence(self) -> None:
        self._watch = None
        if not self._pending:
            return
        left_s = self._heard + self._silence_s - time.monotonic()
        if left_s <= 0:
            self._kill(f"the worker process did not answer within {self._silence_s:g} s")
        else:
            self._watch = asyncio.get_running_loop().call_later(left_s, self._check_silence)

    def _kill(self, fault: str) -> None:
        """Ends the process, and with it the requests that it has not answered; the next request starts another."""
        process, self.process = self.process, None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        pending = [future for future in self._pending.values() if not future.done()]
        if pending:
            log.warning("worker process replaced", reason=fault, requests=len(pending))
        for future in pending:
            future.set_exception(WorkerDiedError(fault))


class WorkerPool:
    """A fixed number of workers; requests that find them all busy wait their turn.

    A worker that has requests and answers none of them for `silence_s` is killed.
    """

    def __init__(self, command: Sequence[str], workers: int, start_timeout_s: float, silence_s: float) -> None:
        self._workers = [Worker(command, start_timeout_s, silence_s) for _ in range(workers)]
        self._places = asyncio.Semaphore(workers * WINDOW)

    async def start(self) -> None:
        """Starts all workers; UnavailableError when one does not get ready."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a message, from the worker that has the fewest on its way.

        A caller that goes away takes its request back. Raises WorkerDiedError.
        """
        async with self._places:
            return await min(self._workers, key=lambda worker: worker.load).ask(message)

    async def close(self) -> None:
        """Ends all workers."""
        await asyncio.gather(*(worker.end() for worker in self._workers))
