"""A process that compares mathematical answers: a supervisor, and a forked child that does the work and may be killed.

The supervisor imports math-verify once and only ever waits, so it cannot hang; a child that exceeds its time or
memory is killed and the next one forked, which takes milliseconds where a new interpreter takes a second. It speaks
JSON lines: {"reference", "answer", "whole_response", "deadline_s"} on standard input, {"status", "reason"} on standard
output.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from services.reward.math_text import prepare_expression, prepare_response

# The computer algebra system caches; a child is replaced before that counts against an innocent answer.
CHECKS_PER_CHILD = 1000
MEMORY_POLL_S = 0.05
MAX_REASON_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Child:
    """A forked process and the pipes to it."""

    pid: int
    requests: int
    replies: int
    checks: int = 0

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        os.close(self.requests)
        os.close(self.replies)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def main() -> None:
    """Serves checks until standard input ends; the only argument is the memory that a child may take, in bytes."""
    memory_bytes = int(sys.argv[1])
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to act on
    compare("\\frac{1}{2}", "0.5", whole_response=False)  # loads everything that the first check would load
    parse_reference.cache_clear()
    gc.collect()
    gc.freeze()
    child = fork_child()
    write_line(1, {"status": "ready"})
    try:
        while line := read_line(0):
            if child.checks >= CHECKS_PER_CHILD:
                child.end()
                child = fork_child()
            reply = supervise(child, line, memory_bytes)
            if reply is None:
                return
            if reply["status"] in ("deadline", "memory", "died"):
                child.end()
                child = fork_child()
            write_line(1, reply)
    finally:
        child.end()


def supervise(child: Child, line: bytes, memory_bytes: int) -> dict[str, Any] | None:
    """The reply to one request; None when the service went away meanwhile."""
    deadline_s: float = json.loads(line)["deadline_s"]
    end = time.monotonic() + deadline_s
    child.checks += 1
    try:
        write_all(child.requests, line)
    except BrokenPipeError:
        return {"status": "died", "reason": "the checking process died"}
    while True:
        left_s = end - time.monotonic()
        if left_s <= 0:
            return {"status": "deadline", "reason": f"the check did not end within {deadline_s:g} s"}
        readable, _, _ = select.select([child.replies, 0], [], [], min(left_s, MEMORY_POLL_S))
        if child.replies in readable:
            reply = read_line(child.replies)
            return json.loads(reply) if reply else {"status": "died", "reason": "the checking process died"}
        if 0 in readable:  # nothing is sent during a check: the service closed the pipe
            return None
        if resident_bytes(child.pid) > memory_bytes:
            return {"status": "memory", "reason": f"the check took more than {memory_bytes >> 20} MiB of memory"}


def fork_child() -> Child:
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
    os.close(requests)
    os.close(replies)
    # Whatever the libraries print must not reach the supervisor's pipes.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    while line := read_line(request_end):
        request = json.loads(line)
        try:
            reply = compare(request["reference"], request["answer"], request["whole_response"])
        except Exception as error:  # whatever a computer algebra system may raise is the check's outcome
            reply = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]}
        write_line(reply_end, reply)
    os._exit(0)


def compare(reference: str, answer: str, whole_response: bool) -> dict[str, str]:
    """Compares two answers; raises whatever math-verify raises, so that a failure is not taken for a difference."""
    from math_verify import verify

    gold = parse_reference(reference)
    if not gold:
        return {"status": "error", "reason": "the reference is not mathematics that can be read"}
    try:
        found = parse_text(prepare_response(answer) if whole_response else prepare_expression(answer))
    except (ValueError, TypeError, SyntaxError):  # how the parser says that it cannot read something
        found = []
    if not found:
        return {"status": "unreadable", "reason": "the answer is not mathematics that can be read"}
    # Timeouts inside use SIGALRM; the supervisor's deadline takes their place.
    equal = verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return {"status": "equal" if equal else "different", "reason": ""}


@lru_cache(maxsize=256)
def parse_reference(text: str) -> list[Any]:
    """The reference, parsed once for the group of responses that share it."""
    return parse_text(prepare_expression(text))


def parse_text(text: str) -> list[Any]:
    """The expressions that math-verify finds in a text; empty when it finds text only."""
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=None, raise_on_error=True)
    return found if any(not isinstance(expression, str) for expression in found) else []


def resident_bytes(pid: int) -> int:
    """Memory that a process holds; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except FileNotFoundError:
        return 0


def read_line(descriptor: int) -> bytes:
    """One line with its end, empty when the other side has closed; one line is on its way at most."""
    chunks = []
    while chunk := os.read(descriptor, 1 << 16):
        chunks.append(chunk)
        if chunk.endswith(b"\n"):
            return b"".join(chunks)
    return b""


def write_line(descriptor: int, message: dict[str, Any]) -> None:
    """One JSON line."""
    write_all(descriptor, json.dumps(message).encode() + b"\n")


def write_all(descriptor: int, data: bytes) -> None:
    """All of the data, however the pipe cuts it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main()
