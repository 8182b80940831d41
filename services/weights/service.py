"""perigee.weights.v1.WeightReceiverService over a WeightReceiver; hosted by the rollout service."""

from __future__ import annotations

from typing import Any

from perigee.weights.v1 import weights_pb2 as pb
from perigee.weights.v1.weights_pb2_grpc import WeightReceiverServiceServicer
from services.weights.manifest import manifest_from_proto
from services.weights.receiver import WeightReceiver


class WeightReceiverService(WeightReceiverServiceServicer):
    """Translates protobuf to the receiver and back."""

    def __init__(self, receiver: WeightReceiver) -> None:
        self._receiver = receiver

    async def Prepare(self, request: pb.PrepareRequest, context: Any) -> pb.PrepareResponse:
        prepared = await self._receiver.prepare(manifest_from_proto(request.manifest))
        return pb.PrepareResponse(
            session=prepared.session,
            address=prepared.address,
            transfer_id=prepared.transfer_id,
            receiver_id=prepared.receiver_id,
        )

    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitResponse:
        report = await self._receiver.commit(request.transfer_id)
        return pb.CommitResponse(
            policy_version=report.policy_version,
            verify_seconds=report.verify_seconds,
            commit_seconds=report.commit_seconds,
        )

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self._receiver.abort(request.transfer_id)
        return pb.AbortResponse()
