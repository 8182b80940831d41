"""One service of the local stack as a process tree below a guard: start, end, and the error that it died of."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# A service that got SIGTERM has this long before SIGKILL.
GRACE_S = 40.0
# The guard itself is waited for this much longer before its whole group is killed.
GUARD_MARGIN_S = 6.0
LOG_TAIL_BYTES = 64 << 10

_GUARD = str(Path(__file__).with_name("guard.py"))
# The last line of a traceback, a line of the logging module, and the one line that a service prints when it gives up.
_ERROR_LINE = re.compile(
    r"^(?:(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*|(?:ERROR|CRITICAL)\b.*|"
    r"(?:coordinator|buffer|rollout|trainer|reward|sandbox): .*)"
)


@dataclass(frozen=True)
class Command:
    """A program of the local stack: what to run, and the file that takes its output."""

    name: str
    arguments: Sequence[str]
    log_path: Path


class GuardedProcess:
    """A started command. Its whole process tree ends with it, and with this process, however either ends."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process, log_start: int) -> None:
        self.command = command
        self._process = process
        self._log_start = log_start

    @classmethod
    async def start(cls, command: Command) -> GuardedProcess:
        """Starts the command in a session of its own, below a guard.

        To be called in the main thread: the kernel ties the guard to the life of the thread that starts it.
        """
        command.log_path.parent.mkdir(parents=True, exist_ok=True)
        log_start = command.log_path.stat().st_size if command.log_path.exists() else 0
        guard = [sys.executable, "-I", "-S", _GUARD, str(os.getpid()), str(GRACE_S), str(command.log_path)]
        process = await asyncio.create_subprocess_exec(
            *guard, *command.arguments, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        return cls(command, process, log_start)

    @property
    def pid(self) -> int:
        """Process id of the guard, which leads the session."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The guard's exit code as the operating system tells it; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Waits until the command and all that it started have ended; returns its exit code."""
        code = await self._process.wait()
        if code < 0:  # the guard itself was killed: its group may have outlived it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            return 128 - code
        return code

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left after GRACE_S; returns when the tree has ended."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), GRACE_S + GUARD_MARGIN_S)
        except TimeoutError:
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """SIGKILL at once to the guard's process group."""
        if self.exit_code is None:
            os.killpg(self.pid, signal.SIGKILL)

    def describe_end(self, exit_code: int) -> str:
        """One sentence: which command ended, how, the error that it logged since its start, and where the log is."""
        log_path = self.command.log_path
        lines = read_tail(log_path, self._log_start)
        if exit_code > 128:  # what it wrote last need not have to do with its end
            how, error = f"was ended by {signal.Signals(exit_code - 128).name}", last_error(lines)
        else:
            how, error = f"ended with exit code {exit_code}", last_error(lines) or last_words(lines)
        return f"{self.command.name} {how}{f': {error}' if error else ''} (log: {log_path})"

    def _signal(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            self._process.send_signal(number)


def read_tail(path: Path, start: int = 0) -> list[str]:
    """The last lines of a log from byte `start` on, LOG_TAIL_BYTES at most; none when there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def last_error(lines: Iterable[str]) -> str:
    """The last line of a log that names an error, 300 characters at most; nothing when none does."""
    return next((found[:300] for line in reversed([*lines]) if (found := _error_in(line.strip()))), "")


def last_words(lines: Iterable[str]) -> str:
    """The last line of a log that is no record, 300 characters at most: a program may tell its end in its own way."""
    return next((line.strip()[:300] for line in reversed([*lines]) if line.strip() and not line.startswith("{")), "")


def _error_in(line: str) -> str:
    if not line.startswith("{"):
        return line if _ERROR_LINE.match(line) else ""
    try:
        record = json.loads(line)
    except ValueError:
        return ""
    if not isinstance(record, dict) or record.get("level") not in ("error", "critical"):
        return ""
    exception = str(record.get("exception") or "").strip()
    parts = [str(record.get("event", "")), str(record.get("error") or exception.rpartition("\n")[2])]
    return ": ".join(part for part in parts if part)
