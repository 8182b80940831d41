"""A process that does checks which may hang: a supervisor, and forked children that do the work and may be killed.

The supervisor imports what the checks need once and only ever waits, so it cannot hang; a child that exceeds its time
or memory is killed and the next one forked, which takes milliseconds where a new interpreter takes a second. A check
that takes long while others wait becomes slow: its child continues to its deadline beside a new one for the others, so
that a few checks that hang hold up no other.

It speaks JSON lines: {"id", "deadline_s", "check"} or {"cancel": id} on standard input, as many as the caller likes,
and {"id", "status", "reason"} on standard output in the order in which checks end.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

# A module of checks has warm_up(), and check(request) that returns {"status", "reason"}.
MODULES = {"math": "services.reward.math.check", "pattern": "services.reward.pool.pattern_checks"}
# A computer algebra system caches; a child is replaced before that counts against an innocent answer.
CHECKS_PER_CHILD = 1000
# Checks in a child's pipe, so that it need not wait for the supervisor between two of them. The pipe must hold
# them all: the supervisor may never wait for a child that hangs.
SENT_CHECKS = 4
SENT_BYTES = 32 << 10
MEMORY_POLL_S = 0.05
# A check that others keep from running has its deadline by the clock, too.
WALL_FACTOR = 8
CHUNK_BYTES = 1 << 16
MAX_REASON_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Behind the checks that are quick; it still has its deadline.
SLOW_NICENESS = 5

Check = Callable[[dict[str, Any]], dict[str, str]]


@dataclass(frozen=True)
class Message:
    """One check as its line for the child."""

    check_id: int
    deadline_s: float
    check: bytes


@dataclass(frozen=True)
class Limits:
    """Memory of a check, and when and how many checks become slow."""

    memory_bytes: int
    slow_s: float
    slow_checks: int


class LineReader:
    """Lines of a pipe as they arrive."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""

    def read_available(self) -> list[bytes] | None:
        """Returns the lines that the next read completes, perhaps none; None when the other side has closed."""
        chunk = os.read(self._descriptor, CHUNK_BYTES)
        if not chunk:
            return None
        # Only what is new is searched: a line of a megabyte comes in many pieces.
        if b"\n" not in chunk:
            self._rest += chunk
            return []
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return lines


class Child:
    """A process and the pipes to it."""

    def __init__(self, pid: int, requests: int, replies: int) -> None:
        self.pid = pid
        self.checks = 0
        self.descriptor = replies
        self._requests = requests
        self.replies = LineReader(replies)

    def send(self, check: bytes) -> None:
        """Hands a line over; that a child is dead shows in its replies."""
        self.checks += 1
        with contextlib.suppress(BrokenPipeError):
            write_all(self._requests, check)

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        os.close(self._requests)
        os.close(self.descriptor)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@dataclass
class WorkerSlot:
    """A child and what it was sent; the first of these is under way since `begin`, of the monotonic clock.

    A check's deadline counts the CPU time of its child, so that a busy machine fails no innocent check; by the clock a
    check may take `WALL_FACTOR` times as long.
    """

    child: Child
    sent: deque[Message] = field(default_factory=deque)
    begin: float = 0.0
    begin_cpu: float = 0.0

    def start_check(self) -> None:
        """Starts the clocks of the next check."""
        self.begin = time.monotonic()
        self.begin_cpu = cpu_seconds(self.child.pid)

    @property
    def end(self) -> float:
        """Earliest moment at which the time of the check under way may be up."""
        return self.begin + float(self.sent[0].deadline_s)

    def is_overdue(self, now: float) -> bool:
        """Returns whether the check under way has used up its CPU time, or waited far too long for it."""
        deadline_s = self.sent[0].deadline_s
        if now < self.begin + deadline_s:
            return False
        is_spent = cpu_seconds(self.child.pid) - self.begin_cpu >= deadline_s
        return is_spent or now >= self.begin + WALL_FACTOR * deadline_s

    def send(self, message: Message) -> None:
        """Hands a check over."""
        if not self.sent:
            self.start_check()
        self.sent.append(message)
        self.child.send(message.check)

    def takes(self, message: Message) -> bool:
        """Returns whether the child's pipe has room for a further check."""
        if not self.sent:
            return True
        size = sum(len(each.check) for each in self.sent) + len(message.check)
        return len(self.sent) < SENT_CHECKS and size <= SENT_BYTES and self.child.checks < CHECKS_PER_CHILD


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
    """Supervises a fast slot, where one check follows the other, and a slot beside it for every slow check."""

    def __init__(self, check: Check, limits: Limits) -> None:
        self._check = check
        self._limits = limits
        self._requests = LineReader(0)
        self._waiting: deque[Message] = deque()
        self._fast = self._open_slot()
        self._slow: list[WorkerSlot] = []

    def serve(self) -> None:
        """Serves until standard input ends."""
        while True:
            self._send_waiting()
            slots = {slot.child.descriptor: slot for slot in self._busy()}
            readable, _, _ = select.select([0, *slots], [], [], self._patience())
            for descriptor in readable:
                if descriptor in slots:
                    self._take_replies(slots[descriptor])
            if 0 in readable and not self._receive():
                return
            self._enforce()

    def end(self) -> None:
        """Kills all children."""
        for slot in [self._fast, *self._slow]:
            slot.child.end()

    def _open_slot(self) -> WorkerSlot:
        return WorkerSlot(fork_child(self._check))

    def _busy(self) -> list[WorkerSlot]:
        return [slot for slot in (self._fast, *self._slow) if slot.sent]

    def _patience(self) -> float | None:
        """Returns how long to wait for what arrives; None while there is nothing to enforce."""
        busy = self._busy()
        if not busy:
            return None
        ends = [slot.end for slot in busy]
        if self._may_become_slow():
            ends.append(self._fast.begin + self._limits.slow_s)
        now = time.monotonic()
        return min([MEMORY_POLL_S, *(end - now for end in ends if end > now)])

    def _may_become_slow(self) -> bool:
        others = len(self._fast.sent) > 1 or self._waiting
        return bool(self._fast.sent and others) and len(self._slow) < self._limits.slow_checks

    def _receive(self) -> bool:
        """Receives what the service sent; returns whether it is still there."""
        lines = self._requests.read_available()
        for line in lines or ():
            message = json.loads(line)
            if "cancel" in message:
                self._cancel(message["cancel"])
            else:
                self._waiting.append(
                    Message(message["id"], message["deadline_s"], json.dumps(message["check"]).encode() + b"\n")
                )
        return lines is not None

    def _cancel(self, check_id: int) -> None:
        """Ends a cancelled check; one that is in a child's pipe already is done, and its reply has no listener."""
        self._waiting = deque(message for message in self._waiting if message.check_id != check_id)
        for slot in self._busy():
            if slot.sent[0].check_id == check_id:
                self._close(slot)

    def _send_waiting(self) -> None:
        if not self._fast.sent and self._fast.child.checks >= CHECKS_PER_CHILD:
            self._close(self._fast)
        while self._waiting and self._fast.takes(self._waiting[0]):
            self._fast.send(self._waiting.popleft())

    def _take_replies(self, slot: WorkerSlot) -> None:
        """Passes replies on; of a child that died instead, the check that was under way has failed."""
        replies = slot.child.replies.read_available()
        for reply in replies or ():
            write_line(1, json.loads(reply) | {"id": slot.sent.popleft().check_id})
            slot.start_check()
            if slot is not self._fast:
                break  # another slot has what it was sent behind the slow check
        if replies is None:
            self._fail(slot, "died", "the checking process died")
        elif slot is not self._fast and not slot.sent:
            self._close(slot)

    def _enforce(self) -> None:
        """Kills what exceeds its time or memory, and makes room beside a slow check."""
        now = time.monotonic()
        for slot in self._busy():
            if slot.is_overdue(now):
                self._fail(slot, "deadline", f"the check did not end within {slot.sent[0].deadline_s:g} s of CPU time")
            elif resident_bytes(slot.child.pid) > self._limits.memory_bytes:
                self._fail(slot, "memory", f"the check took more than {self._limits.memory_bytes >> 20} MiB of memory")
        if self._may_become_slow() and now - self._fast.begin >= self._limits.slow_s:
            slow, self._fast = self._fast, self._open_slot()
            os.setpriority(os.PRIO_PROCESS, slow.child.pid, SLOW_NICENESS)
            self._take_back(slow)
            self._slow.append(slow)

    def _fail(self, slot: WorkerSlot, status: str, reason: str) -> None:
        write_line(1, {"id": slot.sent[0].check_id, "status": status, "reason": reason})
        self._close(slot)

    def _close(self, slot: WorkerSlot) -> None:
        """Kills a slot's child; another does what it was sent behind the check under way."""
        slot.child.end()
        self._take_back(slot)
        if slot is self._fast:
            self._fast = self._open_slot()
        else:
            self._slow.remove(slot)

    def _take_back(self, slot: WorkerSlot) -> None:
        while len(slot.sent) > 1:
            self._waiting.appendleft(slot.sent.pop())


def fork_child(check: Check) -> Child:
    """Forks a child that answers checks until its pipe closes, and dies with this process."""
    request_end, requests = os.pipe()
    replies, reply_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(request_end)
        os.close(reply_end)
        return Child(pid, requests, replies)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    # Whatever the libraries print must not reach the supervisor's pipes.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    kept = {0, 1, 2, request_end, reply_end}
    for descriptor in range(3, 1 + max(kept | {requests, replies})):
        # It may not be open. Other children must see the end of their pipes.
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = LineReader(request_end)
    while (lines := reader.read_available()) is not None:
        for line in lines:
            write_line(reply_end, answer(check, line))
    os._exit(0)


def answer(check: Check, line: bytes) -> dict[str, str]:
    """Returns the reply to one check."""
    try:
        return check(json.loads(line))
    except Exception as error:  # whatever a computer algebra system may raise is the check's outcome
        return {"status": "error", "reason": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]}


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process has taken, in user and system mode; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Returns the memory that a process holds; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def write_line(descriptor: int, message: dict[str, Any]) -> None:
    """Writes one JSON line."""
    write_all(descriptor, json.dumps(message).encode() + b"\n")


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of the data, however the pipe cuts it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main()
