"""Services as processes: buffer and one rollout worker with a model folder's weights, or any; steps of a trainer."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from perigee.buffer.client import BufferClient
from perigee.cli.stack import HOST, pick_ports, start_guarded, wait_ready
from perigee.errors import UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1.trainer_pb2 import FineTuneRequest, Optimizer, PushTarget
from services.kit.process import ChildProcess
from services.rollout.config import RolloutConfig
from services.weights.config import WeightsConfig

POLICY_VERSION = 1


@dataclass(frozen=True)
class RolloutStack:
    """Clients of the two services; the worker has POLICY_VERSION of the run."""

    run_id: str
    buffer: BufferClient
    rollout: RolloutClient


@asynccontextmanager
async def rollout_stack(folder: Path, config: RolloutConfig, run_id: str) -> AsyncIterator[RolloutStack]:
    """Starts both processes, with data and logs in `folder`, and pushes the weights of `config.model`.

    Raises UnavailableError with the last error of its log when one of them ends or does not get ready.
    """
    buffer_port, rollout_port = pick_ports(2)
    buffer_address, rollout_address = f"{HOST}:{buffer_port}", f"{HOST}:{rollout_port}"
    settings = config.model_dump(mode="json", exclude_unset=True)
    settings |= {"buffer_address": buffer_address, "coordinator_address": None}
    processes: list[ChildProcess] = []
    try:
        processes.append(await start_service(folder, "buffer", buffer_port, {"data_path": str(folder / "buffer")}))
        processes.append(await start_service(folder, "rollout", rollout_port, settings))
        await wait_ready(processes[0], buffer_address, "perigee.buffer.v1.BufferService")
        await wait_ready(processes[1], rollout_address, "")
        await _push_weights(Path(config.model), run_id, rollout_address)
        async with BufferClient.connect(buffer_address) as buffer, RolloutClient.connect(rollout_address) as rollout:
            yield RolloutStack(run_id, buffer, rollout)
    finally:
        await asyncio.gather(*(process.stop() for process in processes))


async def start_service(folder: Path, name: str, port: int, settings: Mapping[str, object]) -> ChildProcess:
    """Starts a service, which writes its log into the folder, on a port."""
    arguments = [sys.executable, "-m", f"services.{name}", "--set", f"server.port={port}"]
    for field, value in settings.items():
        arguments += ["--set", f"{field}={json.dumps(value)}"]
    return await start_guarded(name, arguments, folder / f"{name}.log")


async def fine_tune(trainer: TrainerClient, run_id: str, dataset: Path, version: int, steps: int = 2) -> float:
    """Has a trainer take supervised steps, which make a version; returns the last loss."""
    request = FineTuneRequest(
        run_id=run_id,
        dataset_path=str(dataset),
        steps=steps,
        batch_size=4,
        max_tokens_per_microbatch=64,
        new_version=version,
        optimizer=Optimizer(learning_rate=1e-4, beta1=0.9, beta2=0.95, min_lr_ratio=1.0),
    )
    return [response async for response in trainer.fine_tune(request)][-1].loss


async def _push_weights(model: Path, run_id: str, address: str) -> None:
    """Pushes the weights, again while the worker's engine starts."""
    # They load torch, whose pages a bench would share that measures the memory of services.
    from safetensors.torch import load_file

    from services.weights.manifest import export_image
    from services.weights.send import WeightSender

    config = WeightsConfig()
    image = export_image(run_id, POLICY_VERSION, load_file(model / "model.safetensors").items(), config.max_shard_bytes)
    sender = WeightSender(config)
    try:
        (outcome,) = await sender.push(image, [PushTarget(worker_id="worker", address=address)])
    finally:
        image.close()
        await sender.close()
    if not outcome.committed:
        raise UnavailableError(f"The worker did not take the weights: {outcome.reason}")
