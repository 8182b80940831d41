"""What compilers made of programs, kept in memory, so that a checker or a submission that comes again is not compiled
again.

The key is a digest of all that a compiler sees, and a compiler sees nothing else: its sandbox is new. A program that
runs later has a copy of its own, and cannot change what is kept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.archive import Archive
from services.sandbox.runtime import metrics

LARGEST_BYTES = 32 << 20
"""Files of one program that are kept at most."""


@dataclass(frozen=True)
class Compiled:
    """Result of a compiler, and the working folder that it left."""

    result: pb.CompileResult
    folder: Archive


class CompileCache:
    """Compiled programs by digest; the least recently used make room."""

    def __init__(self, entries: int, total_bytes: int) -> None:
        self._entries = entries
        self._total_bytes = total_bytes
        self._kept: OrderedDict[bytes, tuple[Compiled, int]] = OrderedDict()
        self._kept_bytes = 0
        self._compiling: dict[bytes, asyncio.Event] = {}

    async def find(self, key: bytes) -> Compiled | None:
        """Returns what is kept; waits when another job compiles the same, and returns None when that one fails."""
        if (compiling := self._compiling.get(key)) is not None:
            await compiling.wait()
        if (kept := self._kept.get(key)) is None:
            return None
        self._kept.move_to_end(key)
        metrics.COMPILE_CACHE_HITS.inc()
        return kept[0]

    @contextmanager
    def compiling(self, key: bytes) -> Iterator[None]:
        """Has jobs that look for the key wait until the block ends."""
        ended = asyncio.Event()
        own = self._compiling.setdefault(key, ended) is ended
        try:
            yield
        finally:
            ended.set()
            if own:
                del self._compiling[key]

    def keep(self, key: bytes, result: pb.CompileResult, folder: Archive) -> None:
        """Keeps what a compiler made, unless it is larger than the whole cache."""
        size = sum(len(blob) for blob in folder.blobs) + result.ByteSize()
        if key in self._kept or size > self._total_bytes:
            return
        again = pb.CompileResult(stdout=result.stdout, stderr=result.stderr, status=result.status, cached=True)
        self._kept[key] = (Compiled(again, folder), size)
        self._kept_bytes += size
        while len(self._kept) > self._entries or self._kept_bytes > self._total_bytes:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._kept_bytes -= dropped
