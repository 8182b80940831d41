"""perigee.rollout.v1.RolloutService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from perigee.buffer.client import BufferClient
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceServicer
from services.rollout.answers import AnswerChunk, Item, answer
from services.rollout.engine import VersionSpan
from services.rollout.extend import ExtendSettings, LeasedTrajectory, SegmentEnd, extend_trajectories
from services.rollout.generation import SegmentSettings
from services.rollout.sampling import SamplingSettings, Truncation, check_sampling, repetition_rule
from services.rollout.worker import Worker

MAX_RESPONSE_BYTES = 1 << 20


class RolloutService(RolloutServiceServicer):
    """Translates protobuf to the worker and back."""

    def __init__(self, worker: Worker, buffer: BufferClient) -> None:
        self._worker = worker
        self._buffer = buffer

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        settings = segment_settings(request.sampling, request.repetition_stop, self._worker, trained_on=False)
        items = [Item(item.id, item.prompt_token_ids, item.max_tokens) for item in request.items]
        version = request.policy_version if request.HasField("policy_version") else None
        async with aclosing(answer(self._worker, request.run_id, items, settings, version)) as batches:
            async for batch in batches:
                for piece in batch:
                    if not request.text_only or piece.chunk.end_reason is not None:
                        yield generate_response(piece, text_only=request.text_only)

    async def ExtendTrajectories(
        self, request: pb.ExtendTrajectoriesRequest, context: Any
    ) -> AsyncIterator[pb.ExtendTrajectoriesResponse]:
        settings = extend_settings(request, self._worker)
        leased = [LeasedTrajectory(item.trajectory_id, item.epoch, item.tokens) for item in request.trajectories]
        response = pb.ExtendTrajectoriesResponse()
        async with aclosing(extend_trajectories(self._worker, self._buffer, leased, settings)) as batches:
            async for batch in batches:
                for result in batch:
                    if isinstance(result, SegmentEnd):
                        response.generated_tokens += result.new_tokens
                        response.ended.append(segment_end(result))
                    else:
                        response.failed.add(trajectory_id=result.trajectory_id, reason=result.reason)
                    # The texts of many long responses would not fit into one message.
                    if response.ByteSize() > MAX_RESPONSE_BYTES:
                        yield response
                        response = pb.ExtendTrajectoriesResponse(generated_tokens=response.generated_tokens)
                if response.ended or response.failed:
                    yield response
                    response = pb.ExtendTrajectoriesResponse(generated_tokens=response.generated_tokens)

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        worker = self._worker
        return pb.GetStateResponse(
            worker_id=worker.worker_id,
            status=pb.WorkerStatus.ValueType(worker.status),
            policy_version=worker.policy_version,
            running=worker.running,
            capacity=worker.config.max_num_seqs,
            max_model_len=worker.model.context_tokens,
            generated_tokens=worker.generated_tokens,
            engine_restarts=worker.engine_restarts,
        )


def segment_settings(
    sampling: pb.Sampling, repetition: pb.RepetitionStop, worker: Worker, *, trained_on: bool
) -> SegmentSettings:
    """The settings that a call's segments share; InvalidArgumentError for what cannot be corrected."""
    optional = {
        name: getattr(sampling, name)
        for name in Truncation.__dataclass_fields__
        if sampling.HasField(name)  # type: ignore[arg-type]
    }
    settings = SamplingSettings(sampling.temperature, sampling.seed if sampling.HasField("seed") else None)
    check_sampling(settings, Truncation(**optional), trained_on=trained_on)
    return SegmentSettings(
        sampling=settings,
        repetition=repetition_rule(repetition.max_period, repetition.min_repeats),
        stop_token_ids=worker.model.stop_token_ids,
        chunk_tokens=worker.config.chunk_tokens,
    )


def extend_settings(request: pb.ExtendTrajectoriesRequest, worker: Worker) -> ExtendSettings:
    """What the trajectories of a call share; InvalidArgumentError with field violations."""
    violations = [
        FieldViolation(name, "must be at least 1")
        for name in ("token_budget", "max_response_tokens")
        if not getattr(request, name)
    ]
    if not request.run_id:
        violations.append(FieldViolation("run_id", "is required"))
    if len({item.trajectory_id for item in request.trajectories}) != len(request.trajectories):
        violations.append(FieldViolation("trajectories", "one of them is named twice"))
    if violations:
        raise InvalidArgumentError(f"{violations[0].field}: {violations[0].description}", violations=violations)
    return ExtendSettings(
        run_id=request.run_id,
        policy_version=request.policy_version,
        token_budget=request.token_budget,
        max_response_tokens=request.max_response_tokens,
        segment=segment_settings(request.sampling, request.repetition_stop, worker, trained_on=True),
    )


def generate_response(piece: AnswerChunk, *, text_only: bool) -> pb.GenerateResponse:
    """One piece of an item's response."""
    chunk = piece.chunk
    response = pb.GenerateResponse(id=piece.item_id)
    if not text_only:
        response.offset = chunk.offset
        response.token_ids.extend(chunk.token_ids)
        response.logprobs.extend(chunk.logprobs)
        response.versions.extend(version_spans(chunk.versions))
    if chunk.end_reason is not None:
        response.end_reason = buffer_pb2.EndReason.ValueType(chunk.end_reason)
        response.text = piece.text
        response.tokens = chunk.offset + len(chunk.token_ids)
    return response


def segment_end(end: SegmentEnd) -> pb.SegmentEnd:
    """The end of a segment."""
    return pb.SegmentEnd(
        trajectory_id=end.trajectory_id,
        end_reason=buffer_pb2.EndReason.ValueType(end.end_reason),
        tokens=end.tokens,
        new_tokens=end.new_tokens,
        text=end.text,
        cached_tokens=end.cached_tokens,
    )


def version_spans(spans: Sequence[VersionSpan]) -> list[buffer_pb2.VersionSpan]:
    """Policy versions over consecutive tokens."""
    return [buffer_pb2.VersionSpan(policy_version=span.policy_version, tokens=span.tokens) for span in spans]
