"""Bounded readers of what a program writes: its output, and a loaded submission's replies."""

from __future__ import annotations

import os

from .child import REPLY_PREFIX

READ_BYTES = 65536


class Capture:
    """Reads a pipe up to a limit, and one byte more to know that it was passed."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self.descriptor = descriptor
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def overflowed(self) -> bool:
        return self._size > self._limit

    def read(self) -> bool:
        """Reads what is there; false at the end of the stream."""
        try:
            part = os.read(self.descriptor, min(READ_BYTES, self._limit + 1 - self._size) or 1)
        except BlockingIOError:
            return True
        if part and not self.overflowed:
            self._parts.append(part)
            self._size += len(part)
        return bool(part)

    def drain(self) -> None:
        """Reads what the process left in the pipe; descendants that still hold it are not waited for."""
        while not self.overflowed:
            before = self._size
            if not self.read() or self._size == before:
                return

    def contents(self) -> bytes:
        return b"".join(self._parts)[: self._limit]


class Reply:
    """Gathers one reply; `broken` when it is not an answer to this request or is longer than the limit."""

    def __init__(self, token: bytes, limit: int) -> None:
        self._token = token
        self._limit = limit
        self._data = b""
        self.broken = self.too_long = self.complete = False
        self.kind = self.payload = b""

    def read_from(self, descriptor: int) -> None:
        """Takes in what has arrived."""
        try:
            self._data += os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return
        if len(self._data) < REPLY_PREFIX.size:
            return
        length, token, kind = REPLY_PREFIX.unpack_from(self._data)
        self.too_long = length > self._limit
        self.broken = token != self._token or self.too_long or len(self._data) > REPLY_PREFIX.size + length
        if not self.broken and len(self._data) == REPLY_PREFIX.size + length:
            self.complete, self.kind, self.payload = True, kind, self._data[REPLY_PREFIX.size :]
