"""Starts a program's process and watches it: wall clock, CPU time, output, memory kills, and its end.

The supervisor outlives jobs, so it never reads what belongs to one: sources, inputs and outputs are files in memory
that it only hands on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .child import ANSWERED, FINISHED
from .control import memory_file
from .limits import BoxLimits
from .usage import UsageFiles

TICK_S = 0.05
_NOTE_BYTES = 1024
_PROGRESS_BYTES = 4096


@dataclass
class Outcome:
    """How one process ended. `stop` is None when it ended by itself, else wall, cpu, memory, output or died.

    `exit_code` is None when a signal ended the process. `answers_us` are the times of a submission's answers, the one
    to loading it included; `finished` says that it has nothing more to answer.
    """

    stop: str | None = None
    exit_code: int | None = 0
    signal: int = 0
    wall_us: int = 0
    cpu_us: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    answers_us: list[int] = field(default_factory=list)
    finished: bool = False


class ControlClosed(EOFError):
    """The service has let go of the slot."""


Become = Callable[[list[int]], None]
"""Confines the process to the given descriptors and becomes the program; does not return."""


class Supervisor:
    """Runs the processes of one job, one at a time, under its limits."""

    def __init__(self, control: int, limits: BoxLimits, usage: UsageFiles | None) -> None:
        self.peak_bytes = 0
        self._control = control
        self._limits = limits
        self._usage = usage
        self._statuses: dict[int, int] = {}
        self._rusage_cpu_us = 0
        self._failure_note = mmap.mmap(-1, mmap.PAGESIZE)
        self._started = 0.0
        self._cpu_ns = 0
        self._oom_kills = 0

    def run_program(self, become: Become) -> tuple[Outcome, list[int]]:
        """Runs a program to its end or to a limit; its output, errors and compiler's message follow."""
        files = [memory_file(b"") for _ in range(3)]
        self._restart_meter()
        pid = self._fork(become, files)
        outcome = Outcome()
        outcome.stop = self._watch(pid, files[:2], None, outcome)
        outcome.wall_us = self._elapsed_us()
        self._finish(outcome, pid)
        outcome.stdout_truncated, outcome.stderr_truncated = (self._is_too_long(file) for file in files[:2])
        if outcome.stop is None and (outcome.stdout_truncated or outcome.stderr_truncated):
            outcome.stop = "output"
        return outcome, files

    def run_functions(self, become: Become, most_answers: int) -> tuple[Outcome, list[int]]:
        """Runs a submission until it has given all its answers, ends, or one of them passes a limit; its replies
        follow.
        """
        replies = memory_file(b"")
        null = os.open("/dev/null", os.O_RDWR)
        progress_read, progress_write = os.pipe()
        os.set_blocking(progress_read, False)
        self._restart_meter()
        pid = self._fork(become, [null, null, replies, progress_write])
        os.close(null)
        os.close(progress_write)
        outcome = Outcome()
        outcome.stop = self._watch(pid, [], progress_read, outcome)
        self._take_answers(progress_read, outcome)
        os.close(progress_read)
        outcome.wall_us = self._elapsed_us()
        self._finish(outcome, pid)
        if len(outcome.answers_us) >= most_answers:
            outcome.finished, outcome.stop = True, None
        elif outcome.stop is None and not outcome.finished:
            outcome.stop = "died"
        del outcome.answers_us[most_answers:]
        return outcome, [replies]

    def clear_box(self) -> None:
        """Ends everything in the box but the supervisor, so that the next run starts alone."""
        while True:
            if os.getpid() == 1:
                with contextlib.suppress(ProcessLookupError):  # nobody is left
                    os.kill(-1, signal.SIGKILL)
            if not self._reap(block=True):
                return

    def _watch(self, pid: int, outputs: list[int], progress: int | None, outcome: Outcome) -> str | None:
        """Waits for the process; why it was stopped, or None. Afterwards it is dead and reaped."""
        descriptor = os.pidfd_open(pid)
        poller = select.poll()
        poller.register(self._control, 0)  # POLLHUP and POLLERR are always told
        poller.register(descriptor, select.POLLIN)
        if progress is not None:
            poller.register(progress, select.POLLIN)
        stop: str | None = None
        ended = False
        while not ended and stop is None:
            left_s = self._started + self._limits.wall_ms / 1000 - time.monotonic()
            ready = {number for number, _ in poller.poll(max(0.0, min(TICK_S, left_s)) * 1000)}
            if self._control in ready:
                raise ControlClosed("the service has closed the slot")
            ended = descriptor in ready
            if progress is not None and progress in ready and not self._take_answers(progress, outcome):
                poller.unregister(progress)
            if not ready:
                self._reap(block=False)
            if any(map(self._is_too_long, outputs)):
                stop = "output"
            elif not ended:
                stop = self._limit_passed()
        os.close(descriptor)
        _kill(pid)
        while pid not in self._statuses:
            self._reap(block=True)
        if note := self._failure_note[:_NOTE_BYTES].rstrip(b"\0"):
            raise RuntimeError(f"cannot confine the program: {note.decode(errors='replace')}")
        killed_for_memory = self._usage is not None and self._usage.oom_kills() > self._oom_kills
        return "memory" if killed_for_memory else stop

    def _take_answers(self, progress: int, outcome: Outcome) -> bool:
        """Notes the answers told since the last look, and gives the next one its full time; false at the pipe's end."""
        try:
            told = os.read(progress, _PROGRESS_BYTES)
        except BlockingIOError:
            return True
        if told:
            outcome.answers_us += [self._elapsed_us() // len(told)] * len(told)
            outcome.finished = outcome.finished or told.endswith(FINISHED)
            self._restart_meter()
        return told.strip(ANSWERED + FINISHED) == b"" and bool(told)

    def _finish(self, outcome: Outcome, pid: int) -> None:
        outcome.cpu_us = (self._usage.cpu_ns() - self._cpu_ns) // 1000 if self._usage else self._rusage_cpu_us
        status = self._statuses.pop(pid)
        if os.WIFSIGNALED(status):
            outcome.exit_code, outcome.signal = None, os.WTERMSIG(status)
        else:
            outcome.exit_code = os.WEXITSTATUS(status)
        if outcome.stop is None and outcome.signal == signal.SIGXCPU:
            outcome.stop = "cpu"

    def _limit_passed(self) -> str | None:
        elapsed_s = time.monotonic() - self._started
        if elapsed_s * 1000 >= self._limits.wall_ms:
            return "wall"
        if self._usage is None or elapsed_s < TICK_S:
            return None
        return "cpu" if self._usage.cpu_ns() - self._cpu_ns >= self._limits.cpu_ms * 1_000_000 else None

    def _restart_meter(self) -> None:
        self._started = time.monotonic()
        if self._usage is not None:
            self._cpu_ns = self._usage.cpu_ns()
            self._oom_kills = self._usage.oom_kills()

    def _elapsed_us(self) -> int:
        return int((time.monotonic() - self._started) * 1e6)

    def _is_too_long(self, output: int) -> bool:
        return os.fstat(output).st_size > self._limits.output_bytes

    def _fork(self, become: Become, descriptors: list[int]) -> int:
        """Forks a process that becomes the program; it ends there whatever happens."""
        pid = os.fork()
        if pid:
            return pid
        try:
            become(descriptors)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[:_NOTE_BYTES]
            self._failure_note[:_NOTE_BYTES] = text.ljust(_NOTE_BYTES, b"\0")
        finally:
            os._exit(125)

    def forget_note(self) -> None:
        """For the program's process: lets go of the note that says why it could not be confined."""
        self._failure_note.close()

    def _reap(self, block: bool) -> bool:
        """Reaps ended children, orphans included; false when there is none left to wait for."""
        try:
            while True:
                pid, status, rusage = os.wait4(-1, 0 if block else os.WNOHANG)
                if pid == 0:
                    return True
                self._statuses[pid] = status
                self._rusage_cpu_us = int((rusage.ru_utime + rusage.ru_stime) * 1e6)
                self.peak_bytes = max(self.peak_bytes, rusage.ru_maxrss * 1024)
                if block:
                    return True
        except ChildProcessError:
            return False


def _kill(pid: int) -> None:
    """Ends a process and its group; one that has ended already is not reaped yet, so its number is its own."""
    for target in (-pid, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
