"""Starts the coordinator: `python -m services.coordinator --config recipe.yaml`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perigee.buffer.client import BufferClient
from perigee.coordinator.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from perigee.reward.client import RewardClient
from perigee.rollout.client import RolloutClient
from perigee.trainer.client import TrainerClient
from perigee.weights.client import WeightReceiverClient
from services.coordinator.config import CoordinatorConfig
from services.coordinator.context import Peers
from services.coordinator.directory import Directory, MemoryDirectory
from services.coordinator.runs import Runs
from services.coordinator.service import CoordinatorService
from services.coordinator.workers import WorkerRegistry
from services.kit.config import load_config
from services.kit.server import App, channel_options, end_tasks, run
from services.kit.tasks import start_tasks

FULL_NAME = "perigee.coordinator.v1.CoordinatorService"


@asynccontextmanager
async def lifespan(app: App[CoordinatorConfig]) -> AsyncIterator[None]:
    """Serves until the block ends; resumes the run of `run_path` when it finds it unfinished."""
    config = app.config
    peers = Peers(
        buffer=app.connect(BufferClient, config.buffer_address),
        trainer=app.connect(TrainerClient, config.trainer_address),
        reward=app.connect(RewardClient, config.reward_address),
        connect_receiver=lambda address: WeightReceiverClient(address, channel_options(config)),
    )
    registry = WorkerRegistry(lambda address: app.connect(RolloutClient, address), config.lease_seconds)
    background = [registry.sweep]
    directory: Directory = MemoryDirectory(registry)
    if config.directory.etcd is not None:
        # Its stubs are for those alone who have etcd.
        from services.coordinator.etcd import EtcdDirectory

        directory = EtcdDirectory(registry, config.directory)
        background.append(directory.run)
    runs = Runs(config, peers, registry, directory)
    app.on_drain(runs.end_watches)
    app.add(FULL_NAME, add_CoordinatorServiceServicer_to_server, CoordinatorService(config, registry, runs))
    tasks = start_tasks(*(each() for each in background))
    try:
        await runs.resume()
        app.set_ready(FULL_NAME, True)
        yield
    finally:
        await runs.close()
        await end_tasks(*tasks)


def main() -> None:
    """Runs until SIGTERM or SIGINT."""
    run(load_config(CoordinatorConfig), lifespan)


if __name__ == "__main__":
    main()
