"""perigee.rollout.v1.RolloutService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from perigee.buffer.client import BufferClient
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceServicer
from services.rollout.extend import extend_trajectories
from services.rollout.generate import generate
from services.rollout.segment import SegmentSettings, check_repetition_stop, check_sampling
from services.rollout.worker import Worker

MAX_RESPONSE_BYTES = 1 << 20


class RolloutService(RolloutServiceServicer):
    """Serves generation on one worker."""

    def __init__(self, worker: Worker, buffer: BufferClient) -> None:
        self._worker = worker
        self._buffer = buffer

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Generates from prompts in the request."""
        settings = segment_settings(request, self._worker, trained_on=False)
        async with aclosing(generate(self._worker, request, settings)) as responses:
            async for response in responses:
                yield response

    async def ExtendTrajectories(
        self, request: pb.ExtendTrajectoriesRequest, context: Any
    ) -> AsyncIterator[pb.ExtendTrajectoriesResponse]:
        """Continues leased trajectories."""
        check_extend_request(request)
        settings = segment_settings(request, self._worker, trained_on=True)
        response = pb.ExtendTrajectoriesResponse()
        async with aclosing(extend_trajectories(self._worker, self._buffer, request, settings)) as batches:
            async for batch in batches:
                for result in batch:
                    if isinstance(result, pb.SegmentEnd):
                        response.generated_tokens += result.new_tokens
                        response.ended.append(result)
                    else:
                        response.failed.append(result)
                    # The texts of many long responses would not fit into one message.
                    if response.ByteSize() > MAX_RESPONSE_BYTES:
                        yield response
                        response = pb.ExtendTrajectoriesResponse(generated_tokens=response.generated_tokens)
                if response.ended or response.failed:
                    yield response
                    response = pb.ExtendTrajectoriesResponse(generated_tokens=response.generated_tokens)

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        """Returns the worker's state."""
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
    request: pb.GenerateRequest | pb.ExtendTrajectoriesRequest, worker: Worker, *, trained_on: bool
) -> SegmentSettings:
    """Returns the settings that a call's segments share; raises InvalidArgumentError for what cannot be corrected."""
    check_sampling(request.sampling, trained_on=trained_on)
    check_repetition_stop(request.repetition_stop)
    return SegmentSettings(
        sampling=request.sampling,
        repetition_stop=request.repetition_stop,
        stop_token_ids=worker.model.stop_token_ids,
        chunk_tokens=worker.config.chunk_tokens,
    )


def check_extend_request(request: pb.ExtendTrajectoriesRequest) -> None:
    """Raises InvalidArgumentError with field violations."""
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
