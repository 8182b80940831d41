"""What a control group has used, read through descriptors that were opened before the host's file system went out of
sight.


Watches a program's process from beside it: wall clock, CPU time, output, memory kills, and its end.

The supervisor may outlive jobs, so it never reads what belongs to one: sources, inputs and outputs are files in memory
that it only hands on.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import protocol
from .protocol import ANSWERED, FINISHED, BoxLimits, Order, Outcome

MUCH_BYTES = 8 << 20
"""Below this a group that rests holds too few pages of files for them to matter."""


@dataclass(frozen=True)
class UsageFiles:
    """Open descriptors of the cgroup's CPU time, OOM kill count, peak memory, current memory and statistics files."""

    version: int
    cpu: int
    oom: int
    peak: int
    current: int
    statistics: int

    def cpu_ns(self) -> int:
        """CPU time of everything that ran in the cgroup, in nanoseconds."""
        text = os.pread(self.cpu, 512, 0)
        return int(text) if self.version == 1 else _field(text, b"usage_usec") * 1000

    def oom_kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        text = os.pread(self.oom, 512, 0)
        return _field(text, b"oom_kill")

    def peak_bytes(self) -> int:
        """The most memory charged since the last reset."""
        return int(os.pread(self.peak, 64, 0))

    def current_bytes(self) -> int:
        """The memory charged at this moment."""
        return int(os.pread(self.current, 64, 0))

    def cached_bytes(self) -> int:
        """Memory that holds pages of files, tmpfs aside: the kernel takes it back as soon as a program wants it.

        To be asked only where much is held: the kernel adds many figures up for it.
        """
        text = os.pread(self.statistics, 1 << 14, 0)
        names = (b"total_cache", b"total_shmem") if self.version == 1 else (b"file", b"shmem")
        return _field(text, names[0]) - _field(text, names[1])

    def reset_peak(self) -> bool:
        """Forgets the peak; false on kernels that cannot (cgroup v2 before 6.12)."""
        try:
            os.pwrite(self.peak, b"0", 0)
        except OSError:
            return False
        return True


def open_usage(version: int, paths: dict[str, str]) -> UsageFiles:
    """Opens the files of a cgroup; `paths` has the keys cpu, oom, peak, current and
    statistics.
    """
    opened = {name: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for name, path in paths.items() if name != "peak"}
    try:
        peak = os.open(paths["peak"], os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # read-only in cgroup v2 before 6.12
        peak = os.open(paths["peak"], os.O_RDONLY | os.O_CLOEXEC)
    return UsageFiles(version=version, peak=peak, **opened)


def _field(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    raise ValueError(f"no {name.decode()} in {text!r}")


TICK_S = 0.05
_PROGRESS_BYTES = 4096


class Process(ABC):
    """A process under watch, and how it is ended."""

    pid: int
    baseline_bytes: int | None = None
    """What the control group held before the process was made; None takes what it holds when the run begins."""
    events: int | None = None
    """Descriptor that becomes readable when the process tells something of itself."""

    def note_events(self) -> bool:
        """Takes in what was told; whether the program has ended."""
        return False

    @abstractmethod
    def kill(self) -> None:
        """Ends everything that runs for it."""

    @abstractmethod
    def settle(self, status: int | None, stopped: bool) -> int:
        """The wait status of the program itself, given that of `pid`, None when it has not ended yet, and whether it
        was ended by a limit.

        Raises OSError when the program could not be executed, and RuntimeError when it could not be confined.
        """


Start = Callable[[list[int]], Process]
"""Starts a process with the given descriptors."""
OnCall = Callable[[dict[str, Any]], None]
"""Answers what the service asks while a process runs."""


class Supervisor:
    """Runs one process at a time under its limits."""

    def __init__(self, channel: socket.socket, usage: UsageFiles | None) -> None:
        self._channel = channel
        self._usage = usage
        self._statuses: dict[int, int] = {}
        self._rusage_cpu_us = 0
        self._rusage_peak = 0
        self._peak_known = False
        self._started = 0.0
        self._cpu_ns = self._begun_cpu_ns = 0
        self._oom_kills = 0
        self._baseline = self._cached = 0

    def run(self, order: Order, descriptors: Sequence[int], start: Start, on_call: OnCall) -> Outcome:
        """Runs the process of an order to its end or to a limit; it is dead and reaped afterwards."""
        outcome = Outcome()
        progress = -1
        handed = list(descriptors)
        if order.answers:
            progress, told = os.pipe()
            os.set_blocking(progress, False)
            handed.insert(len(handed) - 1, told)
        self._rusage_cpu_us = self._rusage_peak = 0
        self._oom_kills = self._usage.oom_kills() if self._usage else 0
        self._begin()
        process = start(handed)
        if process.baseline_bytes is not None:
            self._baseline = min(self._baseline, process.baseline_bytes)  # pages of files may have gone meanwhile
        if progress >= 0:
            os.close(told)
        try:
            outcome.stop = self._watch(process, order, handed[1:3], progress, outcome, on_call)
            status = None if outcome.stop is None and process.note_events() else self._end(process)
            outcome.wall_us = self._elapsed_us()
            if progress >= 0:
                self._take_answers(progress, outcome)
        except EOFError:  # the service has let go of the box
            process.kill()
            raise
        finally:
            if progress >= 0:
                os.close(progress)
        if self._oom_killed():
            outcome.stop = "memory"
        self._measure(outcome)
        self._read_status(process, status, outcome)
        if order.answers:
            self._close_answers(order, outcome)
        return outcome

    def _watch(
        self,
        process: Process,
        order: Order,
        outputs: list[int],
        progress: int,
        outcome: Outcome,
        on_call: OnCall,
    ) -> str | None:
        """Waits for the process; why it is to be stopped, or None when it has ended."""
        descriptor = os.pidfd_open(process.pid)
        poller = select.poll()
        for readable in (self._channel.fileno(), descriptor, process.events, progress):
            if readable is not None and readable >= 0:
                poller.register(readable, select.POLLIN)
        try:
            while True:
                left_s = self._started + order.limits.wall_ms / 1000 - time.monotonic()
                ready = {number for number, _ in poller.poll(max(0.0, min(TICK_S, left_s)) * 1000)}
                if self._channel.fileno() in ready and self._hear(on_call):
                    return "told"
                told_its_end = process.events in ready and process.note_events()
                if progress in ready and not self._take_answers(progress, outcome):
                    poller.unregister(progress)
                if any(_size(output) > order.limits.output_bytes for output in outputs):
                    return "output"
                if told_its_end or descriptor in ready:
                    return None
                if not ready:
                    self._reap(block=False)
                if stop := self._limit_passed(order.limits):
                    return stop
        finally:
            os.close(descriptor)

    def _hear(self, on_call: OnCall) -> bool:
        """Does what the service asks; true when it asks for the end. Raises EOFError when it has gone away."""
        message = protocol.receive(self._channel)
        message.close()
        if message.header["kind"] == "stop":
            return True
        on_call(message.header)
        return False

    def _end(self, process: Process) -> int:
        process.kill()
        while process.pid not in self._statuses:
            self._reap(block=True)
        return self._statuses.pop(process.pid)

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

    def _close_answers(self, order: Order, outcome: Outcome) -> None:
        if len(outcome.answers_us) >= order.answers:
            outcome.finished, outcome.stop = True, None
        elif outcome.stop is None and not outcome.finished:
            outcome.stop = "died"
        del outcome.answers_us[order.answers :]

    def _measure(self, outcome: Outcome) -> None:
        if self._usage is None:
            outcome.cpu_us, outcome.peak_bytes = self._rusage_cpu_us, self._rusage_peak
            return
        outcome.cpu_us = (self._usage.cpu_ns() - self._begun_cpu_ns) // 1000
        peak = self._rusage_peak
        if self._peak_known:
            peak = self._usage.peak_bytes() - self._baseline
            if self._cached:  # pages of files that had to make room for the program
                peak += max(0, self._cached - self._usage.cached_bytes())
        outcome.peak_bytes = max(0, peak)

    def _read_status(self, process: Process, status: int | None, outcome: Outcome) -> None:
        try:
            status = process.settle(status, outcome.stop is not None)
        except OSError as error:
            outcome.start_error, outcome.exit_code = error.errno or 0, 127
            return
        if os.WIFSIGNALED(status):
            outcome.exit_code, outcome.signal = None, os.WTERMSIG(status)
        else:
            outcome.exit_code = os.WEXITSTATUS(status)
        if outcome.stop is None and outcome.signal == signal.SIGXCPU:
            outcome.stop = "cpu"

    def _limit_passed(self, limits: BoxLimits) -> str | None:
        elapsed_s = time.monotonic() - self._started
        if elapsed_s * 1000 >= limits.wall_ms:
            return "wall"
        if self._usage is None or elapsed_s < TICK_S:
            return None
        return "cpu" if self._usage.cpu_ns() - self._cpu_ns >= limits.cpu_ms * 1_000_000 else None

    def _restart_meter(self) -> None:
        self._started = time.monotonic()
        if self._usage is not None:
            self._cpu_ns = self._usage.cpu_ns()

    def _begin(self) -> None:
        self._restart_meter()
        self._begun_cpu_ns = self._cpu_ns
        if self._usage is not None:
            self._baseline = self._usage.current_bytes()
            self._cached = self._usage.cached_bytes() if self._baseline >= MUCH_BYTES else 0
            self._peak_known = self._usage.reset_peak()

    def _oom_killed(self) -> bool:
        return self._usage is not None and self._usage.oom_kills() > self._oom_kills

    def _elapsed_us(self) -> int:
        return int((time.monotonic() - self._started) * 1e6)

    def held_bytes(self) -> int:
        """Memory that the run has left charged to the control group."""
        return 0 if self._usage is None else self._usage.current_bytes() - self._baseline

    def clear(self) -> None:
        """Reaps everything that is left; whoever is to end has been killed."""
        while self._reap(block=True):
            pass
        self._statuses.clear()

    def _reap(self, block: bool) -> bool:
        """Reaps ended children, orphans included; false when there is none left to wait for."""
        try:
            while True:
                pid, status, rusage = os.wait4(-1, 0 if block else os.WNOHANG)
                if pid == 0:
                    return True
                self._statuses[pid] = status
                self._rusage_cpu_us += int((rusage.ru_utime + rusage.ru_stime) * 1e6)
                self._rusage_peak = max(self._rusage_peak, rusage.ru_maxrss * 1024)
                if block:
                    return True
        except ChildProcessError:
            return False


def _size(output: int) -> int:
    return os.fstat(output).st_size
