"""Monitors a program's process from beside it: wall clock, CPU time, output, memory kills, and its end.

The monitor may outlive jobs, so it never reads what belongs to one: sources, inputs and outputs are files in memory
that it only hands on. It reads the usage of the control group through descriptors that were opened before the host's
file system went out of sight.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from . import protocol
from .exchange import Exchange, ReplyTooLongError
from .protocol import Limits, Message, RunRequest, RunResult
from .streams import PAUSE_S, Streams
from .usage import MUCH_BYTES, UsageFiles

TICK_S = 0.05


class Process(ABC):
    """Process that is monitored."""

    pid: int
    baseline_bytes: int | None = None
    """Memory of the control group before the process was made; None takes that at the beginning of the run."""
    events: int | None = None
    """Descriptor that becomes readable when the process reports something; None where it closes its outputs then."""

    def read_events(self) -> bool:
        """Reads reports of the process; returns whether the program has ended."""
        return False

    @abstractmethod
    def kill(self) -> None:
        """Ends everything that runs for it."""

    @abstractmethod
    def exit_status(self, status: int | None, stopped: bool) -> int:
        """Returns the wait status of the program itself, given that of `pid`, None when it has not ended yet, and
        whether a limit ended it.

        Raises OSError when the program could not be executed, and RuntimeError when it could not be confined.
        """


Start = Callable[[list[int]], Process]
"""Starts a process with the given descriptors."""
OnCall = Callable[[Message], None]
"""Handles a message that the service sends while a process runs."""


class ProcessMonitor:
    """Runs one process at a time under its limits."""

    def __init__(self, channel: socket.socket, usage: UsageFiles | None) -> None:
        self._channel = channel
        self._usage = usage
        self._statuses: dict[int, int] = {}
        self._rusage_cpu_us = 0
        self._rusage_peak = 0
        self._peak_known = False
        self._has_baseline = False
        self._started = 0.0
        self._cpu_ns = self._begun_cpu_ns = 0
        self._oom_kills = 0
        self._baseline = self._cached = 0

    def take_baseline(self) -> None:
        """Measures from here what the next run takes, ahead of its request, which then waits for no figures."""
        self._oom_kills = self._usage.oom_kills() if self._usage else 0
        self._begin()
        self._has_baseline = True

    def run(self, request: RunRequest, descriptors: Sequence[int], start: Start, on_call: OnCall) -> RunResult:
        """Runs the process of a request to its end or to a limit; it is dead and reaped afterwards."""
        result = RunResult()
        handed = list(descriptors)
        exchange = None
        if request.answers:
            exchange = Exchange(handed[3], handed[4], request.limits.output_bytes)
            handed[3:5] = exchange.process_ends
        self._rusage_cpu_us = self._rusage_peak = 0
        if not self._has_baseline or self._lost_memory():
            self.take_baseline()
        self._has_baseline = False
        streams = Streams(handed, request.limits.output_bytes, request.input_is_file)
        self._started = time.monotonic()
        process = start(streams.handed)
        streams.release()
        if process.baseline_bytes is not None:
            self._baseline = min(self._baseline, process.baseline_bytes)  # cached pages may have been dropped meanwhile
        if exchange is not None:
            exchange.close_process_ends()
        try:
            result.stop = self._watch(process, request, handed[1:3], streams, exchange, result, on_call)
            status = None if result.stop is None and process.read_events() else self._end(process)
            streams.move()
            result.wall_us = self._elapsed_us()
            if exchange is not None:
                self._advance(exchange, result)
        except EOFError:  # the service has closed the sandbox
            process.kill()
            raise
        finally:
            streams.close()
            if exchange is not None:
                exchange.close()
        if self._oom_killed():
            result.stop = "memory"
        self._measure(result)
        self._read_status(process, status, result)
        if exchange is not None:
            result.stop = None if exchange.ended else result.stop or "exited"
        return result

    def _watch(
        self,
        process: Process,
        request: RunRequest,
        outputs: list[int],
        streams: Streams,
        exchange: Exchange | None,
        result: RunResult,
        on_call: OnCall,
    ) -> str | None:
        """Waits for the process; returns why it has to be stopped, or None when it has ended."""
        descriptor = os.pidfd_open(process.pid)
        poller, patient = select.poll(), select.poll()
        for readable in (self._channel.fileno(), descriptor, process.events):
            if readable is not None:
                poller.register(readable, select.POLLIN)
                patient.register(readable, select.POLLIN)
        streams.poll(poller, patient)
        pausing = False
        try:
            while True:
                if exchange is not None:
                    exchange.watch(poller)
                left_s = self._started + request.limits.wall_ms / 1000 - time.monotonic()
                awaited, most_s = (patient, PAUSE_S) if pausing else (poller, TICK_S)
                ready = {number for number, _ in awaited.poll(max(0.0, min(most_s, left_s)) * 1000)}
                pausing = streams.move() and exchange is None
                if self._channel.fileno() in ready and self._receive(on_call):
                    return "stopped"
                has_reported_end = (process.events is None or process.events in ready) and process.read_events()
                if exchange is not None and exchange.is_ready(ready) and not self._advance(exchange, result):
                    return "output"
                if exchange is not None and exchange.ended:  # a submission need not end by itself
                    return "answered"
                if any(_size(output) > request.limits.output_bytes for output in outputs):
                    return "output"
                if has_reported_end or descriptor in ready:
                    return None
                if not ready:
                    self._reap(block=False)
                if stop := self._limit_passed(request.limits):
                    return stop
        finally:
            os.close(descriptor)

    def _receive(self, on_call: OnCall) -> bool:
        """Handles a message of the service; returns true for a stop. Raises EOFError when the service is gone."""
        message = protocol.receive(self._channel)
        try:
            if message.header["kind"] == "stop":
                return True
            on_call(message)
            return False
        finally:
            message.close()

    def _end(self, process: Process) -> int:
        process.kill()
        while process.pid not in self._statuses:
            self._reap(block=True)
        return self._statuses.pop(process.pid)

    def _advance(self, exchange: Exchange, result: RunResult) -> bool:
        """Records new answers and starts the clock anew for each next one; returns false when one is too long."""
        try:
            exchange.send()
            while exchange.receive():
                result.answers_us.append(self._elapsed_us())
                self._restart_meter()
                exchange.send_next()
        except ReplyTooLongError:
            return False
        return True

    def _measure(self, result: RunResult) -> None:
        if self._usage is None:
            result.cpu_us, result.peak_bytes = self._rusage_cpu_us, self._rusage_peak
            return
        result.cpu_us = (self._usage.cpu_ns() - self._begun_cpu_ns) // 1000
        peak = self._rusage_peak
        if self._peak_known:
            peak = self._usage.peak_bytes() - self._baseline
            if self._cached:  # cached pages that had to make room for the program
                peak += max(0, self._cached - self._usage.cached_bytes())
        result.peak_bytes = max(0, peak)

    def _read_status(self, process: Process, status: int | None, result: RunResult) -> None:
        try:
            status = process.exit_status(status, result.stop is not None)
        except OSError as error:
            result.start_error, result.exit_code = error.errno or 0, 127
            return
        if os.WIFSIGNALED(status):
            result.exit_code, result.signal = None, os.WTERMSIG(status)
        else:
            result.exit_code = os.WEXITSTATUS(status)
        if result.stop is None and result.signal == signal.SIGXCPU:
            result.stop = "cpu"

    def _limit_passed(self, limits: Limits) -> str | None:
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

    def begin_anew(self) -> None:
        """Starts the clocks of the next run here: what was done for it since its baseline is not the program's."""
        self._restart_meter()
        self._begun_cpu_ns = self._cpu_ns

    def _begin(self) -> None:
        self._restart_meter()
        self._begun_cpu_ns = self._cpu_ns
        if self._usage is not None:
            self._baseline = self._usage.current_bytes()
            self._cached = self._usage.cached_bytes() if self._baseline >= MUCH_BYTES else 0
            self._peak_known = self._usage.reset_peak()

    def _lost_memory(self) -> bool:
        """Whether much has left the group since the baseline: cached pages that were dropped to make room for the job.

        The peak of before, with them, would count as the program's.
        """
        return self._usage is not None and self._baseline - self._usage.current_bytes() >= MUCH_BYTES

    def _oom_killed(self) -> bool:
        return self._usage is not None and self._usage.oom_kills() > self._oom_kills

    def _elapsed_us(self) -> int:
        return int((time.monotonic() - self._started) * 1e6)

    def held_bytes(self) -> int:
        """Returns the memory that the run has left charged to the control group."""
        return 0 if self._usage is None else self._usage.current_bytes() - self._baseline

    def clear(self) -> None:
        """Reaps all children; they have been killed before."""
        while self._reap(block=True):
            pass
        self._statuses.clear()

    def _reap(self, block: bool) -> bool:
        """Reaps ended children, orphans included; returns false when no child is left."""
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
