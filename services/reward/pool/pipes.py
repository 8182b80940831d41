"""JSON lines through pipes."""

from __future__ import annotations

import json
import os
from typing import Any

CHUNK_BYTES = 1 << 16


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


def write_line(descriptor: int, message: dict[str, Any]) -> None:
    """One JSON line."""
    write_all(descriptor, json.dumps(message).encode() + b"\n")


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of the data, however the pipe cuts it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
