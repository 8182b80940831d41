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
from dataclasses import dataclass, field
from importlib import import_module

from services.reward.pool.check_child import Check, Child, cpu_seconds, fork_child, resident_bytes
from services.reward.pool.pipes import LineReader, write_line

# What a module of checks offers: warm_up(), and check(request) that gives {"status", "reason"}.
MODULES = {"math": "services.reward.math.check", "pattern": "services.reward.pool.pattern_checks"}
# A computer algebra system caches; a child is replaced before that counts against an innocent answer.
CHECKS_PER_CHILD = 1000
# Checks in a child's pipe, so that it need not wait for the supervisor's turn between two of them. The pipe must hold
# them all: the supervisor may never wait for a child that hangs.
SENT_CHECKS = 4
SENT_BYTES = 32 << 10
MEMORY_POLL_S = 0.05
# A check that others keep from running has its deadline by the clock, too.
WALL_FACTOR = 8


@dataclass(frozen=True)
class Message:
    """One check as its line for the child."""

    check_id: int
    deadline_s: float
    check: bytes


@dataclass(frozen=True)
class Limits:
    """What a check may take, and when and how many of them step aside."""

    memory_bytes: int
    slow_s: float
    slow_checks: int


@dataclass
class Lane:
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
        """Whether the check under way has used up its CPU time, or waited far too long for it."""
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
        """Whether the child's pipe has room for a further check."""
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
    """A lane in front, where one check follows the other, and a lane beside it for every slow check."""

    def __init__(self, check: Check, limits: Limits) -> None:
        self._check = check
        self._limits = limits
        self._requests = LineReader(0)
        self._waiting: deque[Message] = deque()
        self._front = self._open_lane()
        self._aside: list[Lane] = []

    def serve(self) -> None:
        """Until standard input ends."""
        while True:
            self._send_waiting()
            lanes = {lane.child.descriptor: lane for lane in self._busy()}
            readable, _, _ = select.select([0, *lanes], [], [], self._patience())
            for descriptor in readable:
                if descriptor in lanes:
                    self._take_replies(lanes[descriptor])
            if 0 in readable and not self._receive():
                return
            self._enforce()

    def end(self) -> None:
        """Kills all children."""
        for lane in [self._front, *self._aside]:
            lane.child.end()

    def _open_lane(self) -> Lane:
        return Lane(fork_child(self._check))

    def _busy(self) -> list[Lane]:
        return [lane for lane in (self._front, *self._aside) if lane.sent]

    def _patience(self) -> float | None:
        """How long nothing needs to be done unless something arrives."""
        busy = self._busy()
        if not busy:
            return None
        ends = [lane.end for lane in busy]
        if self._may_step_aside():
            ends.append(self._front.begin + self._limits.slow_s)
        now = time.monotonic()
        return min([MEMORY_POLL_S, *(end - now for end in ends if end > now)])

    def _may_step_aside(self) -> bool:
        others = len(self._front.sent) > 1 or self._waiting
        return bool(self._front.sent and others) and len(self._aside) < self._limits.slow_checks

    def _receive(self) -> bool:
        """Takes what the service sent; whether it is still there."""
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
        """Ends a check that nobody waits for; one that stands in a child's pipe has its turn and no listener."""
        self._waiting = deque(message for message in self._waiting if message.check_id != check_id)
        for lane in self._busy():
            if lane.sent[0].check_id == check_id:
                self._close(lane)

    def _send_waiting(self) -> None:
        if not self._front.sent and self._front.child.checks >= CHECKS_PER_CHILD:
            self._close(self._front)
        while self._waiting and self._front.takes(self._waiting[0]):
            self._front.send(self._waiting.popleft())

    def _take_replies(self, lane: Lane) -> None:
        """Passes replies on; a child that died instead has the check that was under way on its conscience."""
        replies = lane.child.read_replies()
        for reply in replies or ():
            write_line(1, json.loads(reply) | {"id": lane.sent.popleft().check_id})
            lane.start_check()
            if lane is not self._front:
                break  # what it was sent behind the slow check is with another by now
        if replies is None:
            self._fail(lane, "died", "the checking process died")
        elif lane is not self._front and not lane.sent:
            self._close(lane)

    def _enforce(self) -> None:
        """Kills what exceeds its time or memory, and lets a slow check step aside."""
        now = time.monotonic()
        for lane in self._busy():
            if lane.is_overdue(now):
                self._fail(lane, "deadline", f"the check did not end within {lane.sent[0].deadline_s:g} s of CPU time")
            elif resident_bytes(lane.child.pid) > self._limits.memory_bytes:
                self._fail(lane, "memory", f"the check took more than {self._limits.memory_bytes >> 20} MiB of memory")
        if self._may_step_aside() and now - self._front.begin >= self._limits.slow_s:
            slow, self._front = self._front, self._open_lane()
            slow.child.step_aside()
            self._take_back(slow)
            self._aside.append(slow)

    def _fail(self, lane: Lane, status: str, reason: str) -> None:
        write_line(1, {"id": lane.sent[0].check_id, "status": status, "reason": reason})
        self._close(lane)

    def _close(self, lane: Lane) -> None:
        """Kills a lane's child; what it was sent behind the check under way is done by another."""
        lane.child.end()
        self._take_back(lane)
        if lane is self._front:
            self._front = self._open_lane()
        else:
            self._aside.remove(lane)

    def _take_back(self, lane: Lane) -> None:
        while len(lane.sent) > 1:
            self._waiting.appendleft(lane.sent.pop())


if __name__ == "__main__":
    main()
