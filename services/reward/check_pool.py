"""Checks in worker processes: whatever a check does, its reply comes, and a failure is a reply of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from services.reward.config import ChecksConfig
from services.reward.verifiers.base import Outcome
from services.reward.worker_pool import WorkerDiedError, WorkerPool

ATTEMPTS = 2
# Over the check's own deadline, at which the worker kills it by itself: this is for a worker that is stopped.
GRACE_S = 5.0


@dataclass(frozen=True)
class Reply:
    """What a check found; "deadline", "memory", "died" and "error" are failures."""

    status: str
    reason: str = ""

    def failure(self, extracted: str) -> Outcome:
        """The outcome of a check that failed; one whose process died twice may be asked again."""
        return Outcome.failed(self.reason, retryable=self.status == "died", extracted=extracted)


class CheckPool:
    """Worker processes for one kind of checks, see `check_worker`."""

    def __init__(self, kind: str, config: ChecksConfig) -> None:
        command = (
            *(sys.executable, "-m", "services.reward.check_worker", kind),
            *("--memory-bytes", str(config.memory_bytes)),
            *("--slow-s", str(config.slow_check_s)),
            *("--slow-checks", str(config.slow_checks)),
        )
        self._deadline_s = config.check_timeout_s
        self._pool = WorkerPool(command, config.workers, config.start_timeout_s, config.check_timeout_s + GRACE_S)

    async def start(self) -> None:
        """Starts the workers; UnavailableError when one does not get ready."""
        await self._pool.start()

    async def close(self) -> None:
        """Ends the workers."""
        await self._pool.close()

    async def check(self, request: dict[str, Any]) -> Reply:
        """The reply to a check; one whose process died is tried once more."""
        message = {"deadline_s": self._deadline_s, "check": request}
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                reply = await self._pool.ask(message)
            except WorkerDiedError as error:
                reply = {"status": "died", "reason": error.message}
            if reply["status"] != "died":
                return Reply(reply["status"], reply["reason"])
            reason = reply["reason"]
        return Reply("died", f"{reason} {ATTEMPTS} times")
