"""The trusted process of a box, PID 1 in it: takes jobs from the service and reports what each did.

It is the only thing in the box that holds the socket to the service; when that closes the agent ends, and with it, by
the kernel's rule for PID 1, everything in the box.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from . import child, control, kernel, root
from .child import Confinement
from .limits import BoxLimits
from .payload import Job, read_job
from .supervise import Outcome, Supervisor
from .usage import UsageFiles


@dataclass(frozen=True)
class Orders:
    """What the agent is told of a job: not what is in it."""

    mode: str
    runs: int
    stop_at_first_failure: bool
    limits: BoxLimits


class Agent:
    """Runs jobs: a message per process that ran, then one of kind `done`."""

    def __init__(self, channel: socket.socket, confinement: Confinement, usage: UsageFiles | None) -> None:
        self._channel = channel
        self._confinement = confinement
        self._usage = usage

    def run_job(self) -> None:
        """Takes one job and runs it; afterwards the box is empty."""
        header, [job] = control.receive(self._channel)
        orders = Orders(**{**header, "limits": BoxLimits(**header["limits"])})
        supervisor = Supervisor(self._channel.fileno(), orders.limits, self._usage)
        baseline = self._usage.current_bytes() if self._usage else 0
        started = time.monotonic()
        if orders.mode == "functions":
            self._run_functions(orders, job, supervisor)
        else:
            self._run_programs(orders, job, supervisor)
        peak = max(0, self._usage.peak_bytes() - baseline) if self._usage else supervisor.peak_bytes
        os.close(job)
        supervisor.clear_box()
        wall_us = int((time.monotonic() - started) * 1e6)
        control.send(self._channel, {"kind": "done", "wall_us": wall_us, "peak_bytes": peak}, [])

    def _run_programs(self, orders: Orders, job: int, supervisor: Supervisor) -> None:
        for index in range(orders.runs):

            def become(outputs: list[int], index: int = index) -> None:
                contents = read_job(job)
                stdin = control.memory_file(contents.inputs[index])
                self._confine(orders, supervisor, [stdin, *outputs], 1)
                child.run_program(contents.source, contents.header["arguments"], self._confinement.home)

            if index:
                supervisor.clear_box()
            outcome, files = supervisor.run_program(become)
            failed = outcome.stop is not None or outcome.exit_code != 0
            compile_failed = os.fstat(files[-1]).st_size > 0
            awaits_answer = orders.stop_at_first_failure and not failed and index + 1 < orders.runs
            header = {"kind": "program", "awaits_answer": awaits_answer, "compile_error": compile_failed}
            self._report(header, outcome, files)
            if compile_failed or (failed and orders.stop_at_first_failure):
                return
            if awaits_answer and not control.receive(self._channel).header["go_on"]:
                return

    def _run_functions(self, orders: Orders, job: int, supervisor: Supervisor) -> None:
        first = 0
        while first < orders.runs:

            def become(outputs: list[int], first: int = first) -> None:
                contents: Job = read_job(job)
                self._confine(orders, supervisor, [outputs[0], *outputs], orders.runs)
                child.serve_functions(contents, first, self._confinement.home, orders.limits.output_bytes)

            outcome, files = supervisor.run_functions(become, orders.runs - first + 1)
            self._report({"kind": "functions"}, outcome, files)
            answered = len(outcome.answers_us) - 1
            if outcome.finished or answered < 0 or orders.stop_at_first_failure:
                return
            first += answered + 1
            supervisor.clear_box()

    def _confine(self, orders: Orders, supervisor: Supervisor, descriptors: list[int], runs: int) -> None:
        confinement, limits = self._confinement, orders.limits
        if confinement.fresh_mounts:
            assert confinement.uid is not None
            root.mount_writable(confinement.uid, limits.file_bytes)
        child.confine(confinement, limits, -(-limits.cpu_ms // 1000) * runs, descriptors)
        supervisor.forget_note()

    def _report(self, header: dict[str, Any], outcome: Outcome, files: list[int]) -> None:
        control.send(self._channel, {**header, **asdict(outcome)}, files)
        for file in files:
            os.close(file)


def become_agent(
    channel: socket.socket, confinement: Confinement, usage: UsageFiles | None, resident: bool
) -> NoReturn:
    """The agent's process from here to its end: one job, or one after another when `resident`.

    A failure of its own is told to the service by a message of kind `failed`.
    """
    kernel.die_with_parent(signal.SIGKILL)
    kernel.set_dumpable(False)
    agent = Agent(channel, confinement, usage)
    try:
        agent.run_job()
        while resident:
            control.send(channel, {"kind": "end", "status": 0, "reason": "", "killed_for_memory": False}, [])
            agent.run_job()
    except (EOFError, ConnectionError):
        os._exit(3)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"sandbox agent: {reason}\n")
        control.send(channel, {"kind": "failed", "reason": reason}, [])
        os._exit(4)
    os._exit(0)
