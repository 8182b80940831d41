"""A forked process that does one check after the other, and may be killed at any time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

from services.reward.pool.pipes import LineReader, write_all, write_line

MAX_REASON_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Behind the checks that are quick; it still has its deadline.
ASIDE_NICENESS = 5

Check = Callable[[dict[str, Any]], dict[str, str]]


class Child:
    """A process and the pipes to it."""

    def __init__(self, pid: int, requests: int, replies: int) -> None:
        self.pid = pid
        self.checks = 0
        self.descriptor = replies
        self._requests = requests
        self._replies = LineReader(replies)

    def send(self, check: bytes) -> None:
        """Hands a line over; that a child is dead shows in its replies."""
        self.checks += 1
        with contextlib.suppress(BrokenPipeError):
            write_all(self._requests, check)

    def read_replies(self) -> list[bytes] | None:
        """The replies that are there to be read; None when the child died instead."""
        return self._replies.read_available()

    def step_aside(self) -> None:
        """Lets others go first."""
        os.setpriority(os.PRIO_PROCESS, self.pid, ASIDE_NICENESS)

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        os.close(self._requests)
        os.close(self.descriptor)
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
    reader = LineReader(request_end)
    while (lines := reader.read_available()) is not None:
        for line in lines:
            write_line(reply_end, answer(check, line))
    os._exit(0)


def answer(check: Check, line: bytes) -> dict[str, str]:
    """The reply to one check."""
    try:
        return check(json.loads(line))
    except Exception as error:  # whatever a computer algebra system may raise is the check's outcome
        return {"status": "error", "reason": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]}


def close_quietly(descriptor: int) -> None:
    """Closes a descriptor that may not be open: the pipes of other children, which must see their end."""
    try:
        os.close(descriptor)
    except OSError:
        return


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken, in user and system mode; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0
