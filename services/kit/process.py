"""Child processes: started in a session of their own, tied to this process's life, read for their last words, ended.

Linux ties a child to its parent by prctl; elsewhere a child outlives a parent that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from perigee.errors import UnavailableError

LOG_TAIL_BYTES = 64 << 10
# A program that got SIGTERM has this long before SIGKILL.
GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
_MOST_CHARACTERS = 300
# Asks for SIGTERM at the death of the parent and becomes the program: the request survives exec, and a `preexec_fn` is
# unsafe with threads.
_TIE = """
import ctypes, os, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != parent:
        sys.exit("the parent died before the program began")
try:
    os.execvp(program[0], program)
except OSError as error:
    sys.exit(f"OSError: {program[0]} cannot be started: {error}")
"""
# The last line of a traceback, a line of the logging module, and the one line that a service prints when it gives up.
_ERROR_LINE = re.compile(
    r"^(?:(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*|(?:ERROR|CRITICAL)\b.*|"
    r"(?:coordinator|buffer|rollout|trainer|reward|sandbox): .*)"
)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent dies.

    Linux ties it to the thread that started this process. Raises UnavailableError when the parent has died already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise UnavailableError("the parent process is gone")


class ChildProcess:
    """Started program that leads a session of its own.

    Start it in the main thread: the kernel ties a child to the life of the thread that starts it.
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, grace_s: float, log_path: Path | None, log_start: int
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process
        self._grace_s = grace_s
        self._log_start = log_start

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path | None = None,
        with_pipes: bool = False,
        launcher: Sequence[str] | None = None,
        grace_s: float = GRACE_S,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> ChildProcess:
        """Starts `command` behind `launcher`; without one it gets SIGTERM when this process dies.

        `stop` gives it `grace_s` between SIGTERM and SIGKILL. Its output is appended to `log_path`; without one it goes
        where this process's goes. `with_pipes` opens `stdin` and `stdout` to it instead.
        """
        log_start = 0
        output: int | None = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            output = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            log_start = os.fstat(output).st_size
        try:
            process = await asyncio.create_subprocess_exec(
                *(launcher or (sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()))),
                *command,
                stdin=asyncio.subprocess.PIPE if with_pipes else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if with_pipes else output,
                stderr=output,
                env=None if environment is None else os.environ | environment,
                pass_fds=pass_fds,
                # Ctrl-C at the terminal is for this process, which then ends its children.
                start_new_session=True,
            )
        finally:
            if output is not None:
                os.close(output)
        return cls(name, process, grace_s, log_path, log_start)

    @property
    def pid(self) -> int:
        """Process id, which is that of its session and group, too."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, 128 + n after signal n; None while it runs."""
        code = self._process.returncode
        return 128 - code if code is not None and code < 0 else code

    @property
    def stdin(self) -> asyncio.StreamWriter:
        """Pipe to the program."""
        assert self._process.stdin is not None, f"{self.name} was started without pipes"
        return self._process.stdin

    @property
    def stdout(self) -> asyncio.StreamReader:
        """Pipe from the program."""
        assert self._process.stdout is not None, f"{self.name} was started without pipes"
        return self._process.stdout

    async def read_ready_line(self, timeout_s: float) -> bytes:
        """Returns the first line of its output, by which a program with pipes says that it is ready.

        Raises UnavailableError when it ends before or takes longer, and then has ended it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                line = await self.stdout.readline()
        except TimeoutError as error:
            await self.end()
            raise UnavailableError(f"{self.name} was not ready within {timeout_s:g} s") from error
        except BaseException:
            await self.end()
            raise
        if not line:
            raise UnavailableError(self.describe_end(await self._wait_or_kill()))
        return line

    async def wait(self) -> int:
        """Waits until the program has ended and returns its exit code, 128 + n after signal n."""
        if await self._process.wait() < 0:  # what it started may have outlived it
            self._kill_group()
        assert self.exit_code is not None
        return self.exit_code

    async def stop(self) -> int:
        """SIGTERM, then SIGKILL after the grace period; returns the exit code."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        return await self._wait_or_kill()

    async def end(self) -> int:
        """SIGKILL at once; returns the exit code."""
        self.kill()
        return await self.wait()

    def kill(self) -> None:
        """Sends SIGKILL to the program and all of its process group."""
        if self._process.returncode is None:
            self._kill_group()

    def describe_end(self, exit_code: int) -> str:
        """Returns one sentence: how it ended, the error that it logged since its start, and where the log is."""
        lines = [] if self.log_path is None else read_tail(self.log_path, self._log_start)
        if exit_code > 128:  # what it wrote last need not have to do with its end
            end, error = f"was ended by {signal.Signals(exit_code - 128).name}", last_error(lines)
        else:
            words = last_words(lines) if exit_code else ""  # a warning is no reason for a clean end
            end, error = f"ended with exit code {exit_code}", last_error(lines) or words
        where = "" if self.log_path is None else f" (log: {self.log_path})"
        return f"{self.name} {end}{f': {error}' if error else ''}{where}"

    async def _wait_or_kill(self) -> int:
        """Waits for the end within the grace period, then kills; returns the exit code."""
        try:
            async with asyncio.timeout(self._grace_s):
                return await self.wait()
        except TimeoutError:
            return await self.end()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def read_tail(path: Path, start: int = 0) -> list[str]:
    """Returns the last lines of a log from byte `start` on, LOG_TAIL_BYTES at most; none when there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def last_error(lines: Iterable[str]) -> str:
    """Returns the last line of a log that names an error, 300 characters at most; nothing when none does."""
    found = (_error_in(line.strip()) for line in reversed([*lines]))
    return next((error[:_MOST_CHARACTERS] for error in found if error), "")


def last_words(lines: Iterable[str]) -> str:
    """Returns the last line of a log that is no JSON record, 300 characters at most."""
    plain = (line.strip() for line in reversed([*lines]) if not line.startswith("{"))
    return next((line[:_MOST_CHARACTERS] for line in plain if line), "")


def _error_in(line: str) -> str:
    """Returns the error that a line of a log names; nothing when it names none."""
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
