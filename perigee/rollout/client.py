"""Typed client of a rollout worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from perigee.buffer.images import send_images
from perigee.buffer.v1.buffer_pb2 import ImagePiece
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceStub
from perigee.rpc import ChannelOptions, ServiceClient

if TYPE_CHECKING:
    from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceAsyncStub


class RolloutClient(ServiceClient):
    """Client of a rollout worker (`perigee.rollout.v1.RolloutService`)."""

    service_name = "perigee.rollout.v1.RolloutService"
    idempotent = ("PutImages", "GetState", "Leave", "ComeBack")

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: RolloutServiceAsyncStub = RolloutServiceStub(self.channel)

    def generate(self, request: pb.GenerateRequest, *, timeout_s: float = 600.0) -> AsyncIterator[pb.GenerateResponse]:
        """Generates from prompts in the request and streams the tokens to the caller."""
        return self._stream(self._stub.Generate, request, timeout_s)

    async def put_images(self, images: Mapping[str, bytes], *, timeout_s: float = 60.0) -> None:
        """Gives the worker those of the images, files by their digests, that it does not have; Generate names them.

        `timeout_s` bounds each call. Raises InvalidArgumentError for what is no image or has another digest, and for a
        model that takes none; ResourceExhaustedError when images of calls under way leave no room.
        """

        async def put(pieces: Sequence[ImagePiece]) -> Iterable[str]:
            request = pb.PutImagesRequest(pieces=pieces)
            return (await self._unary(self._stub.PutImages, request, timeout_s)).whole

        await send_images(put, images)

    def extend_trajectories(
        self, request: pb.ExtendTrajectoriesRequest, *, timeout_s: float = 600.0
    ) -> AsyncIterator[pb.ExtendTrajectoriesResponse]:
        """Continues leased trajectories: tokens come from and go to the buffer directly; the caller gets
        progress and the text of responses that ended.
        """
        return self._stream(self._stub.ExtendTrajectories, request, timeout_s)

    async def get_state(self, request: pb.GetStateRequest, *, timeout_s: float = 20.0) -> pb.GetStateResponse:
        """Returns the state of the worker."""
        return await self._unary(self._stub.GetState, request, timeout_s)

    async def leave(self, request: pb.LeaveRequest, *, timeout_s: float = 600.0) -> pb.LeaveResponse:
        """Has the worker take no more work and give its engine's memory to others on the same devices."""
        return await self._unary(self._stub.Leave, request, timeout_s)

    async def come_back(self, request: pb.ComeBackRequest, *, timeout_s: float = 600.0) -> pb.ComeBackResponse:
        """Has the worker take the memory again, with the weights that it holds."""
        return await self._unary(self._stub.ComeBack, request, timeout_s)
