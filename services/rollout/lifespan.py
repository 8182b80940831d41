"""What a rollout worker is made of, from start to end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from perigee.buffer.client import BufferClient
from perigee.coordinator.client import CoordinatorClient
from perigee.errors import InternalError, InvalidArgumentError
from perigee.rollout.v1.rollout_pb2_grpc import add_RolloutServiceServicer_to_server
from perigee.weights.v1.weights_pb2_grpc import add_WeightReceiverServiceServicer_to_server
from services.kit.server import App
from services.rollout.config import RolloutConfig
from services.rollout.engine import WeightShard, build_engine
from services.rollout.model_folder import open_model_folder
from services.rollout.registration import keep_registered
from services.rollout.service import RolloutService
from services.rollout.supervisor import supervise
from services.rollout.worker import HeldWeights, Worker, WorkerStatus
from services.weights.image import WeightImage
from services.weights.receiver import WeightReceiver
from services.weights.service import WeightReceiverService

ROLLOUT = "perigee.rollout.v1.RolloutService"
WEIGHTS = "perigee.weights.v1.WeightReceiverService"
UNSPECIFIED_HOSTS = {"0.0.0.0", "::", "[::]"}


@asynccontextmanager
async def lifespan(app: App[RolloutConfig]) -> AsyncIterator[None]:
    """Serves once the engine's code is imported; the engine comes up meanwhile, and readiness follows its status.

    Raises InvalidArgumentError when the model folder is none, and InternalError after an engine that does not start.
    """
    config = app.config
    model = open_model_folder(config.model, config.max_model_len)
    address = config.advertise_address or app.address
    if config.coordinator_address and address.rsplit(":", 1)[0] in UNSPECIFIED_HOSTS:
        raise InvalidArgumentError.of(
            "rollout.advertise_address", f"is required: nobody can dial {address}; give this worker's host:port"
        )
    # The import takes seconds, and SIGTERM must be heard meanwhile.
    engine = await asyncio.to_thread(build_engine, config, model)
    worker = Worker(config, model, engine, config.worker_id or f"{socket.gethostname()}-{os.getpid()}")
    receiver = WeightReceiver(config.weights, lambda image: worker.commit(hold(image)))
    fatal: list[InternalError] = []

    def end_service(error: InternalError) -> None:
        fatal.append(error)
        signal.raise_signal(signal.SIGTERM)

    await receiver.start()
    app.add(
        ROLLOUT,
        add_RolloutServiceServicer_to_server,
        RolloutService(worker, app.connect(BufferClient, config.buffer_address)),
    )
    app.add(WEIGHTS, add_WeightReceiverServiceServicer_to_server, WeightReceiverService(receiver))
    app.set_ready(WEIGHTS, True)
    tasks = [
        asyncio.create_task(
            supervise(worker, lambda: hold(receiver.current) if receiver.current else None, end_service)
        ),
        asyncio.create_task(follow_readiness(app, worker)),
    ]
    if config.coordinator_address:
        coordinator = app.connect(CoordinatorClient, config.coordinator_address)
        tasks.append(asyncio.create_task(keep_registered(worker, coordinator, address)))
    try:
        yield
    finally:
        worker.become(WorkerStatus.DRAINING)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        await receiver.close()
    if fatal:
        raise fatal[0]


async def follow_readiness(app: App[RolloutConfig], worker: Worker) -> None:
    """Tells the health service of every change of status."""
    while True:
        app.set_ready(ROLLOUT, worker.status is WorkerStatus.READY)
        await worker.wait_change()


def hold(image: WeightImage) -> HeldWeights:
    """The image as the worker takes it."""
    shards = [WeightShard(shard.offset, shard.bytes) for shard in image.shards]
    return HeldWeights(image.run_id, image.policy_version, image.path, shards)
