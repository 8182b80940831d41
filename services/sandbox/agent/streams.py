"""Standard streams of a program: pipes, as a shell gives them, between the program and the service's memory files.

The kernel moves what they carry (splice), so that no process that outlives the job reads inputs or outputs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from . import kernel

PAUSE_S = 0.002
"""Time for which streams that carry little are left alone, so that not every small write wakes who moves it."""
_PIPE_BYTES = 1 << 16
_LARGE_PIPE_BYTES = 1 << 20
_ANYONES = 0o666


@dataclass
class _Flow:
    source: int
    sink: int
    pipe: int
    most_bytes: int
    moved_bytes: int = 0
    large: bool = False
    ended: bool = False

    def move(self) -> int:
        """Moves what can be moved now; returns how much that was."""
        before = self.moved_bytes
        try:
            while not self.ended and self.moved_bytes < self.most_bytes:
                most = min(_LARGE_PIPE_BYTES, self.most_bytes - self.moved_bytes)
                count = kernel.splice(self.source, None, self.sink, None, most)
                self.moved_bytes += count
                self.ended = not count
                if count >= _PIPE_BYTES and not self.large:
                    self._enlarge()
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the program has closed its input
            self.ended = True
        return self.moved_bytes - before

    def _enlarge(self) -> None:
        self.large = True
        with contextlib.suppress(OSError):  # the user has no more room for pipes
            fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, _LARGE_PIPE_BYTES)


class Streams:
    """Pipes in place of those of the first three descriptors that are files: opening /dev/stdout empties a file, and
    writes from its start.

    `handed` is what the program gets, with `input_is_file` the file of its input itself. Of an output no more than
    `output_bytes` and one byte are moved.
    """

    def __init__(self, descriptors: Sequence[int], output_bytes: int, input_is_file: bool = False) -> None:
        self.handed = list(descriptors)
        self._theirs: list[int] = []
        self._flows: dict[int, _Flow] = {}
        self._pollers: Sequence[select.poll] = ()
        for number, file in enumerate(descriptors[:3]):
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or (number == 0 and input_is_file):
                continue
            reader, writer = os.pipe()
            os.fchmod(reader, _ANYONES)  # so that the program's user can open /dev/stdin and its like
            theirs, ours = (reader, writer) if number == 0 else (writer, reader)
            self.handed[number] = theirs
            self._theirs.append(theirs)
            source, sink, most = (reader, file, output_bytes) if number else (file, writer, status.st_size)
            self._flows[ours] = _Flow(source, sink, ours, most + 1)
        self.move()

    def release(self) -> None:
        """Closes the program's ends, which it has got."""
        while self._theirs:
            os.close(self._theirs.pop())

    def poll(self, poller: select.poll, patient: select.poll) -> None:
        """Has a poller wait for what can be moved, and a patient one for the ends of streams."""
        self._pollers = poller, patient
        for ours, flow in self._flows.items():
            poller.register(ours, select.POLLOUT if ours == flow.sink else select.POLLIN)
            patient.register(ours, 0)

    def move(self) -> bool:
        """Moves what can be moved now; returns whether it was little. Streams that have ended leave the pollers."""
        moved = 0
        for ours, flow in list(self._flows.items()):
            moved += flow.move()
            if flow.ended:
                for poller in self._pollers:
                    poller.unregister(ours)
                del self._flows[ours]
                os.close(ours)
        return 0 < moved < _PIPE_BYTES // 2

    def close(self) -> None:
        """Closes the pipes."""
        self.release()
        while self._flows:
            os.close(self._flows.popitem()[0])
