"""Typed client of the reward service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from perigee.reward.v1 import reward_pb2 as pb
from perigee.reward.v1.reward_pb2_grpc import RewardServiceStub
from perigee.rpc import ChannelOptions, ServiceClient

if TYPE_CHECKING:
    from perigee.reward.v1.reward_pb2_grpc import RewardServiceAsyncStub


class RewardClient(ServiceClient):
    """Client of the reward service (`perigee.reward.v1.RewardService`)."""

    service_name = "perigee.reward.v1.RewardService"
    idempotent = ("ListVerifiers",)
    message_bytes = 64 << 20

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: RewardServiceAsyncStub = RewardServiceStub(self.channel)

    def score(self, request: pb.ScoreRequest, *, timeout_s: float = 600.0) -> AsyncIterator[pb.ScoreResponse]:
        """Scores a batch; outcomes stream back as they finish, each with its item's id."""
        return self._stream(self._stub.Score, request, timeout_s)

    async def list_verifiers(
        self, request: pb.ListVerifiersRequest, *, timeout_s: float = 20.0
    ) -> pb.ListVerifiersResponse:
        """Lists the verifiers with their versions."""
        return await self._unary(self._stub.ListVerifiers, request, timeout_s)
