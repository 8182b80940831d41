"""TrainerService: protobuf in, domain call, protobuf out; and what the server opens and closes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from perigee.buffer.client import BufferClient
from perigee.errors import InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.trainer.v1.trainer_pb2_grpc import TrainerServiceServicer, add_TrainerServiceServicer_to_server
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1.weights_pb2_grpc import add_WeightSourceServiceServicer_to_server
from services.kit.addresses import advertised_host, join_address
from services.kit.hf import read_model_files
from services.kit.server import App, channel_options
from services.kit.storage import cache_folder, receive_piece
from services.kit.telemetry import get_logger
from services.trainer.algorithms.base import Algorithm
from services.trainer.config import TrainerConfig
from services.trainer.fine_tuning import check_supervised
from services.trainer.trainer import Trainer
from services.trainer.training import check_training
from services.weights.send import WeightSender

log = get_logger(__name__)

SERVICE = "perigee.trainer.v1.TrainerService"
WEIGHT_SOURCE = "perigee.weights.v1.WeightSourceService"
Context = grpc.aio.ServicerContext[Any, Any]


class TrainerService(TrainerServiceServicer):
    """Serves one trainer."""

    def __init__(self, trainer: Trainer, address: str) -> None:
        self._trainer = trainer
        self._address = address

    async def GetState(self, request: pb.GetStateRequest, context: Context) -> pb.GetStateResponse:
        """See the contract."""
        trainer = self._trainer
        run_id = request.run_id or trainer.loaded.run_id
        return pb.GetStateResponse(
            run_id=trainer.loaded.run_id,
            policy_version=trainer.loaded.version,
            checkpoints=await asyncio.to_thread(trainer.checkpoints.versions, run_id),
            parameters=trainer.engine.parameters,
            world_size=trainer.config.world,
            tensor_parallel=trainer.config.tensor_parallel,
            pipeline_parallel=trainer.config.pipeline_parallel,
            context_parallel=trainer.config.context_parallel,
            data_parallel=trainer.config.data_parallel,
            busy=trainer.busy,
            offloaded=trainer.offloaded,
        )

    async def CheckAlgorithm(self, request: pb.CheckAlgorithmRequest, context: Context) -> pb.CheckAlgorithmResponse:
        """See the contract."""
        self._trainer.engine.check_length("rollout.max_response_tokens", request.longest_sequence)
        algorithm = (
            check_supervised(request.algorithm, request.optimizer)
            if request.supervised
            else check_training(request.algorithm, request.update, request.optimizer)
        )
        response = pb.CheckAlgorithmResponse(
            algorithm=pb.Algorithm(name=request.algorithm.name),
            skips_zero_advantages=isinstance(algorithm, Algorithm) and algorithm.skips_zero_advantages,
        )
        json_format.ParseDict(algorithm.settings.model_dump(mode="json"), response.algorithm.settings)
        return response

    async def FineTune(self, request: pb.FineTuneRequest, context: Context) -> AsyncIterator[pb.FineTuneResponse]:
        """See the contract."""
        async for response in self._trainer.fine_tune(request):
            yield response

    async def Train(self, request: pb.TrainRequest, context: Context) -> AsyncIterator[pb.TrainResponse]:
        """See the contract."""
        _check_groups(request, self._trainer.engine.max_tokens)
        async for response in self._trainer.train(request):
            yield response

    async def PushWeights(self, request: pb.PushWeightsRequest, context: Context) -> pb.PushWeightsResponse:
        """See the contract."""
        return await self._trainer.push_weights(request.run_id, request.policy_version, request.targets)

    async def PublishWeights(self, request: pb.PublishWeightsRequest, context: Context) -> pb.PublishWeightsResponse:
        """See the contract."""
        published = await self._trainer.publish_weights(request.run_id, request.policy_version)
        published.source = self._address
        return published

    async def SaveCheckpoint(self, request: pb.SaveCheckpointRequest, context: Context) -> pb.SaveCheckpointResponse:
        """See the contract."""
        return await self._trainer.save_checkpoint(request.run_id, request.policy_version, request.pinned)

    async def LoadCheckpoint(self, request: pb.LoadCheckpointRequest, context: Context) -> pb.LoadCheckpointResponse:
        """See the contract."""
        version = request.policy_version if request.HasField("policy_version") else None
        return pb.LoadCheckpointResponse(policy_version=await self._trainer.load_checkpoint(request.run_id, version))

    async def Offload(self, request: pb.OffloadRequest, context: Context) -> pb.OffloadResponse:
        """See the contract."""
        self._trainer.check_iteration(request.run_id, request.iteration)
        log.info("offloading", run_id=request.run_id, iteration=request.iteration)
        return await self._trainer.offload()

    async def Onload(self, request: pb.OnloadRequest, context: Context) -> pb.OnloadResponse:
        """See the contract."""
        self._trainer.check_iteration(request.run_id, request.iteration)
        log.info("onloading", run_id=request.run_id, iteration=request.iteration)
        return await self._trainer.onload()

    async def ExportModel(self, request: pb.ExportModelRequest, context: Context) -> pb.ExportModelResponse:
        """See the contract."""
        return pb.ExportModelResponse(path=await self._trainer.export_model(request.run_id, request.path))

    async def ReadModelFiles(
        self, request: pb.ReadModelFilesRequest, context: Context
    ) -> AsyncIterator[pb.ReadModelFilesResponse]:
        """See the contract."""
        pieces = read_model_files(Path(self._trainer.config.model))
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    async def PutFile(self, request: pb.PutFileRequest, context: Context) -> pb.PutFileResponse:
        """See the contract."""
        return pb.PutFileResponse(path=await asyncio.to_thread(receive_piece, cache_folder() / "files", request.piece))


def _check_groups(request: pb.TrainRequest, max_tokens: int) -> None:
    """Raises InvalidArgumentError for groups that are empty or named twice, or hold what cannot be trained."""
    if not request.groups:
        raise InvalidArgumentError.for_field("groups", "is empty; an iteration without a group has nothing to train")
    groups: set[str] = set()
    trajectories: set[str] = set()
    for i, group in enumerate(request.groups):
        field = f"groups[{i}].trajectories"
        if not group.trajectories:
            raise InvalidArgumentError.for_field(field, f"group {group.group_id} has no trajectory")
        for trajectory in group.trajectories:
            if group.group_id in groups or trajectory.trajectory_id in trajectories:
                raise InvalidArgumentError.for_field(
                    field, f"group {group.group_id} or {trajectory.trajectory_id} comes twice"
                )
            _check_trajectory(field, trajectory, max_tokens)
            trajectories.add(trajectory.trajectory_id)
        groups.add(group.group_id)


def _check_trajectory(field: str, trajectory: pb.TrainingTrajectory, max_tokens: int) -> None:
    response_tokens = sum(trajectory.tokens_by_version.values())
    problem = None
    if not math.isfinite(trajectory.reward):
        problem = f"the reward of {trajectory.trajectory_id} is {trajectory.reward}"
    elif not trajectory.prompt_tokens or not response_tokens:
        problem = f"{trajectory.trajectory_id} has no prompt or no response tokens"
    elif (tokens := trajectory.prompt_tokens + response_tokens) > max_tokens:
        problem = (
            f"{trajectory.trajectory_id} has {tokens} tokens; {max_tokens} fit by the model, "
            "trainer.max_sequence_length and trainer.max_microbatch_bytes"
        )
    if problem:
        raise InvalidArgumentError.for_field(field, problem)


@asynccontextmanager
async def lifespan(app: App[TrainerConfig]) -> AsyncIterator[None]:
    """Builds the engine, then serves it; the process ends with one message when the model cannot be used."""
    config = app.config
    # The sender closes each client when its push is over.
    sender = WeightSender(
        config.weights.reached_at(advertised_host(config.server)),
        lambda address: WeightReceiverClient(address, channel_options(config)),
    )
    trainer = Trainer(config, app.connect(BufferClient, config.buffer_address), sender)
    await trainer.open()
    try:
        address = join_address(advertised_host(config.server), app.address.rpartition(":")[2])
        service = TrainerService(trainer, address)
        app.add(SERVICE, add_TrainerServiceServicer_to_server, service)
        app.set_ready(SERVICE, True)
        app.add(WEIGHT_SOURCE, add_WeightSourceServiceServicer_to_server, trainer.source)
        app.set_ready(WEIGHT_SOURCE, True)
        app.on_drain(trainer.source.close)
        async with serve_http(app, service):
            yield
    finally:
        await sender.close()
        await trainer.close()


def serve_http(app: App[TrainerConfig], service: TrainerService) -> AbstractAsyncContextManager[str | None]:
    """Answers operators for as long as the block lasts, where `http.port` is set."""
    if app.config.http.port is None:
        return nullcontext()
    # Trainers without it need not import the web framework.
    from services.kit.http import http_serving
    from services.trainer.http_routes import OPENAPI_FILE, ROUTES

    return http_serving(app, app.config.http, ROUTES, service, OPENAPI_FILE)
