"""A forked process that does one check after the other, and may be killed at any time."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.reward.pipes import read_line, write_all, write_line

MAX_REASON_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Behind the checks that are quick; it still has its deadline.
ASIDE_NICENESS = 5

Check = Callable[[dict[str, Any]], dict[str, str]]


@dataclass
class Child:
    """A process and the pipes to it."""

    pid: int
    requests: int
    replies: int
    checks: int = 0
    is_slow: bool = False

    def send(self, check: dict[str, Any]) -> bool:
        """Hands a check over; False when the child is dead."""
        self.checks += 1
        try:
            write_all(self.requests, json.dumps(check).encode() + b"\n")
        except BrokenPipeError:
            return False
        return True

    def read_reply(self) -> dict[str, Any] | None:
        """The reply that is there to be read; None when the child died instead."""
        line = read_line(self.replies)
        reply: dict[str, Any] | None = json.loads(line) if line else None
        return reply

    def step_aside(self) -> None:
        """Lets others go first."""
        self.is_slow = True
        os.setpriority(os.PRIO_PROCESS, self.pid, ASIDE_NICENESS)

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        os.close(self.requests)
        os.close(self.replies)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def fork_child(check: Check) -> Child:
    """A child that answers checks until its pipe closes, and dies with this process."""
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
        if descriptor not in kept:
            close_quietly(descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := read_line(request_end):
        try:
            reply = check(json.loads(line))
        except Exception as error:  # whatever a computer algebra system may raise is the check's outcome
            reply = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]}
        write_line(reply_end, reply)
    os._exit(0)


def close_quietly(descriptor: int) -> None:
    """Closes a descriptor that may not be open: the pipes of other children, which must see their end."""
    try:
        os.close(descriptor)
    except OSError:
        return


def resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0
