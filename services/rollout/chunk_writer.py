"""Appends chunks of many trajectories to the buffer with few calls, and tells each writer when its own is durable."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2
from services.rollout.generation import SegmentChunk
from services.rollout.metrics import APPEND_SECONDS

# A token takes at most 9 bytes in a chunk, a chunk's other fields a few hundred: this stays below half a message.
MAX_BATCH_TOKENS = 128 << 10
MAX_BATCH_CHUNKS = 2048
DURABLE = {buffer_pb2.APPEND_OUTCOME_APPENDED, buffer_pb2.APPEND_OUTCOME_DUPLICATE}


class AppendRefusedError(Exception):
    """The buffer did not take a chunk: another lease holds the trajectory, or the chunk does not fit what is there."""


@dataclass(frozen=True)
class _Waiting:
    chunk: buffer_pb2.Chunk
    durable: asyncio.Future[None]


class ChunkWriter:
    """One call's way to the buffer; `run` must be running while `append` is awaited.

    One append is in flight at a time, so chunks of a trajectory arrive in order. While it is, further chunks gather.
    """

    def __init__(self, buffer: BufferClient, run_id: str, flush_seconds: float, timeout_seconds: float) -> None:
        self._buffer = buffer
        self._run_id = run_id
        self._flush_seconds = flush_seconds
        self._timeout_seconds = timeout_seconds
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(MAX_BATCH_CHUNKS)
        self.writers = 0
        """Trajectories that may still append: when all of them wait, there is nothing to wait for."""

    async def append(self, trajectory_id: str, epoch: int, chunk: SegmentChunk) -> None:
        """Returns when the chunk is durable.

        Raises AppendRefusedError when the buffer refuses it, and the buffer's error when the call fails.
        """
        message = buffer_pb2.Chunk(
            trajectory_id=trajectory_id,
            epoch=epoch,
            offset=chunk.offset,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            versions=[
                buffer_pb2.VersionSpan(policy_version=span.policy_version, tokens=span.tokens)
                for span in chunk.versions
            ],
            end_reason=buffer_pb2.EndReason.ValueType(chunk.end_reason or 0),
        )
        waiting = _Waiting(message, asyncio.get_running_loop().create_future())
        await self._queue.put(waiting)
        await waiting.durable

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            batch = await self._gather()
            request = buffer_pb2.AppendChunksRequest(run_id=self._run_id, chunks=[waiting.chunk for waiting in batch])
            try:
                with APPEND_SECONDS.time():
                    response = await self._buffer.append_chunks(request, timeout_s=self._timeout_seconds)
            except Exception as error:
                for waiting in batch:
                    _fail(waiting.durable, error)
                continue
            for waiting, outcome in zip(batch, response.outcomes, strict=True):
                if outcome in DURABLE:
                    _succeed(waiting.durable)
                else:
                    name = buffer_pb2.AppendOutcome.Name(outcome).removeprefix("APPEND_OUTCOME_").lower()
                    _fail(waiting.durable, AppendRefusedError(f"the buffer refused the tokens: {name}"))

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        tokens = len(batch[0].chunk.token_ids)
        deadline = asyncio.get_running_loop().time() + self._flush_seconds
        while tokens < MAX_BATCH_TOKENS and len(batch) < min(self.writers, MAX_BATCH_CHUNKS):
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
            tokens += len(batch[-1].chunk.token_ids)
        return batch


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
