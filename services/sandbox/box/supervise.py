"""Starts a program's process and watches it: wall clock, CPU time, output, memory kills, and its end."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from .child import COMPILE_ERROR, EXCEPTION, LOADED, NOT_JSON, REQUEST_PREFIX, TOKEN_BYTES
from .limits import BoxLimits
from .streams import Capture, Reply
from .usage import UsageFiles

TICK_S = 0.05
_NOTE_BYTES = 1024
_STOP_BY_REPLY = {COMPILE_ERROR: "compile", EXCEPTION: "exception", NOT_JSON: "not_json"}


@dataclass
class Outcome:
    """How one run ended. `stop` is None for a run that ended by itself, else wall, cpu, memory, output, died,
    exception, not_json or compile.

    `stdout` is a program's output or a call's result as JSON; `exit_code` is None when a signal ended the process.
    """

    stop: str | None = None
    exit_code: int | None = 0
    signal: int = 0
    wall_us: int = 0
    cpu_us: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    compile_error: bool = False
    reason: str = ""


class ControlClosed(EOFError):
    """The service has let go of the slot."""


@dataclass
class _Server:
    """A loaded submission that answers calls."""

    pid: int
    descriptor: int
    requests: int
    replies: int


@dataclass
class _Meter:
    """Clock, CPU time and memory kills at the start of a run."""

    started: float
    cpu_ns: int
    oom_kills: int


class Supervisor:
    """Runs processes under one job's limits; at most one program runs at a time."""

    def __init__(self, control: int, limits: BoxLimits, usage: UsageFiles | None) -> None:
        self._control = control
        self._limits = limits
        self._usage = usage
        self._server: _Server | None = None
        self._ended: dict[int, int] = {}
        self._rusage_cpu_us = 0
        self._failure_note = mmap.mmap(-1, mmap.PAGESIZE)
        self.peak_bytes = 0

    @property
    def has_server(self) -> bool:
        """Whether a loaded submission waits for calls."""
        return self._server is not None

    def run_program(self, become: Callable[[], None], stdin: bytes, confine: Callable[[list[int]], None]) -> Outcome:
        """Runs `become` in a confined process with `stdin` as its input, to its end or to a limit."""
        input_descriptor = _memory_file(stdin)
        pipes = [os.pipe() for _ in range(3)]
        meter = self._start_meter()
        pid = self._fork(become, confine, [input_descriptor, *(write for _, write in pipes)])
        os.close(input_descriptor)
        for read, write in pipes:
            os.close(write)
            os.set_blocking(read, False)
        captures = [Capture(read, self._limits.output_bytes) for read, _ in pipes]
        outcome = Outcome()
        outcome.stop = self._watch(pid, meter, captures)
        for capture in captures:
            capture.drain()
            os.close(capture.descriptor)
        out, err, compile_report = captures
        if outcome.stop is None and (out.overflowed or err.overflowed):
            outcome.stop = "output"
        self._fill(outcome, pid, meter)
        outcome.stdout, outcome.stdout_truncated = out.contents(), out.overflowed
        outcome.stderr, outcome.stderr_truncated = err.contents(), err.overflowed
        outcome.compile_error = bool(compile_report.contents())
        outcome.reason = compile_report.contents().decode(errors="replace")
        return outcome

    def start_server(self, become: Callable[[], None], confine: Callable[[list[int]], None]) -> Outcome | None:
        """Loads a submission; None when it is ready for calls, else how loading ended."""
        null = os.open("/dev/null", os.O_RDWR)
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        pid = self._fork(become, confine, [null, null, null, request_read, reply_write])
        for descriptor in (null, request_read, reply_write):
            os.close(descriptor)
        os.set_blocking(request_write, False)
        os.set_blocking(reply_read, False)
        self._server = _Server(pid, os.pidfd_open(pid), request_write, reply_read)
        outcome, kind = self._exchange(b"")
        return None if kind == LOADED else outcome

    def call_server(self, arguments_json: bytes) -> Outcome:
        """One call of the loaded submission; a server that does not answer well is ended."""
        return self._exchange(arguments_json)[0]

    def _exchange(self, payload: bytes) -> tuple[Outcome, bytes]:
        server = self._server
        assert server is not None
        token = os.urandom(TOKEN_BYTES // 2).hex().encode()
        meter = self._start_meter()
        reply = Reply(token, self._limits.output_bytes)
        outcome = Outcome()
        outcome.stop = self._await_reply(server, meter, REQUEST_PREFIX.pack(len(payload), token) + payload, reply)
        kind = reply.kind if outcome.stop is None else b""
        outcome.stop = outcome.stop or _STOP_BY_REPLY.get(kind)
        if outcome.stop in ("exception", "not_json", "compile"):
            outcome.reason = reply.payload.decode(errors="replace")
        elif outcome.stop is None:
            outcome.stdout = reply.payload
        outcome.wall_us = int((time.monotonic() - meter.started) * 1e6)
        if self._usage:
            outcome.cpu_us = (self._usage.cpu_ns() - meter.cpu_ns) // 1000
        if outcome.stop in ("wall", "cpu", "memory", "output", "died", "compile") or (
            kind == EXCEPTION and not payload
        ):
            self._end_server(outcome)
        return outcome, kind

    def _await_reply(self, server: _Server, meter: _Meter, unsent: bytes, reply: Reply) -> str | None:
        """Sends the request and gathers the reply; why it was given up, or None."""
        poller = self._poller(server.replies, server.descriptor)
        poller.register(server.requests, select.POLLOUT)
        died = False
        while True:
            for descriptor, _ in self._poll(poller, meter):
                if descriptor == server.requests:
                    unsent = _write_some(server.requests, unsent)
                    if not unsent:
                        poller.unregister(server.requests)
                elif descriptor == server.descriptor:
                    died = True
            reply.read_from(server.replies)
            if reply.broken:
                return "output" if reply.too_long else "died"
            if reply.complete:
                return "memory" if self._was_killed_for_memory(meter) else None
            if died:
                return "memory" if self._was_killed_for_memory(meter) else "died"
            if stop := self._limit_passed(meter):
                return stop

    def _end_server(self, outcome: Outcome) -> None:
        server = self._server
        assert server is not None
        self._server = None
        _kill(server.pid)
        self.clear_box()
        for descriptor in (server.descriptor, server.requests, server.replies):
            os.close(descriptor)
        self._check_confined()
        status = self._ended.pop(server.pid)
        outcome.exit_code, outcome.signal = _explain(status)
        if outcome.stop == "died" and outcome.signal == signal.SIGXCPU:
            outcome.stop = "cpu"

    def _watch(self, pid: int, meter: _Meter, captures: list[Capture]) -> str | None:
        """Waits for the process; why it was stopped, or None. Afterwards it is dead and reaped."""
        descriptor = os.pidfd_open(pid)
        poller = self._poller(descriptor, *(capture.descriptor for capture in captures))
        by_descriptor = {capture.descriptor: capture for capture in captures}
        stop: str | None = None
        ended = False
        while not ended and stop is None:
            for ready, _ in self._poll(poller, meter):
                if ready == descriptor:
                    ended = True
                elif ready in by_descriptor and not by_descriptor[ready].read():
                    poller.unregister(ready)
            if any(capture.overflowed for capture in captures):
                stop = "output"
            elif not ended:
                stop = self._limit_passed(meter)
        os.close(descriptor)
        if not ended:
            _kill(pid)
        while pid not in self._ended:
            self._reap(block=True)
        self._check_confined()
        return "memory" if self._was_killed_for_memory(meter) else stop

    def _fill(self, outcome: Outcome, pid: int, meter: _Meter) -> None:
        outcome.wall_us = int((time.monotonic() - meter.started) * 1e6)
        outcome.cpu_us = (self._usage.cpu_ns() - meter.cpu_ns) // 1000 if self._usage else self._rusage_cpu_us
        outcome.exit_code, outcome.signal = _explain(self._ended.pop(pid))
        if outcome.stop is None and outcome.signal == signal.SIGXCPU:
            outcome.stop = "cpu"

    def clear_box(self) -> None:
        """Ends everything in the box but the agent, so that the next run starts alone."""
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):  # nobody is left
                os.kill(-1, signal.SIGKILL)
        while self._reap(block=True):
            pass

    def _fork(self, become: Callable[[], None], confine: Callable[[list[int]], None], descriptors: list[int]) -> int:
        """Forks a process that confines itself and becomes the program; it ends there whatever happens."""
        pid = os.fork()
        if pid:
            return pid
        try:
            confine(descriptors)
        except Exception as error:
            self._failure_note[:_NOTE_BYTES] = f"{type(error).__name__}: {error}".encode()[:_NOTE_BYTES].ljust(
                _NOTE_BYTES, b"\0"
            )
            os._exit(125)
        self._failure_note.close()  # the submission must not be able to write it
        try:
            become()
        finally:
            os._exit(125)

    def _check_confined(self) -> None:
        """Raises what kept a process from being confined: the box's failure, not the program's."""
        if note := self._failure_note[:_NOTE_BYTES].rstrip(b"\0"):
            raise RuntimeError(f"cannot confine the program: {note.decode(errors='replace')}")

    def _poller(self, *descriptors: int) -> select.poll:
        poller = select.poll()
        poller.register(self._control, 0)  # POLLHUP and POLLERR are always told
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        return poller

    def _poll(self, poller: select.poll, meter: _Meter) -> list[tuple[int, int]]:
        left_s = meter.started + self._limits.wall_ms / 1000 - time.monotonic()
        events = poller.poll(max(0.0, min(TICK_S, left_s)) * 1000)
        if any(descriptor == self._control for descriptor, _ in events):
            raise ControlClosed("the service has closed the slot")
        if not events:
            self._reap(block=False)
        return events

    def _limit_passed(self, meter: _Meter) -> str | None:
        elapsed_s = time.monotonic() - meter.started
        if elapsed_s * 1000 >= self._limits.wall_ms:
            return "wall"
        if self._usage is None or elapsed_s < TICK_S:
            return None
        if self._usage.cpu_ns() - meter.cpu_ns >= self._limits.cpu_ms * 1_000_000:
            return "cpu"
        return None

    def _start_meter(self) -> _Meter:
        usage = self._usage
        return _Meter(time.monotonic(), usage.cpu_ns() if usage else 0, usage.oom_kills() if usage else 0)

    def _was_killed_for_memory(self, meter: _Meter) -> bool:
        return self._usage is not None and self._usage.oom_kills() > meter.oom_kills

    def _reap(self, block: bool) -> bool:
        """Reaps ended children, orphans included; false when there is none left to wait for."""
        try:
            while True:
                pid, status, rusage = os.wait4(-1, 0 if block else os.WNOHANG)
                if pid == 0:
                    return True
                self._ended[pid] = status
                self._rusage_cpu_us = int((rusage.ru_utime + rusage.ru_stime) * 1e6)
                self.peak_bytes = max(self.peak_bytes, rusage.ru_maxrss * 1024)
                if block:
                    return True
        except ChildProcessError:
            return False


def _memory_file(contents: bytes) -> int:
    """A descriptor that reads `contents` from its start."""
    if not contents:
        return os.open("/dev/null", os.O_RDONLY)
    descriptor = os.memfd_create("stdin")
    os.write(descriptor, contents)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _write_some(descriptor: int, data: bytes) -> bytes:
    """Writes what fits; what is left. A reader that has gone shows up as its death."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _kill(pid: int) -> None:
    """Ends a process and its session's group."""
    for target in (-pid, pid):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(target, signal.SIGKILL)


def _explain(status: int) -> tuple[int | None, int]:
    """(exit code or None, signal or 0) of a wait status."""
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), 0
