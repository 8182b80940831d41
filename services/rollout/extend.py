"""Continues leased trajectories: tokens come from and go to the buffer, the caller hears of segments that ended."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2
from services.kit.telemetry import get_logger
from services.rollout.chunk_writer import AppendRefusedError, ChunkWriter
from services.rollout.engine import EngineDiedError
from services.rollout.generation import EndReason, Segment, SegmentSettings, generate_segment, plan_end
from services.rollout.merging import Emit, merge
from services.rollout.metrics import CACHED_TOKENS, GENERATED_TOKENS, SEGMENTS
from services.rollout.worker import Admission, Worker

log = get_logger(__name__)

_calls = itertools.count()


@dataclass(frozen=True)
class LeasedTrajectory:
    """A trajectory that the caller leased for this worker."""

    trajectory_id: str
    epoch: int
    tokens: int
    """Response tokens that the buffer held when it was leased."""


@dataclass(frozen=True)
class ExtendSettings:
    """What the trajectories of one call share."""

    run_id: str
    policy_version: int
    token_budget: int
    max_response_tokens: int
    segment: SegmentSettings


@dataclass(frozen=True)
class SegmentEnd:
    """A segment whose tokens are durable."""

    trajectory_id: str
    end_reason: EndReason
    tokens: int
    new_tokens: int
    text: str
    cached_tokens: int


@dataclass(frozen=True)
class SegmentFailure:
    """A segment that could not be finished; what the buffer holds stands."""

    trajectory_id: str
    reason: str


@dataclass
class HeldTrajectory:
    """What the buffer holds of a trajectory."""

    trajectory_id: str
    prompt_token_ids: list[int] = field(default_factory=list)
    response_token_ids: list[int] = field(default_factory=list)
    end_reason: int = 0
    epoch: int = 0


async def extend_trajectories(
    worker: Worker, buffer: BufferClient, leased: Sequence[LeasedTrajectory], settings: ExtendSettings
) -> AsyncGenerator[list[SegmentEnd | SegmentFailure], None]:
    """Ends and failures as they come, one per trajectory.

    Raises FailedPreconditionError when the worker does not hold the policy version, ResourceExhaustedError when it has
    too much to do, and the buffer's error when it cannot be reached.
    """
    worker.check_ready(settings.run_id, settings.policy_version)
    writer = ChunkWriter(buffer, settings.run_id, worker.config.flush_seconds, worker.config.buffer_timeout_seconds)
    with worker.admit(len(leased)) as admission:
        call = _Call(worker, buffer, writer, settings, admission, next(_calls))
        writing = asyncio.create_task(writer.run())
        start, failures = time.monotonic(), 0
        try:
            async with aclosing(merge([partial(call.run, leased)])) as batches:
                async for batch in batches:
                    for result in batch:
                        if isinstance(result, SegmentFailure):
                            failures += 1
                            log.warning("segment failed", trajectory=result.trajectory_id, reason=result.reason)
                    yield batch
            log.info(
                "segments ended",
                run=settings.run_id,
                policy_version=settings.policy_version,
                segments=len(leased),
                failures=failures,
                seconds=round(time.monotonic() - start, 3),
            )
        finally:
            writing.cancel()
            await asyncio.wait([writing])


class _Call:
    """One ExtendTrajectories call in flight."""

    def __init__(
        self,
        worker: Worker,
        buffer: BufferClient,
        writer: ChunkWriter,
        settings: ExtendSettings,
        admission: Admission,
        number: int,
    ) -> None:
        self._worker = worker
        self._buffer = buffer
        self._writer = writer
        self._settings = settings
        self._admission = admission
        self._number = number

    async def run(self, leased: Sequence[LeasedTrajectory], emit: Emit[SegmentEnd | SegmentFailure]) -> None:
        """Starts each trajectory as soon as its tokens are read."""
        leases = {lease.trajectory_id: lease for lease in leased}
        self._writer.writers = len(leases)
        async with asyncio.TaskGroup() as group:
            async for held in read_trajectories(
                self._buffer, self._settings.run_id, list(leases), self._worker.config.buffer_timeout_seconds
            ):
                group.create_task(self._extend(leases.pop(held.trajectory_id), held, emit))
            for trajectory_id in leases:
                await self._end(SegmentFailure(trajectory_id, "the buffer does not hold the trajectory"), emit)

    async def _extend(
        self, lease: LeasedTrajectory, held: HeldTrajectory, emit: Emit[SegmentEnd | SegmentFailure]
    ) -> None:
        try:
            await self._end(await self._generate(lease, held), emit)
        except (EngineDiedError, AppendRefusedError) as error:
            await self._end(SegmentFailure(lease.trajectory_id, str(error)), emit)

    async def _end(self, result: SegmentEnd | SegmentFailure, emit: Emit[SegmentEnd | SegmentFailure]) -> None:
        self._writer.writers -= 1
        self._admission.leave()
        name = result.end_reason.name.lower() if isinstance(result, SegmentEnd) else "failed"
        SEGMENTS.labels(name).inc()
        await emit(result)

    async def _generate(self, lease: LeasedTrajectory, held: HeldTrajectory) -> SegmentEnd | SegmentFailure:
        settings, worker = self._settings, self._worker
        response = held.response_token_ids
        room = worker.model.context_tokens - len(held.prompt_token_ids)
        if reason := refusal(lease, held, room):
            return SegmentFailure(lease.trajectory_id, reason)
        end_tokens, end_reason = plan_end(
            held=len(response),
            leased=lease.tokens,
            budget=settings.token_budget,
            cap=settings.max_response_tokens,
            room=room,
        )
        segment = Segment(
            segment_id=f"{lease.trajectory_id}/{lease.epoch}/{self._number}",
            item_id=lease.trajectory_id,
            prompt_token_ids=held.prompt_token_ids,
            response_token_ids=response,
            end_tokens=end_tokens,
            end_reason=end_reason,
        )
        tokens, cached_tokens = list(response), 0
        async with aclosing(generate_segment(worker.engine, segment, settings.segment)) as chunks:
            async for chunk in chunks:
                tokens += chunk.token_ids
                end_reason = chunk.end_reason or end_reason
                cached_tokens = chunk.cached_tokens
                worker.generated_tokens += len(chunk.token_ids)
                GENERATED_TOKENS.inc(len(chunk.token_ids))
                # A partial trajectory without new tokens is in the buffer as it stands.
                if chunk.token_ids or end_reason is not EndReason.BUDGET:
                    await self._writer.append(lease.trajectory_id, lease.epoch, chunk)
        CACHED_TOKENS.inc(cached_tokens)
        return SegmentEnd(
            trajectory_id=lease.trajectory_id,
            end_reason=end_reason,
            tokens=len(tokens),
            new_tokens=len(tokens) - len(response),
            text="" if end_reason is EndReason.BUDGET else worker.model.decode(tokens),
            cached_tokens=cached_tokens,
        )


def refusal(lease: LeasedTrajectory, held: HeldTrajectory, room: int) -> str | None:
    """Why a trajectory cannot be continued; None when it can."""
    if held.epoch != lease.epoch:
        return f"the trajectory is leased again: epoch {held.epoch}, not {lease.epoch}"
    if held.end_reason not in (buffer_pb2.END_REASON_UNSPECIFIED, buffer_pb2.END_REASON_BUDGET):
        return "the response has ended"
    if len(held.response_token_ids) < lease.tokens:
        return f"the buffer holds {len(held.response_token_ids)} of the {lease.tokens} tokens that were leased"
    if not held.prompt_token_ids:
        return "the prompt is empty"
    if room < 1:
        return f"the prompt of {len(held.prompt_token_ids)} tokens leaves no room in the context"
    return None


async def read_trajectories(
    buffer: BufferClient, run_id: str, trajectory_ids: Sequence[str], timeout_s: float
) -> AsyncIterator[HeldTrajectory]:
    """Whole trajectories, put together from the buffer's pieces."""
    request = buffer_pb2.ReadTrajectoriesRequest(run_id=run_id, trajectory_ids=trajectory_ids, with_logprobs=False)
    held: HeldTrajectory | None = None
    async for piece in buffer.read_trajectories(request, timeout_s=timeout_s):
        if held is None:
            held = HeldTrajectory(piece.trajectory_id)
        held.prompt_token_ids += piece.prompt_token_ids
        held.response_token_ids += piece.token_ids
        if piece.last:
            held.end_reason, held.epoch = piece.end_reason, piece.epoch
            yield held
            held = None
