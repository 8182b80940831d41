"""Worker processes that answer JSON lines with JSON lines, several at a time, and are killed when they fall silent.

Checks that may hang are done by them: whatever a check does, its reply comes, and a failure is a reply of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perigee.errors import UnavailableError
from services.kit.process import ChildProcess
from services.kit.telemetry import get_logger
from services.reward.config import ChecksConfig
from services.reward.pool.check_worker import WALL_FACTOR
from services.reward.verifiers.base import Outcome

log = get_logger(__name__)

# Requests on their way to one worker: enough that it never waits for the next, few enough to keep the order fair.
WINDOW = 8
CHECK_ATTEMPTS = 2
# Over the check's own deadline, at which the worker kills it by itself: this is for a worker that is stopped.
GRACE_S = 5.0


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
        self.process: ChildProcess | None = None
        self.load = 0

    async def start(self) -> ChildProcess:
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

    async def _launch(self) -> ChildProcess:
        process = await ChildProcess.start(
            "the worker process", self._command, with_pipes=True, environment={"OMP_NUM_THREADS": "1"}
        )
        try:
            await process.read_ready_line(self._start_timeout_s)
        except UnavailableError as error:
            raise WorkerDiedError(error.message) from error
        return process

    async def _read(self, process: ChildProcess) -> None:
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
        process.kill()
        pending = [future for future in self._pending.values() if not future.done()]
        if pending:
            log.warning("worker process replaced", reason=fault, requests=len(pending))
        for future in pending:
            future.set_exception(WorkerDiedError(fault))


class WorkerPool:
    """A fixed number of workers; requests that find them all busy wait.

    A worker that has requests and answers none of them for `silence_s` is killed.
    """

    def __init__(self, command: Sequence[str], workers: int, start_timeout_s: float, silence_s: float) -> None:
        self._workers = [Worker(command, start_timeout_s, silence_s) for _ in range(workers)]
        self._slots = asyncio.Semaphore(workers * WINDOW)

    async def start(self) -> None:
        """Starts all workers; UnavailableError when one does not get ready."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply to a message, from the worker that has the fewest on its way.

        A caller that goes away takes its request back. Raises WorkerDiedError.
        """
        async with self._slots:
            return await min(self._workers, key=lambda worker: worker.load).ask(message)

    async def close(self) -> None:
        """Ends all workers."""
        await asyncio.gather(*(worker.end() for worker in self._workers))


@dataclass(frozen=True)
class Reply:
    """Result of a check; "deadline", "memory", "died" and "error" are failures."""

    status: str
    reason: str = ""

    def failure(self, extracted: str) -> Outcome:
        """Returns the outcome of a check that failed; one whose process died twice may be asked again."""
        return Outcome.failed(self.reason, retryable=self.status == "died", extracted=extracted)


class CheckPool(WorkerPool):
    """Worker processes for one kind of checks: see `pool.check_worker`."""

    def __init__(self, kind: str, config: ChecksConfig) -> None:
        command = (
            *(sys.executable, "-m", "services.reward.pool.check_worker", kind),
            *("--memory-bytes", str(config.memory_bytes)),
            *("--slow-s", str(config.slow_check_s)),
            *("--slow-checks", str(config.slow_checks)),
        )
        self._deadline_s = config.check_timeout_s
        silence_s = WALL_FACTOR * config.check_timeout_s + GRACE_S
        super().__init__(command, config.workers, config.start_timeout_s, silence_s)

    async def check(self, request: dict[str, Any]) -> Reply:
        """Returns the reply to a check; one whose process died is tried once more."""
        message = {"deadline_s": self._deadline_s, "check": request}
        reason = ""
        for _ in range(CHECK_ATTEMPTS):
            try:
                reply = await self.ask(message)
            except WorkerDiedError as error:
                reply = {"status": "died", "reason": error.message}
            if reply["status"] != "died":
                return Reply(reply["status"], reply["reason"])
            reason = reply["reason"]
        return Reply("died", f"{reason} {CHECK_ATTEMPTS} times")
