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


@dataclass(frozen=True)
class Ends:
    """Descriptors of the four pipes that the two boxes get."""

    program_stdin: int
    program_stdout: int
    judge_stdin: int
    judge_stdout: int

    def close(self) -> None:
        """Closes ours: each side then sees when the other is gone."""
        for descriptor in (self.program_stdin, self.program_stdout, self.judge_stdin, self.judge_stdout):
            os.close(descriptor)


@asynccontextmanager
async def carrying(program_bytes: int, judge_bytes: int) -> AsyncIterator[tuple[Ends, Dialogue]]:
    """Pipes for both sides, carried for as long as the block lasts; whoever gets the ends closes them.

    What a side says beyond its bytes is not passed on.
    """
    (program_in, to_program), (from_program, program_out) = os.pipe(), os.pipe()
    (judge_in, to_judge), (from_judge, judge_out) = os.pipe(), os.pipe()
    dialogue = Dialogue()
    async with asyncio.TaskGroup() as group:
        saying = group.create_task(_carry(dialogue, from_program, PROGRAM, to_judge, JUDGE, program_bytes))
        asking = group.create_task(_carry(dialogue, from_judge, JUDGE, to_program, PROGRAM, judge_bytes))
        try:
            yield Ends(program_in, program_out, judge_in, judge_out), dialogue
        finally:
            for task in (saying, asking):
                task.cancel()


async def _carry(dialogue: Dialogue, source: int, speaker: str, sink: int, listener: str, most_bytes: int) -> None:
    """One direction, until either side closes its end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
    reading, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(source, "rb", buffering=0)
    )
    writing, protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(sink, "wb", buffering=0)
    )
    writer = asyncio.StreamWriter(writing, protocol, None, loop)
    said_bytes = 0
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            said_bytes += len(chunk)
            if said_bytes > most_bytes:
                dialogue.too_much.append(speaker)
                break
            writer.write(chunk)
            await writer.drain()
        dialogue.left.append(speaker)
    except (BrokenPipeError, ConnectionResetError):
        dialogue.left.append(listener)
    finally:
        reading.close()
        writer.close()
