"""Carries a dialogue between two boxes, so that it is known how much was said and who left first."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

PROGRAM, JUDGE = "program", "judge"
_CHUNK_BYTES = 65536


@dataclass
class Dialogue:
    """What is known of a dialogue: who left it, first things first, and whether a side said more than it may."""

    left: list[str] = field(default_factory=list)
    too_much: list[str] = field(default_factory=list)

    @property
    def program_left_first(self) -> bool:
        """Whether the submission closed its output, or its input, before the judge had closed either of its own."""
        return self.left[:1] == [PROGRAM]


class Descriptors:
    """Descriptors that are still ours to close; each is taken by whoever closes it instead."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def open_pipe(self) -> tuple[int, int]:
        """What is read from, and what is written to."""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def take(self, descriptor: int) -> int:
        """One that is no longer ours."""
        self._open.remove(descriptor)
        return descriptor

    def close(self, *descriptors: int) -> None:
        """Closes these."""
        for descriptor in descriptors:
            os.close(self.take(descriptor))

    def close_all(self) -> None:
        """Closes what is left."""
        self.close(*self._open)


@dataclass(frozen=True)
class Ends:
    """Descriptors of the four pipes that the two boxes get."""

    program_stdin: int
    program_stdout: int
    judge_stdin: int
    judge_stdout: int
    owner: Descriptors

    def close(self) -> None:
        """Closes ours, once the boxes have theirs: each side then sees when the other is gone."""
        self.owner.close(self.program_stdin, self.program_stdout, self.judge_stdin, self.judge_stdout)


@asynccontextmanager
async def carrying(program_bytes: int, judge_bytes: int) -> AsyncIterator[tuple[Ends, Dialogue]]:
    """Pipes for both sides, carried for as long as the block lasts.

    What a side says beyond its bytes is not passed on.
    """
    pipes = Descriptors()
    dialogue = Dialogue()
    try:
        (program_in, to_program), (from_program, program_out) = pipes.open_pipe(), pipes.open_pipe()
        (judge_in, to_judge), (from_judge, judge_out) = pipes.open_pipe(), pipes.open_pipe()
        said = _Direction(PROGRAM, from_program, JUDGE, to_judge, program_bytes)
        asked = _Direction(JUDGE, from_judge, PROGRAM, to_program, judge_bytes)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_carry(dialogue, pipes, direction)) for direction in (said, asked)]
            try:
                yield Ends(program_in, program_out, judge_in, judge_out, pipes), dialogue
            finally:
                for task in tasks:
                    task.cancel()
    finally:
        pipes.close_all()


@dataclass(frozen=True)
class _Direction:
    speaker: str
    source: int
    listener: str
    sink: int
    most_bytes: int


async def _carry(dialogue: Dialogue, pipes: Descriptors, direction: _Direction) -> None:
    """One direction, until either side closes its end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
    source = os.fdopen(pipes.take(direction.source), "rb", buffering=0)
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    try:
        sink = os.fdopen(pipes.take(direction.sink), "wb", buffering=0)
        writing, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sink)
        try:
            await _pass_on(dialogue, direction, reader, asyncio.StreamWriter(writing, protocol, None, loop))
        finally:
            writing.close()
    finally:
        reading.close()


async def _pass_on(
    dialogue: Dialogue, direction: _Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    said_bytes = 0
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            said_bytes += len(chunk)
            if said_bytes > direction.most_bytes:
                dialogue.too_much.append(direction.speaker)
                break
            writer.write(chunk)
            await writer.drain()
        dialogue.left.append(direction.speaker)
    except (BrokenPipeError, ConnectionResetError):
        dialogue.left.append(direction.listener)
