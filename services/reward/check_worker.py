"""A process that does checks which may hang: a supervisor, and forked children that do the work and may be killed.

The supervisor imports what the checks need once and only ever waits, so it cannot hang; a child that exceeds its time
or memory is killed and the next one forked, which takes milliseconds where a new interpreter takes a second. A check
that takes long while others wait steps aside: its child goes on to its deadline beside the next one, so that a few
checks that hang hold nobody up.

It speaks JSON lines: {"id", "deadline_s", "check"} or {"cancel": id} on standard input, as many as the caller likes,
and {"id", "status", "reason"} on standard output in the order in which checks end.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import select
import signal
import time
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from services.reward.check_child import Child, fork_child, resident_bytes
from services.reward.pipes import LineReader, write_line

# What a module of checks offers: warm_up(), and check(request) that gives {"status", "reason"}.
MODULES = {"math": "services.reward.mathematics.check", "pattern": "services.reward.pattern_checks"}
# A computer algebra system caches; a child is replaced before that counts against an innocent answer.
CHECKS_PER_CHILD = 1000
MEMORY_POLL_S = 0.05


@dataclass(frozen=True)
class Limits:
    """What a check may take, and when and how many of them step aside."""

    memory_bytes: int
    slow_s: float
    slow_checks: int


@dataclass
class Running:
    """A check in its child; times are of the monotonic clock."""

    child: Child
    check_id: int
    deadline_s: float
    begin: float

    @property
    def end(self) -> float:
        """When its time is up."""
        return self.begin + self.deadline_s


def main() -> None:
    """Serves checks until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=MODULES)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--slow-s", type=float, required=True)
    parser.add_argument("--slow-checks", type=int, required=True)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to act on
    module = import_module(MODULES[arguments.kind])
    module.warm_up()
    gc.collect()
    gc.freeze()
    limits = Limits(arguments.memory_bytes, arguments.slow_s, arguments.slow_checks)
    supervisor = Supervisor(module.check, limits)
    write_line(1, {"status": "ready"})
    try:
        supervisor.serve()
    finally:
        supervisor.end()


class Supervisor:
    """One check at a time in front, and slow ones beside it."""

    def __init__(self, check: Any, limits: Limits) -> None:
        self._check = check
        self._limits = limits
        self._requests = LineReader(0)
        self._waiting: deque[dict[str, Any]] = deque()
        self._idle: Child | None = fork_child(check)
        self._front: Running | None = None
        self._aside: list[Running] = []

    def serve(self) -> None:
        """Until standard input ends."""
        while True:
            self._start_next()
            watched = [0, *(running.child.replies for running in self._running())]
            readable, _, _ = select.select(watched, [], [], self._patience())
            for running in [each for each in self._running() if each.child.replies in readable]:
                self._finish(running, running.child.read_reply())
            if 0 in readable and not self._receive():
                return
            self._enforce()

    def end(self) -> None:
        """Kills all children."""
        for child in [self._idle, *(running.child for running in self._running())]:
            if child is not None:
                child.end()

    def _running(self) -> list[Running]:
        return ([self._front] if self._front else []) + self._aside

    def _patience(self) -> float | None:
        """How long nothing needs to be done unless something arrives."""
        running = self._running()
        if not running:
            return None
        now = time.monotonic()
        ends = [each.end for each in running]
        if self._front and self._may_step_aside():
            ends.append(self._front.begin + self._limits.slow_s)
        return max(0.0, min(MEMORY_POLL_S, min(ends) - now))

    def _may_step_aside(self) -> bool:
        return bool(self._waiting) and len(self._aside) < self._limits.slow_checks

    def _receive(self) -> bool:
        """Takes what the service sent; whether it is still there."""
        lines = self._requests.read_available()
        for line in lines or ():
            message = json.loads(line)
            if "cancel" in message:
                self._cancel(message["cancel"])
            else:
                self._waiting.append(message)
        return lines is not None

    def _cancel(self, check_id: int) -> None:
        self._waiting = deque(message for message in self._waiting if message["id"] != check_id)
        for running in [each for each in self._running() if each.check_id == check_id]:
            self._drop(running)

    def _start_next(self) -> None:
        while self._front is None and self._waiting:
            message = self._waiting.popleft()
            child = self._idle or fork_child(self._check)
            self._idle = None
            running = Running(child, message["id"], message["deadline_s"], time.monotonic())
            if child.send(message["check"]):
                self._front = running
            else:
                self._finish(running, None)

    def _finish(self, running: Running, reply: dict[str, Any] | None) -> None:
        """Passes a reply on; None stands for a child that died."""
        if reply is None:
            self._drop(running)
            reply = {"status": "died", "reason": "the checking process died"}
        else:
            self._remove(running)
            if self._idle is None and running.child.checks < CHECKS_PER_CHILD and not running.child.is_slow:
                self._idle = running.child
            else:
                running.child.end()
        write_line(1, reply | {"id": running.check_id})

    def _remove(self, running: Running) -> None:
        if running is self._front:
            self._front = None
        elif running in self._aside:
            self._aside.remove(running)

    def _drop(self, running: Running) -> None:
        self._remove(running)
        running.child.end()

    def _enforce(self) -> None:
        """Kills what exceeds its time or memory, and lets a slow check step aside."""
        now = time.monotonic()
        for running in self._running():
            if now >= running.end:
                self._kill(running, "deadline", f"the check did not end within {running.deadline_s:g} s")
            elif resident_bytes(running.child.pid) > self._limits.memory_bytes:
                self._kill(
                    running, "memory", f"the check took more than {self._limits.memory_bytes >> 20} MiB of memory"
                )
        if self._front and self._may_step_aside() and now - self._front.begin >= self._limits.slow_s:
            self._front.child.step_aside()
            self._aside.append(self._front)
            self._front = None

    def _kill(self, running: Running, status: str, reason: str) -> None:
        self._drop(running)
        write_line(1, {"id": running.check_id, "status": status, "reason": reason})


if __name__ == "__main__":
    main()
