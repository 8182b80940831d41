"""perigee.rollout.v1.RolloutService, and the parts of a worker from its start to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from typing import Any

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import ITEM_BYTES
from perigee.coordinator.client import CoordinatorClient
from perigee.errors import FieldViolation, InternalError, InvalidArgumentError, UnavailableError
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceServicer, add_RolloutServiceServicer_to_server
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1.trainer_pb2 import ReadModelFilesRequest
from perigee.weights.client import WeightSourceClient
from perigee.weights.v1.weights_pb2_grpc import (
    add_WeightReceiverServiceServicer_to_server,
    add_WeightSourceServiceServicer_to_server,
)
from services.kit.addresses import advertised_host, join_address
from services.kit.hf import fetch_model, open_model_folder, receive_model_files
from services.kit.server import App, channel_options, end_tasks
from services.kit.storage import cache_folder
from services.kit.tasks import start_tasks
from services.kit.telemetry import get_logger
from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine
from services.rollout.extend import extend_trajectories, pack_results
from services.rollout.generate import generate
from services.rollout.model import PolicyModel, open_policy, require_experts
from services.rollout.registration import keep_registered
from services.rollout.residence import RESIDENCES
from services.rollout.segment import MAX_CHUNK_BYTES, SegmentSettings, check_repetition_stop, check_sampling
from services.rollout.worker import DRAINING, READY, Worker, supervise
from services.weights.manifest import WeightImage
from services.weights.receive import WeightReceiver

log = get_logger(__name__)

# Seconds that a worker waits for the model's files of a trainer that is starting.
MODEL_WAIT_S = 300.0
ROLLOUT = "perigee.rollout.v1.RolloutService"
WEIGHTS = "perigee.weights.v1.WeightReceiverService"
WEIGHT_SOURCE = "perigee.weights.v1.WeightSourceService"


class RolloutService(RolloutServiceServicer):
    """Serves generation on one worker."""

    def __init__(self, worker: Worker, buffer: BufferClient, held_image: Callable[[], WeightImage | None]) -> None:
        self._worker = worker
        self._buffer = buffer
        self._held_image = held_image

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Generates from prompts in the request."""
        settings = segment_settings(request, self._worker, trained_on=False)
        async with aclosing(generate(self._worker, request, settings)) as responses:
            async for response in responses:
                yield response

    async def PutImages(self, request: pb.PutImagesRequest, context: Any) -> pb.PutImagesResponse:
        """Takes pieces of images that Generate's prompts will name."""
        self._worker.model.require_vision()
        return pb.PutImagesResponse(whole=self._worker.images.put(request.pieces))

    async def ExtendTrajectories(
        self, request: pb.ExtendTrajectoriesRequest, context: Any
    ) -> AsyncIterator[pb.ExtendTrajectoriesResponse]:
        """Continues leased trajectories."""
        check_extend_request(request)
        settings = segment_settings(request, self._worker, trained_on=True)
        generated = 0
        async with (
            self._worker.extending(),
            aclosing(extend_trajectories(self._worker, self._buffer, request, settings)) as batches,
        ):
            async for batch in batches:
                for response in pack_results(batch, generated):
                    generated = response.generated_tokens
                    yield response
            prefill_s, decode_s = await self._worker.take_engine_seconds()
            yield pb.ExtendTrajectoriesResponse(
                generated_tokens=generated, prefill_seconds=prefill_s, decode_seconds=decode_s
            )

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        """Returns the worker's state."""
        worker = self._worker
        return pb.GetStateResponse(
            worker_id=worker.worker_id,
            status=worker.status,
            policy_version=worker.policy_version,
            running=worker.running,
            capacity=worker.config.max_num_seqs,
            max_model_len=worker.model.context_tokens,
            generated_tokens=worker.generated_tokens,
            engine_restarts=worker.engine_restarts,
        )

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        """Has the worker leave its memory to others."""
        residence = RESIDENCES.get(request.residence)
        if residence is None:
            raise InvalidArgumentError.for_field("residence", f"{request.residence} is none that this worker knows")
        self._worker.check_iteration(request.run_id, request.iteration)
        start = time.monotonic()
        freed = await self._worker.leave(residence)
        return pb.LeaveResponse(seconds=time.monotonic() - start, freed_bytes=freed)

    async def ComeBack(self, request: pb.ComeBackRequest, context: Any) -> pb.ComeBackResponse:
        """Has the worker come back with the weights that it holds; refuses when it has none afterwards."""
        worker = self._worker
        worker.check_iteration(request.run_id, request.iteration)
        start = time.monotonic()
        await worker.come_back(self._held_image)
        worker.check_ready("", None)
        return pb.ComeBackResponse(seconds=time.monotonic() - start, policy_version=worker.policy_version)


def segment_settings(
    request: pb.GenerateRequest | pb.ExtendTrajectoriesRequest, worker: Worker, *, trained_on: bool
) -> SegmentSettings:
    """Returns the settings that a call's segments share; raises InvalidArgumentError for what cannot be corrected."""
    check_sampling(request.sampling, trained_on=trained_on)
    check_repetition_stop(request.repetition_stop)
    config, model = worker.config, worker.model
    token_bytes = 2 * ITEM_BYTES + (model.expert_bytes if config.router_replay else 0)
    return SegmentSettings(
        sampling=request.sampling,
        repetition_stop=request.repetition_stop,
        stop_token_ids=model.stop_token_ids,
        chunk_tokens=min(config.chunk_tokens, MAX_CHUNK_BYTES // token_bytes),
        # Only what is trained on may be of mixed versions.
        cache_salt="" if trained_on else worker.prefix_salt,
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
        raise InvalidArgumentError.for_fields(violations)


def build_engine(config: RolloutConfig, model: PolicyModel) -> Engine:
    """Returns the engine that the configuration names, not started."""
    # The import takes seconds and belongs to processes that run this engine.
    from services.rollout.vllm_engine import VllmEngine

    return VllmEngine(config, model)


async def find_model(app: App[RolloutConfig]) -> str:
    """Returns a folder with configuration and tokenizer of the policy: the trainer's unless one is named.

    A trainer that is away may be starting and is asked again; raises UnavailableError when it stays away.
    """
    config = app.config
    if config.model is not None:
        return await asyncio.to_thread(fetch_model, config.model, "rollout.model", config.rope)
    target = cache_folder() / f"model-of-{app.address}"
    trainer = app.connect(TrainerClient, config.trainer_address)
    deadline = time.monotonic() + MODEL_WAIT_S
    while True:
        try:
            await receive_model_files(trainer.read_model_files(ReadModelFilesRequest()), target)
            open_model_folder(target, "rollout.model").require_rope(config.rope, "rollout.rope")
            return str(target)
        except UnavailableError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"rollout.model is unset and no trainer gave the model: {error.message}"
                ) from error
            log.warning("waiting for the model's configuration and tokenizer", error=error.message)
            await asyncio.sleep(config.registration.retry_seconds)


@asynccontextmanager
async def lifespan(app: App[RolloutConfig]) -> AsyncIterator[None]:
    """Serves once the engine's code is imported; the engine comes up meanwhile, and readiness follows its status.

    Raises InvalidArgumentError when the model folder is none, and InternalError after an engine that does not start.
    """
    config = app.config
    model = open_policy(await find_model(app), config.max_model_len)
    if config.router_replay:
        require_experts(model.path, model.expert_bytes)
    address = config.advertise_address or join_address(advertised_host(config.server), app.address.rpartition(":")[2])
    # The import takes seconds, and SIGTERM must be heard meanwhile.
    engine = await asyncio.to_thread(build_engine, config, model)
    worker = Worker(config, model, engine, config.worker_id or f"{socket.gethostname()}-{os.getpid()}")
    receiver = WeightReceiver(
        config.weights.reached_at(address.rpartition(":")[0]),
        worker.commit,
        connect=lambda source: WeightSourceClient(source, channel_options(config)),
        is_loaded=lambda: worker.status == READY,
        is_away=lambda: worker.is_away,
        find_slices=worker.find_slices,
    )
    fatal: list[InternalError] = []

    def end_service(error: InternalError) -> None:
        fatal.append(error)
        signal.raise_signal(signal.SIGTERM)

    async def hand_back() -> None:
        worker.set_status(DRAINING)

    await receiver.start()
    app.on_drain(hand_back)
    app.on_drain(receiver.source.close)
    service = RolloutService(worker, app.connect(BufferClient, config.buffer_address), lambda: receiver.current)
    app.add(
        ROLLOUT,
        add_RolloutServiceServicer_to_server,
        service,
        # It serves within a run only: a worker that can take weights is ready for one.
        required=False,
    )
    app.add(WEIGHTS, add_WeightReceiverServiceServicer_to_server, receiver)
    app.set_ready(WEIGHTS, True)
    app.add(WEIGHT_SOURCE, add_WeightSourceServiceServicer_to_server, receiver.source)
    app.set_ready(WEIGHT_SOURCE, True)
    background = [supervise(worker, lambda: receiver.current, end_service), _follow_worker(app, worker)]
    if config.coordinator_address:
        coordinator = app.connect(CoordinatorClient, config.coordinator_address)
        background.append(keep_registered(worker, coordinator, address))
    tasks = start_tasks(*background)
    try:
        async with serve_http(app, worker, service):
            yield
    finally:
        worker.set_status(DRAINING)
        try:
            await end_tasks(*tasks)
        finally:
            await worker.close()
            await receiver.close()
    if fatal:
        raise fatal[0]


def serve_http(
    app: App[RolloutConfig], worker: Worker, service: RolloutService
) -> AbstractAsyncContextManager[str | None]:
    """Answers operators and OpenAI's calls for as long as the block lasts, where `http.port` is set."""
    if app.config.http.port is None:
        return nullcontext()
    # Workers without it need not import the web framework.
    from services.kit.http import http_serving
    from services.rollout.http_routes import OPENAPI_FILE, ROUTES
    from services.rollout.openai_api import compat_routers

    return http_serving(app, app.config.http, ROUTES, service, OPENAPI_FILE, compat_routers(worker))


async def _follow_worker(app: App[RolloutConfig], worker: Worker) -> None:
    """Sets the readiness of the service to that of the worker, until cancelled."""
    while True:
        app.set_ready(ROLLOUT, worker.status == READY)
        await worker.wait_change()
