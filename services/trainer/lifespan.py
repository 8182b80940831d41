"""What the trainer's server opens before it serves and closes afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.buffer.client import BufferClient
from perigee.trainer.v1.trainer_pb2_grpc import add_TrainerServiceServicer_to_server
from perigee.weights.client import WeightReceiverClient
from services.kit.server import App
from services.trainer.config import TrainerConfig
from services.trainer.service import TrainerService
from services.trainer.trainer import Trainer
from services.weights.send import WeightSender

SERVICE = "perigee.trainer.v1.TrainerService"


@asynccontextmanager
async def lifespan(app: App[TrainerConfig]) -> AsyncIterator[None]:
    """Builds the engine, then serves it; the process ends with one message when the model cannot be used."""
    config = app.config
    # The sender closes each client when its push is over.
    sender = WeightSender(config.weights, lambda address: WeightReceiverClient(address, app.channel_options()))
    trainer = Trainer(config, app.connect(BufferClient, config.buffer_address), sender)
    await trainer.open()
    try:
        app.add(SERVICE, add_TrainerServiceServicer_to_server, TrainerService(trainer))
        app.set_ready(SERVICE, True)
        yield
    finally:
        await sender.close()
        await trainer.close()
