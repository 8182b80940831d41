"""Typed client of the replay buffer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perigee.buffer.images import IMAGES_PER_CALL, join_images, send_images
from perigee.buffer.packing import ITEM_BYTES, all_finite, count_tokens
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceStub
from perigee.errors import DataLossError
from perigee.rpc import ChannelOptions, ServiceClient

if TYPE_CHECKING:
    from perigee.buffer.v1.buffer_pb2_grpc import BufferServiceAsyncStub

# Trajectories that one call asks for, so that no request grows with the iteration.
TRAJECTORIES_PER_CALL = 512
# Seconds more that a call has for each token that it reads: 25,000 tokens a second, of 8 bytes each with their
# log-probabilities, are what a network of 2 Mbit/s carries.
SECONDS_PER_TOKEN = 4e-5
UNFINISHED = (pb.END_REASON_UNSPECIFIED, pb.END_REASON_BUDGET)


@dataclass(frozen=True)
class StoredTrajectory:
    """Whole trajectory as the buffer stores it: a prompt and T response tokens.

    `prompt_token_ids`, `token_ids` and `logprobs` are packed (`perigee.buffer.packing`). `logprobs` has one value for
    each response token, or none when they were not asked for; so has `experts`, where expert choices are recorded.
    `versions` spans the response tokens in order. `image_digests` names the prompt's images in order.
    """

    trajectory_id: str
    prompt_token_ids: bytes
    token_ids: bytes
    logprobs: bytes
    versions: Sequence[pb.VersionSpan]
    end_reason: pb.EndReason.ValueType
    epoch: int
    experts: bytes = b""
    image_digests: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """Returns the number T of response tokens."""
        return count_tokens(self.token_ids)

    @property
    def finished(self) -> bool:
        """Returns whether the response has ended, not only a segment of it."""
        return self.end_reason not in UNFINISHED


class BufferClient(ServiceClient):
    """Client of the replay buffer (`perigee.buffer.v1.BufferService`)."""

    service_name = "perigee.buffer.v1.BufferService"
    idempotent = (
        "CreateRun",
        "GetRun",
        "CreateGroups",
        "PutImages",
        "LeaseTrajectories",
        "AppendChunks",
        "RecordVerdicts",
        "ListPromptStatistics",
        "CommitIteration",
    )

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: BufferServiceAsyncStub = BufferServiceStub(self.channel)

    async def create_run(self, request: pb.CreateRunRequest, *, timeout_s: float = 20.0) -> pb.CreateRunResponse:
        """Creates the run, or confirms that it exists with the same configuration digest."""
        return await self._unary(self._stub.CreateRun, request, timeout_s)

    async def get_run(self, request: pb.GetRunRequest, *, timeout_s: float = 20.0) -> pb.GetRunResponse:
        """Reads the run state."""
        return await self._unary(self._stub.GetRun, request, timeout_s)

    async def create_groups(
        self, request: pb.CreateGroupsRequest, *, timeout_s: float = 20.0
    ) -> pb.CreateGroupsResponse:
        """Creates groups with their k empty trajectories; a group that exists is left as it is."""
        return await self._unary(self._stub.CreateGroups, request, timeout_s)

    async def put_images(self, run_id: str, images: Mapping[str, bytes], *, timeout_s: float = 60.0) -> None:
        """Stores those of the images, files by their digests, that the run does not have; keeps the others for a while.

        `timeout_s` bounds each call. Raises InvalidArgumentError for a file of another digest, ResourceExhaustedError
        when the run's images would take more memory than they may, DataLossError when one does not arrive whole.
        """

        async def put(pieces: Sequence[pb.ImagePiece]) -> Iterable[str]:
            request = pb.PutImagesRequest(run_id=run_id, pieces=pieces)
            return (await self._unary(self._stub.PutImages, request, timeout_s)).whole

        await send_images(put, images)

    async def read_images(
        self, run_id: str, digests: Sequence[str], *, timeout_s: float = 60.0
    ) -> AsyncIterator[tuple[str, bytes]]:
        """Reads images in the order asked for, each with its digest and as soon as its last piece is there.

        `timeout_s` bounds each call, of which there is one for every 1024 images. Raises NotFoundError for an image
        that is not in the run, DataLossError for one that does not arrive as it was put.
        """
        for start in range(0, len(digests), IMAGES_PER_CALL):
            asked = digests[start : start + IMAGES_PER_CALL]
            request = pb.ReadImagesRequest(run_id=run_id, digests=asked)
            pages = self._stream(self._stub.ReadImages, request, timeout_s)
            async for image in join_images(asked, (piece async for page in pages for piece in page.pieces)):
                yield image

    def list_groups(
        self, request: pb.ListGroupsRequest, *, timeout_s: float = 60.0
    ) -> AsyncIterator[pb.ListGroupsResponse]:
        """Lists the groups not consumed yet, oldest first, with the state of every trajectory but no tokens."""
        return self._stream(self._stub.ListGroups, request, timeout_s)

    async def lease_trajectories(
        self, request: pb.LeaseTrajectoriesRequest, *, timeout_s: float = 20.0
    ) -> pb.LeaseTrajectoriesResponse:
        """Leases trajectories to a worker: each lease raises the trajectory's epoch, which fences older leases."""
        return await self._unary(self._stub.LeaseTrajectories, request, timeout_s)

    async def append_chunks(
        self, request: pb.AppendChunksRequest, *, timeout_s: float = 20.0
    ) -> pb.AppendChunksResponse:
        """Appends chunks. The same chunk twice is one chunk; a gap, or the epoch of an older lease, is refused."""
        return await self._unary(self._stub.AppendChunks, request, timeout_s)

    def read_pieces(
        self, request: pb.ReadTrajectoriesRequest, *, timeout_s: float = 60.0
    ) -> AsyncIterator[pb.ReadTrajectoriesResponse]:
        """Streams trajectories as bounded pieces, in the order asked for; `read_trajectories` joins and checks them."""
        return self._stream(self._stub.ReadTrajectories, request, timeout_s)

    async def read_trajectories(
        self,
        run_id: str,
        trajectory_ids: Sequence[str],
        *,
        with_logprobs: bool = False,
        with_experts: bool = False,
        timeout_s: float = 60.0,
        tokens: int = 0,
    ) -> AsyncIterator[StoredTrajectory]:
        """Reads whole trajectories in the order asked for, each as soon as its last piece is there.

        `timeout_s` and SECONDS_PER_TOKEN for each of `tokens`, those of all of them, bound each call, of which there is
        one for every 512 trajectories. Raises NotFoundError for an unknown trajectory, DataLossError when pieces are
        missing or do not fit together.
        """
        timeout_s += tokens * SECONDS_PER_TOKEN
        for start in range(0, len(trajectory_ids), TRAJECTORIES_PER_CALL):
            expected = iter(trajectory_ids[start : start + TRAJECTORIES_PER_CALL])
            request = pb.ReadTrajectoriesRequest(
                run_id=run_id,
                trajectory_ids=trajectory_ids[start : start + TRAJECTORIES_PER_CALL],
                with_logprobs=with_logprobs,
                with_experts=with_experts,
            )
            pieces: list[pb.ReadTrajectoriesResponse] = []
            async for piece in self.read_pieces(request, timeout_s=timeout_s):
                pieces.append(piece)
                if piece.last:
                    yield join_pieces(next(expected, ""), pieces, with_logprobs=with_logprobs)
                    pieces = []
            if (missing := next(expected, None)) is not None:
                raise DataLossError(f"trajectory {missing}: the buffer sent no whole trajectory")

    async def record_verdicts(
        self, request: pb.RecordVerdictsRequest, *, timeout_s: float = 20.0
    ) -> pb.RecordVerdictsResponse:
        """Records the verdict of finished trajectories; the first one recorded stands."""
        return await self._unary(self._stub.RecordVerdicts, request, timeout_s)

    async def list_prompt_statistics(
        self, request: pb.ListPromptStatisticsRequest, *, timeout_s: float = 20.0
    ) -> pb.ListPromptStatisticsResponse:
        """Reads the statistics of prompts, page by page."""
        return await self._unary(self._stub.ListPromptStatistics, request, timeout_s)

    async def commit_iteration(
        self, request: pb.CommitIterationRequest, *, timeout_s: float = 20.0
    ) -> pb.CommitIterationResponse:
        """Closes an iteration in one atomic change: groups consumed, statistics, policy version, run state."""
        return await self._unary(self._stub.CommitIteration, request, timeout_s)


def join_pieces(
    trajectory_id: str, pieces: Sequence[pb.ReadTrajectoriesResponse], *, with_logprobs: bool
) -> StoredTrajectory:
    """Joins the pieces of one trajectory.

    Raises DataLossError for a gap, for tokens that lack a log-probability or a version, and for a log-probability that
    is not finite.
    """
    offset = 0
    for piece in pieces:
        if piece.trajectory_id != trajectory_id or piece.offset != offset:
            raise DataLossError(
                f"trajectory {trajectory_id}: the piece of {piece.trajectory_id} at offset {piece.offset} came where "
                f"offset {offset} was due"
            )
        offset += count_tokens(piece.token_ids)
    trajectory = StoredTrajectory(
        trajectory_id=trajectory_id,
        prompt_token_ids=pieces[0].prompt_token_ids,
        token_ids=b"".join(piece.token_ids for piece in pieces),
        logprobs=b"".join(piece.logprobs for piece in pieces),
        versions=[span for piece in pieces for span in piece.versions],
        end_reason=pieces[-1].end_reason,
        epoch=pieces[-1].epoch,
        experts=b"".join(piece.experts for piece in pieces),
        image_digests=tuple(pieces[0].image_digests),
    )
    spanned = sum(span.tokens for span in trajectory.versions)
    logprobs = len(trajectory.logprobs) if with_logprobs else len(trajectory.token_ids)
    if not len(trajectory.token_ids) == logprobs == spanned * ITEM_BYTES:
        raise DataLossError(
            f"trajectory {trajectory_id}: {trajectory.tokens} tokens, {count_tokens(trajectory.logprobs)} "
            f"log-probabilities, {spanned} versions"
        )
    if not all_finite(trajectory.logprobs):
        raise DataLossError(f"trajectory {trajectory_id}: a log-probability is not finite")
    return trajectory
