"""PID 1 of a box: reads one job from the service, runs its programs one after another, reports what each did.

The agent keeps the clock, counts CPU time, output and memory kills, and reaps orphans. It is the only thing in the
box that holds the socket to the service; when that socket closes the agent ends, and with it, by the kernel's rule
for PID 1, everything in the box.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from . import child, kernel, wire
from .child import Confinement
from .limits import BoxLimits
from .supervise import Outcome, Supervisor
from .usage import UsageFiles

GO_ON = b"g"
Furnish = Callable[[BoxLimits], None]


@dataclass(frozen=True)
class Job:
    """One job: a program run once per input, or a function called once per test."""

    mode: str
    limits: BoxLimits
    arguments: list[str]
    function_name: str
    stop_at_first_failure: bool
    source: bytes
    inputs: list[bytes]


def parse_job(frame: wire.Frame) -> Job:
    """The job in a frame of the service; its first blob is the source, the others are the inputs."""
    header = frame.header
    return Job(
        mode=header["mode"],
        limits=BoxLimits(**header["limits"]),
        arguments=header["arguments"],
        function_name=header["function_name"],
        stop_at_first_failure=header["stop_at_first_failure"],
        source=frame.blobs[0],
        inputs=frame.blobs[1:],
    )


class Agent:
    """Runs one job and sends a frame per input, then one of kind `done`."""

    def __init__(
        self, control: socket.socket, confinement: Confinement, usage: UsageFiles | None, furnish: Furnish
    ) -> None:
        self._control = control
        self._furnish = furnish
        self._confinement = confinement
        self._usage = usage
        self._unsent: list[bytes] = []

    def run(self) -> None:
        """Reads the job, runs it, sends the results."""
        job = parse_job(wire.read_frame(self._receive_exactly))
        self._furnish(job.limits)
        supervisor = Supervisor(self._control.fileno(), job.limits, self._usage)
        baseline = self._usage.current_bytes() if self._usage else 0
        started = time.monotonic()
        if job.mode == "functions":
            self._run_functions(job, supervisor)
        else:
            self._run_programs(job, supervisor)
        peak = max(0, self._usage.peak_bytes() - baseline) if self._usage else supervisor.peak_bytes
        self._send({"kind": "done", "wall_us": int((time.monotonic() - started) * 1e6), "peak_bytes": peak}, [])
        self._flush()

    def _run_programs(self, job: Job, supervisor: Supervisor) -> None:
        for index, stdin in enumerate(job.inputs):
            if index:
                supervisor.clear_box()
            outcome = supervisor.run_program(lambda: self._become_program(job), stdin, self._confine_with(job))
            failed = outcome.stop is not None or outcome.exit_code != 0
            if not self._report(job, index, "program", outcome, failed) or outcome.compile_error:
                return

    def _run_functions(self, job: Job, supervisor: Supervisor) -> None:
        def become() -> None:
            child.serve_functions(job.source, job.function_name, self._confinement.home, 3, 4)

        for index, arguments_json in enumerate(job.inputs):
            if not supervisor.has_server:
                loaded = supervisor.start_server(become, self._confine_with(job))
                if loaded is not None:
                    self._send({"kind": "load", **_fields(loaded)}, [loaded.stdout])
                    return
            outcome = supervisor.call_server(arguments_json)
            if not self._report(job, index, "call", outcome, outcome.stop is not None):
                return

    def _become_program(self, job: Job) -> None:
        child.run_program(job.source, job.arguments, self._confinement.home)

    def _confine_with(self, job: Job) -> Any:
        cpu_s = -(-job.limits.cpu_ms // 1000) * (len(job.inputs) if job.mode == "functions" else 1)
        return lambda descriptors: child.confine(self._confinement, job.limits, cpu_s, descriptors)

    def _report(self, job: Job, index: int, kind: str, outcome: Outcome, failed: bool) -> bool:
        """Sends an outcome; whether the next input is to be run. With stop_at_first_failure the service decides,
        which can compare.
        """
        awaits_answer = job.stop_at_first_failure and not failed and index + 1 < len(job.inputs)
        self._send({"kind": kind, "awaits_answer": awaits_answer, **_fields(outcome)}, [outcome.stdout, outcome.stderr])
        if not awaits_answer:
            return not (job.stop_at_first_failure and failed)
        self._flush()
        return self._control.recv(1) == GO_ON

    def _receive_exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._control.recv(min(count, 1 << 20))
            if not part:
                raise EOFError("the service has closed the slot")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _send(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        self._unsent.append(wire.encode(header, blobs))

    def _flush(self) -> None:
        self._control.sendall(b"".join(self._unsent))
        self._unsent.clear()


def _fields(outcome: Outcome) -> dict[str, Any]:
    fields = asdict(outcome)
    del fields["stdout"], fields["stderr"]
    return fields


def run_agent(control: socket.socket, confinement: Confinement, usage: UsageFiles | None, furnish: Furnish) -> NoReturn:
    """The agent's process from here to its end; `furnish` makes the box's writable places. A failure of its own is
    told to the service as a frame of kind `failed`.
    """
    kernel.die_with_parent(signal.SIGKILL)
    kernel.set_dumpable(False)
    agent = Agent(control, confinement, usage, furnish)
    try:
        agent.run()
    except (EOFError, ConnectionError):
        os._exit(3)
    except Exception as error:
        control.sendall(wire.encode({"kind": "failed", "reason": f"{type(error).__name__}: {error}"}, []))
        sys.stderr.write(f"sandbox agent: {type(error).__name__}: {error}\n")
        os._exit(4)
    os._exit(0)
