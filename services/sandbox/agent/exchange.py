"""Exchange of inputs and replies with a process that answers many questions, one after another."""

from __future__ import annotations

import os
import select

from . import kernel
from .archive import INPUT_PREFIX, LOADED, REPLY_PREFIX

_PART_BYTES = 1 << 16
_MOST_BYTES = 64 << 20
"""Bytes of all replies of a process, all of which the service reads."""


class ReplyTooLongError(Exception):
    """A reply announces more bytes than it, or all replies together, may have."""


class Exchange:
    """Hands out one input at a time, when the reply before it is complete, and keeps replies where the process that
    wrote them cannot change them. The first reply, whether the submission has loaded, has no input.

    Bytes go from file to pipe and from pipe to file inside the kernel: of what belongs to a job only the lengths of
    inputs and the heads of replies are read here.
    """

    ended = False
    """Whether every input is answered, or the submission has not loaded."""

    def __init__(self, replies: int, inputs: int, most_bytes: int) -> None:
        self._replies_file, self._inputs_file = replies, inputs
        self._most_bytes = most_bytes
        self._replies, self._process_replies = os.pipe()
        self._process_inputs, self._inputs = os.pipe()
        self._written = self._start = 0
        self._sent = self._end_of_input = 0
        self._watched: dict[int, int] = {}
        self._open = True
        self._loaded = False

    @property
    def process_ends(self) -> list[int]:
        """Descriptors for the process: where it writes replies and where it reads inputs."""
        return [self._process_replies, self._process_inputs]

    def close_process_ends(self) -> None:
        """Closes the descriptors that the process has by now."""
        for descriptor in self.process_ends:
            os.close(descriptor)

    def receive(self) -> bool:
        """Moves what has come of the next reply to its file; returns whether it is complete.

        Raises ReplyTooLongError.
        """
        if self.ended:
            return False
        while (end := self._find_end()) is None or self._written < end:
            try:
                moved = kernel.splice(self._replies, None, self._replies_file, self._written, _PART_BYTES)
            except BlockingIOError:
                return False
            if not moved:
                self._open = False
                return False
            self._written += moved
        self._start = end
        return True

    def _find_end(self) -> int | None:
        """Returns where the reply ends, once its head has come."""
        if self._written < self._start + REPLY_PREFIX.size:
            return None
        length, kind = REPLY_PREFIX.unpack(os.pread(self._replies_file, REPLY_PREFIX.size, self._start))
        if length > min(self._most_bytes, _MOST_BYTES - self._start):
            raise ReplyTooLongError(f"a reply of {length} bytes")
        if self._start == 0:
            self._loaded = kind == LOADED
        return self._start + REPLY_PREFIX.size + int(length)

    def send_next(self) -> None:
        """Begins to send the next input; after the last one the process reads the end of the pipe."""
        prefix = os.pread(self._inputs_file, INPUT_PREFIX.size, self._end_of_input)
        if prefix and self._loaded:
            self._end_of_input += INPUT_PREFIX.size + INPUT_PREFIX.unpack(prefix)[0]
            self.send()
        else:
            os.close(self._inputs)
            self._sent, self.ended = self._end_of_input, True

    def send(self) -> None:
        """Sends as much of the input as the pipe takes."""
        while self._sent < self._end_of_input:
            left = min(self._end_of_input - self._sent, _PART_BYTES)
            try:
                self._sent += kernel.splice(self._inputs_file, self._sent, self._inputs, None, left)
            except BlockingIOError:
                return
            except BrokenPipeError:  # the process has closed its end
                self._sent = self._end_of_input

    def watch(self, poller: select.poll) -> None:
        """Has `poller` wait for what can be moved next."""
        wanted = {self._replies: select.POLLIN} if self._open and not self.ended else {}
        if self._sent < self._end_of_input:
            wanted[self._inputs] = select.POLLOUT
        if wanted != self._watched:
            for descriptor in self._watched:
                poller.unregister(descriptor)
            for descriptor, event in wanted.items():
                poller.register(descriptor, event)
            self._watched = wanted

    def is_ready(self, ready: set[int]) -> bool:
        """Returns whether something can be moved, given the descriptors that are ready."""
        return self._replies in ready or self._inputs in ready

    def close(self) -> None:
        """Closes this side of the pipes."""
        os.close(self._replies)
        if not self.ended:
            os.close(self._inputs)
