"""Continues leased trajectories: tokens come from and go to the buffer, the caller receives the ends of segments."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from prometheus_client import Histogram

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.buffer.packing import ITEM_BYTES, count_tokens, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.server import end_tasks
from services.kit.telemetry import get_logger
from services.kit.tracing import describe, span
from services.rollout.engine import EngineDiedError, RequestAbortedError
from services.rollout.images import PreparedPrompt
from services.rollout.segment import (
    MAX_CHUNK_BYTES,
    Emit,
    Segment,
    SegmentSettings,
    bound_text,
    end_reason_label,
    generate_segment,
    merge,
    plan_end,
)
from services.rollout.worker import DRAINING, SEGMENTS, Admission, Worker

log = get_logger(__name__)

APPEND_SECONDS = Histogram("perigee_rollout_append_seconds", "Seconds of an append to the buffer.")

# A chunk's other fields take a few hundred bytes.
MAX_BATCH_CHUNKS = 2048
# Size beyond which a message of results gets no further one.
MAX_RESPONSE_BYTES = 1 << 20
INTERRUPT_EVERY_S = 0.1
DURABLE = {buffer_pb2.APPEND_OUTCOME_APPENDED, buffer_pb2.APPEND_OUTCOME_DUPLICATE}

SegmentResult = pb.SegmentEnd | pb.SegmentFailure
# Chunk that waits for its append, and what its writer waits for.
PendingChunk = tuple[buffer_pb2.Chunk, asyncio.Future[None]]


# Of an image that is none, is not in the buffer, or is not what was put there: others of the call are not concerned.
UNREADABLE = (InvalidArgumentError, NotFoundError, DataLossError, AbortedError)


class AppendRefusedError(Exception):
    """Raised when the buffer refuses a chunk: another lease holds the trajectory, or other tokens are there."""


async def extend_trajectories(
    worker: Worker, buffer: BufferClient, request: pb.ExtendTrajectoriesRequest, settings: SegmentSettings
) -> AsyncGenerator[list[SegmentResult], None]:
    """Extends each trajectory of the request by a segment; yields ends and failures as they come, one per trajectory.

    Raises FailedPreconditionError when the worker does not hold the policy version, DataLossError when the buffer does
    not find tokens that it has had, ResourceExhaustedError when it has
    too much to do, the buffer's error when it cannot be reached, and UnavailableError when the worker shuts down, after
    the tokens that there were have reached the buffer.
    """
    worker.check_ready(request.run_id, request.policy_version)
    worker.max_kv_staleness = request.max_kv_staleness
    writer = ChunkWriter(buffer, request.run_id, worker.config.flush_seconds, worker.config.buffer_timeout_seconds)
    with worker.admit(len(request.trajectories)) as admission:
        call = _Call(worker, buffer, writer, request, settings, admission)
        writing = asyncio.create_task(writer.run())
        interrupting = asyncio.create_task(call.interrupt_when_draining())
        start, failures = time.monotonic(), 0
        try:
            async with aclosing(merge([call.run])) as batches:
                async for batch in batches:
                    reasons = Counter(result.reason for result in batch if isinstance(result, pb.SegmentFailure))
                    failures += reasons.total()
                    for reason, count in reasons.items():
                        log.warning("segments failed", segments=count, reason=reason)
                    yield batch
            log.info(
                "segments ended",
                run=request.run_id,
                policy_version=request.policy_version,
                segments=len(request.trajectories),
                failures=failures,
                seconds=round(time.monotonic() - start, 3),
            )
        finally:
            writing.cancel()
            await asyncio.wait([writing])
            await end_tasks(interrupting)


@dataclass(eq=False)
class _Call:
    """One ExtendTrajectories call in flight."""

    worker: Worker
    buffer: BufferClient
    writer: ChunkWriter
    request: pb.ExtendTrajectoriesRequest
    settings: SegmentSettings
    admission: Admission
    number: int = field(default_factory=itertools.count().__next__)
    running: set[str] = field(default_factory=set)
    """Ids of the segments in the engine."""
    handed_back: int = 0
    """Trajectories whose segments the worker's shutdown cut short."""

    async def run(self, emit: Emit[SegmentResult]) -> None:
        """Starts each trajectory as soon as its tokens are read."""
        leases = {lease.trajectory_id: lease for lease in self.request.trajectories}
        self.writer.writers = len(leases)
        async with aclosing(self._read(leases)) as stored, asyncio.TaskGroup() as group:
            async for trajectory in stored:
                group.create_task(self._extend(leases[trajectory.trajectory_id], trajectory, emit))
        if self.handed_back:
            raise UnavailableError(
                f"Worker {self.worker.worker_id} shuts down and hands {self.handed_back} trajectories back."
            )

    async def _read(self, leases: Mapping[str, pb.LeasedTrajectory]) -> AsyncGenerator[StoredTrajectory, None]:
        """Yields the trajectories as far as they are generated."""
        timeout_s, tokens = self.worker.config.buffer_timeout_seconds, sum(lease.tokens for lease in leases.values())
        stored = self.buffer.read_trajectories(self.request.run_id, list(leases), timeout_s=timeout_s, tokens=tokens)
        try:
            async for trajectory in stored:
                yield trajectory
        except FailedPreconditionError as error:  # which a call gives for other weights
            raise DataLossError(error.message) from error

    async def interrupt_when_draining(self) -> None:
        """Ends the segments once the worker drains, with the tokens that they have; runs until cancelled."""
        while self.worker.status != DRAINING:
            await self.worker.wait_change()
        while True:
            await self.worker.engine.interrupt(list(self.running))
            await asyncio.sleep(INTERRUPT_EVERY_S)  # one on its way into the engine is not seen there yet

    async def _extend(
        self, lease: pb.LeasedTrajectory, trajectory: StoredTrajectory, emit: Emit[SegmentResult]
    ) -> None:
        """Extends one trajectory and emits how that ended."""
        result: SegmentResult
        segment_id = f"{lease.trajectory_id}/{lease.epoch}/{self.number}"
        self.running.add(segment_id)
        try:
            with span("segment", trajectory=lease.trajectory_id, offset=trajectory.tokens) as opened:
                result = await self._generate(segment_id, lease, trajectory)
                if isinstance(result, pb.SegmentEnd):
                    describe(opened, tokens=result.new_tokens, end=end_reason_label(result.end_reason))
        except (EngineDiedError, AppendRefusedError) as error:
            result = pb.SegmentFailure(trajectory_id=lease.trajectory_id, reason=str(error))
            if isinstance(error, RequestAbortedError) and self.worker.status == DRAINING:
                self.handed_back += 1
                return
        finally:
            self.running.remove(segment_id)
            self.writer.writers -= 1
            self.admission.leave()
        SEGMENTS.labels(end_reason_label(result.end_reason) if isinstance(result, pb.SegmentEnd) else "failed").inc()
        await emit(result)

    async def _generate(
        self, segment_id: str, lease: pb.LeasedTrajectory, trajectory: StoredTrajectory
    ) -> SegmentResult:
        """Generates a segment into the buffer; raises EngineDiedError and AppendRefusedError."""
        if reason := refusal(lease, trajectory):
            return pb.SegmentFailure(trajectory_id=lease.trajectory_id, reason=reason)
        images = self.worker.images.prepared(trajectory.prompt_token_ids, trajectory.image_digests, self._read_image)
        try:
            async with images as prompt:
                return await self._generate_from(prompt, segment_id, lease, trajectory)
        except UNREADABLE as error:
            return pb.SegmentFailure(trajectory_id=lease.trajectory_id, reason=error.message)

    async def _generate_from(
        self, prompt: PreparedPrompt, segment_id: str, lease: pb.LeasedTrajectory, trajectory: StoredTrajectory
    ) -> SegmentResult:
        """Generates a segment of a prompt that is ready into the buffer."""
        worker, tokens = self.worker, len(prompt.expanded_ids)
        if (room := worker.model.context_tokens - tokens) < 1:
            reason = f"the prompt of {tokens} tokens leaves no room in the context"
            return pb.SegmentFailure(trajectory_id=lease.trajectory_id, reason=reason)
        if worker.status == DRAINING:
            raise RequestAbortedError("the worker shuts down")
        segment = self._plan_segment(segment_id, lease, trajectory, room)
        segment.prompt = prompt
        end_reason = segment.end_reason
        token_ids = bytearray(trajectory.token_ids)
        async with aclosing(generate_segment(worker.engine, segment, self.settings)) as chunks:
            async for chunk in chunks:
                token_ids += chunk.token_ids
                end_reason = chunk.end_reason or end_reason
                worker.count_generated(count_tokens(chunk.token_ids))
                # A partial trajectory without new tokens is in the buffer as it stands.
                if chunk.token_ids or end_reason != buffer_pb2.END_REASON_BUDGET:
                    chunk.epoch = lease.epoch
                    await self.writer.append(chunk)
        is_partial = end_reason == buffer_pb2.END_REASON_BUDGET
        text = "" if is_partial else worker.model.decode(unpack_token_ids(bytes(token_ids)))
        bounded, left_out_bytes = bound_text(text)
        return pb.SegmentEnd(
            trajectory_id=lease.trajectory_id,
            end_reason=end_reason,
            tokens=len(token_ids) // ITEM_BYTES,
            new_tokens=(len(token_ids) - len(trajectory.token_ids)) // ITEM_BYTES,
            text=bounded,
            left_out_bytes=left_out_bytes,
            cached_tokens=segment.cached_tokens,
            prefilled_tokens=segment.prefilled_tokens,
        )

    async def _read_image(self, digest: str) -> bytes:
        """Returns the file of an image in the buffer; raises NotFoundError when it is gone."""
        timeout_s = self.worker.config.buffer_timeout_seconds
        async for _, data in self.buffer.read_images(self.request.run_id, [digest], timeout_s=timeout_s):
            return data
        raise NotFoundError(f"the buffer sent no image {digest}")

    def _plan_segment(
        self, segment_id: str, lease: pb.LeasedTrajectory, trajectory: StoredTrajectory, room: int
    ) -> Segment:
        """Returns the segment to generate in a context with `room` tokens beside the prompt."""
        end_tokens, end_reason = plan_end(
            stored=trajectory.tokens,
            leased=lease.tokens,
            budget=lease.token_budget or self.request.token_budget,
            cap=self.request.max_response_tokens,
            room=room,
        )
        return Segment(
            segment_id=segment_id,
            item_id=lease.trajectory_id,
            prompt_token_ids=trajectory.prompt_token_ids,
            response_token_ids=trajectory.token_ids,
            end_tokens=end_tokens,
            end_reason=end_reason,
        )


def pack_results(results: Iterable[SegmentResult], generated: int) -> Iterator[pb.ExtendTrajectoriesResponse]:
    """Yields messages with the results, in order; the texts of many long responses would not fit into one.

    `generated` counts the tokens of the call before them.
    """
    response = pb.ExtendTrajectoriesResponse(generated_tokens=generated)
    for result in results:
        is_begun = response.ended or response.failed
        if is_begun and response.ByteSize() + result.ByteSize() > MAX_RESPONSE_BYTES:
            yield response
            response = pb.ExtendTrajectoriesResponse(generated_tokens=response.generated_tokens)
        if isinstance(result, pb.SegmentEnd):
            response.generated_tokens += result.new_tokens
            response.ended.append(result)
        else:
            response.failed.append(result)
    if response.ended or response.failed:
        yield response


def refusal(lease: pb.LeasedTrajectory, trajectory: StoredTrajectory) -> str | None:
    """Returns why a trajectory cannot be continued; None when it can."""
    if trajectory.epoch != lease.epoch:
        return f"the trajectory is leased again: epoch {trajectory.epoch}, not {lease.epoch}"
    if trajectory.finished:
        return "the response has ended"
    if trajectory.tokens < lease.tokens:
        return f"the buffer holds {trajectory.tokens} of the {lease.tokens} tokens that were leased"
    if not trajectory.prompt_token_ids:
        return "the prompt is empty"
    return None


class ChunkWriter:
    """Appends the chunks of many trajectories to the buffer with few calls; `run` must run while `append` is awaited.

    One append is in flight at a time, so chunks of a trajectory arrive in order. While it is, further chunks gather.
    """

    def __init__(self, buffer: BufferClient, run_id: str, flush_seconds: float, timeout_seconds: float) -> None:
        self._buffer = buffer
        self._run_id = run_id
        self._flush_seconds = flush_seconds
        self._timeout_seconds = timeout_seconds
        self._queue: asyncio.Queue[PendingChunk] = asyncio.Queue(MAX_BATCH_CHUNKS)
        self.writers = 0
        """Trajectories that may still append: when all of them wait, there is nothing to wait for."""

    async def append(self, chunk: buffer_pb2.Chunk) -> None:
        """Returns when the chunk is durable.

        Raises AppendRefusedError when the buffer refuses it, and the buffer's error when the call fails.
        """
        durable = asyncio.get_running_loop().create_future()
        await self._queue.put((chunk, durable))
        await durable

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            batch = await self._gather()
            request = buffer_pb2.AppendChunksRequest(run_id=self._run_id, chunks=[chunk for chunk, _ in batch])
            try:
                with APPEND_SECONDS.time():
                    response = await self._buffer.append_chunks(request, timeout_s=self._timeout_seconds)
                _report_outcomes(batch, response.outcomes)
            except Exception as error:
                for _, durable in batch:
                    _fail(durable, error)

    async def _gather(self) -> list[PendingChunk]:
        """Waits for a chunk, then for those of the other writers, until the flush is due or the batch is full."""
        batch = [await self._queue.get()]
        size = _count_bytes(batch[0][0])
        deadline = asyncio.get_running_loop().time() + self._flush_seconds
        while size < MAX_CHUNK_BYTES and len(batch) < min(self.writers, MAX_BATCH_CHUNKS):
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
            size += _count_bytes(batch[-1][0])
        return batch


def _count_bytes(chunk: buffer_pb2.Chunk) -> int:
    return len(chunk.token_ids) + len(chunk.logprobs) + len(chunk.experts)


def _report_outcomes(batch: Sequence[PendingChunk], outcomes: Sequence[buffer_pb2.AppendOutcome.ValueType]) -> None:
    """Resolves the writers' futures."""
    for (_, durable), outcome in zip(batch, outcomes, strict=True):
        if outcome not in DURABLE:
            name = buffer_pb2.AppendOutcome.Name(outcome).removeprefix("APPEND_OUTCOME_").lower()
            _fail(durable, AppendRefusedError(f"the buffer refused the tokens: {name}"))
        elif not durable.done():
            durable.set_result(None)


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
