"""Typed client of the trainer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from perigee.errors import DataLossError
from perigee.rpc import ChannelOptions, ServiceClient
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.trainer.v1.trainer_pb2_grpc import TrainerServiceStub

if TYPE_CHECKING:
    from perigee.trainer.v1.trainer_pb2_grpc import TrainerServiceAsyncStub


PIECE_BYTES = 1 << 20


def read_pieces(path: Path) -> Iterator[pb.FilePiece]:
    """Yields a file in the pieces in which it goes to another machine; at least one."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file_bytes = file.tell()
        for offset in range(0, max(1, file_bytes), PIECE_BYTES):
            file.seek(offset)
            content = file.read(PIECE_BYTES)
            yield pb.FilePiece(digest=digest, file_bytes=file_bytes, offset=offset, content=content)


async def send_file(path: Path, put: Callable[[pb.FilePiece], Awaitable[str]]) -> str:
    """Sends a file piece by piece; returns the path that `put` returns with the last one, or before where it is known.

    Files are read in a thread, since hashing a large one takes seconds. Raises DataLossError when it changed meanwhile.
    """
    pieces = read_pieces(path)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        if found := await put(piece):
            return found
    raise DataLossError(f"{path} changed while it was sent")


class TrainerClient(ServiceClient):
    """Client of the trainer (`perigee.trainer.v1.TrainerService`)."""

    service_name = "perigee.trainer.v1.TrainerService"
    idempotent = (
        "GetState",
        "CheckAlgorithm",
        "PublishWeights",
        "SaveCheckpoint",
        "LoadCheckpoint",
        "ExportModel",
        "PutFile",
        "Offload",
        "Onload",
    )

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions()) -> None:
        super().__init__(target, options)
        self._stub: TrainerServiceAsyncStub = TrainerServiceStub(self.channel)

    async def get_state(self, request: pb.GetStateRequest, *, timeout_s: float = 20.0) -> pb.GetStateResponse:
        """Returns what is loaded, the checkpoints and the parallel sizes."""
        return await self._unary(self._stub.GetState, request, timeout_s)

    async def check_algorithm(
        self, request: pb.CheckAlgorithmRequest, *, timeout_s: float = 20.0
    ) -> pb.CheckAlgorithmResponse:
        """Checks training settings without training; InvalidArgumentError names every field at fault."""
        return await self._unary(self._stub.CheckAlgorithm, request, timeout_s)

    def fine_tune(self, request: pb.FineTuneRequest, *, timeout_s: float = 600.0) -> AsyncIterator[pb.FineTuneResponse]:
        """Fine-tunes on prompt-response pairs in packed sequences."""
        return self._stream(self._stub.FineTune, request, timeout_s)

    def train(self, request: pb.TrainRequest, *, timeout_s: float = 600.0) -> AsyncIterator[pb.TrainResponse]:
        """Runs one iteration of policy optimization on complete groups, read from the buffer."""
        return self._stream(self._stub.Train, request, timeout_s)

    async def push_weights(self, request: pb.PushWeightsRequest, *, timeout_s: float = 600.0) -> pb.PushWeightsResponse:
        """Pushes the loaded version to rollout workers; each has an outcome of its own."""
        return await self._unary(self._stub.PushWeights, request, timeout_s)

    async def publish_weights(
        self, request: pb.PublishWeightsRequest, *, timeout_s: float = 600.0
    ) -> pb.PublishWeightsResponse:
        """Converts the loaded version and lends it to receivers until another version is published."""
        return await self._unary(self._stub.PublishWeights, request, timeout_s)

    async def offload(self, request: pb.OffloadRequest, *, timeout_s: float = 600.0) -> pb.OffloadResponse:
        """Moves the weights out of memory and drops gradients and moments."""
        return await self._unary(self._stub.Offload, request, timeout_s)

    async def onload(self, request: pb.OnloadRequest, *, timeout_s: float = 600.0) -> pb.OnloadResponse:
        """Brings the weights back, bit for bit."""
        return await self._unary(self._stub.Onload, request, timeout_s)

    async def save_checkpoint(
        self, request: pb.SaveCheckpointRequest, *, timeout_s: float = 600.0
    ) -> pb.SaveCheckpointResponse:
        """Writes the loaded version as a checkpoint, whole or not at all."""
        return await self._unary(self._stub.SaveCheckpoint, request, timeout_s)

    async def load_checkpoint(
        self, request: pb.LoadCheckpointRequest, *, timeout_s: float = 600.0
    ) -> pb.LoadCheckpointResponse:
        """Loads a version from its checkpoint, or the run's newest when none is named."""
        return await self._unary(self._stub.LoadCheckpoint, request, timeout_s)

    async def export_model(self, request: pb.ExportModelRequest, *, timeout_s: float = 600.0) -> pb.ExportModelResponse:
        """Writes the policy as a Hugging Face folder."""
        return await self._unary(self._stub.ExportModel, request, timeout_s)

    def read_model_files(
        self, request: pb.ReadModelFilesRequest, *, timeout_s: float = 120.0
    ) -> AsyncIterator[pb.ReadModelFilesResponse]:
        """Streams the configuration and the tokenizer of the base model, a file after another."""
        return self._stream(self._stub.ReadModelFiles, request, timeout_s)

    async def put_file(self, path: Path, *, timeout_s: float = 60.0) -> str:
        """Sends a file, unless the trainer has it; returns its path there. `timeout_s` is of each piece."""

        async def put(piece: pb.FilePiece) -> str:
            return (await self._unary(self._stub.PutFile, pb.PutFileRequest(piece=piece), timeout_s)).path

        return await send_file(path, put)
