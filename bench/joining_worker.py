"""Seconds from a worker's registration to its first token, beside those of its pull.

    python -m bench.joining_worker MODEL_FOLDER

The engine of each worker runs, with meaningless weights, when it registers. A first worker is filled by the trainer;
the others fill from it while the trainer trains, while its weights are on disk, and after it was killed. Workers have
hosts (127.0.0.2 and so on) and folders of shared memory of their own, as on other machines. The coordinator's registry,
directory and pulls are in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.machine import describe_machine
from bench.rollout_stack import fine_tune, start_service
from perigee.buffer.packing import pack_token_ids
from perigee.cli.stack import HOST, START_TIMEOUT_S, pick_ports, wait_ready
from perigee.coordinator.v1.coordinator_pb2_grpc import add_CoordinatorServiceServicer_to_server
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2
from services.coordinator.__main__ import FULL_NAME
from services.coordinator.config import CoordinatorConfig
from services.coordinator.directory import MemoryDirectory
from services.coordinator.service import CoordinatorService
from services.coordinator.weight_sync import WeightSync
from services.coordinator.workers import Worker, WorkerRegistry
from services.kit.process import ChildProcess
from services.kit.server import App, end_tasks, serving

RUN = "bench"
MIB = 1 << 20
# More than fit into the time in which a worker starts: the caller leaves.
TRAINING_STEPS = 100_000


@dataclass
class Stack:
    """A trainer in a process of its own, and the parts of a coordinator that fill workers."""

    folder: Path
    settings: dict[str, Any]
    trainer: TrainerClient
    process: ChildProcess
    registry: WorkerRegistry
    exits: AsyncExitStack
    sync: WeightSync | None = None
    coordinator: str = ""
    pulls: list[weights_pb2.PullResponse] = field(default_factory=list)
    workers: int = 0

    def connect(self, address: str) -> WeightReceiverClient:
        """Returns a client that keeps the responses of pulls."""
        stack = self

        class Client(WeightReceiverClient):
            """Keeps what a pull says."""

            async def pull(
                self, request: weights_pb2.PullRequest, *, timeout_s: float = 600.0
            ) -> weights_pb2.PullResponse:
                response = await super().pull(request, timeout_s=timeout_s)
                stack.pulls.append(response)
                return response

        return Client(address)

    async def join(self) -> dict[str, Any]:
        """Starts a worker; returns the seconds from its registration on."""
        name, host = f"worker-{self.workers}", f"127.0.0.{self.workers + 2}"
        self.workers += 1
        [port] = pick_ports(1)
        images = Path(self.exits.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        settings = self.settings | {
            "server.host": host,
            "worker_id": name,
            "coordinator_address": self.coordinator,
            "weights.shared_memory_dir": str(images),
        }
        logs = self.folder / name
        logs.mkdir()
        process = await start_service(logs, "rollout", port, settings)
        self.exits.push_async_callback(process.stop)
        await wait_ready(process, f"{host}:{port}", "")
        worker = await self._wait(lambda: next((w for w in self.registry.all() if w.worker_id == name), None))
        registered = time.monotonic()
        await self._wait(lambda: worker if worker in self.registry.with_version(0) else None)
        filled = time.monotonic()
        await generate_token(worker.client)
        first = time.monotonic()
        pull = self.pulls[-1]
        seconds = pull.transfer_seconds + pull.commit_seconds
        return {
            "filled_s": round(filled - registered, 3),
            "first_token_s": round(first - registered, 3),
            "pull_s": round(seconds, 3),
            "beyond_the_pull_s": round(first - registered - seconds, 3),
            "sources": list(pull.sources),
        }

    async def _wait(self, find: Any) -> Worker:
        """Returns the worker that is found at some change; raises TimeoutError."""
        changed = asyncio.Event()
        async with asyncio.timeout(START_TIMEOUT_S):
            with self.registry.watch(changed.set):
                while (worker := find()) is None:
                    changed.clear()
                    await changed.wait()
        found: Worker = worker
        return found

    async def train(self) -> None:
        """Trains until it is cancelled."""
        dataset = self.folder / "sft.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": f"{i}", "response": "1 2 3"}) + "\n" for i in range(16)))
        await fine_tune(self.trainer, RUN, dataset, 1, TRAINING_STEPS)


async def generate_token(client: RolloutClient) -> None:
    """Returns when a worker has generated one token."""
    item = rollout_pb2.GenerateItem(id="0", prompt_token_ids=pack_token_ids([3, 4, 5]), max_tokens=1)
    request = rollout_pb2.GenerateRequest(items=[item], sampling=rollout_pb2.Sampling(temperature=0))
    async for _ in client.generate(request):
        pass


@asynccontextmanager
async def running_stack(model: Path, dtype: str) -> AsyncIterator[Stack]:
    """Starts the trainer, and serves registrations."""
    async with AsyncExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        [port] = pick_ports(1)
        settings = {"model": str(model), "dtype": dtype}
        own = {"run_path": str(folder / "run"), "offload_path": str(folder), "threads": 1}
        process = await start_service(folder, "trainer", port, settings | own)
        exits.push_async_callback(process.stop)
        await wait_ready(process, f"{HOST}:{port}", "")
        trainer = await exits.enter_async_context(TrainerClient.connect(f"{HOST}:{port}"))
        await trainer.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=0))
        config = CoordinatorConfig.model_validate({"weights": {"transfer": "pull"}})
        registry = WorkerRegistry(RolloutClient.connect, config.lease_seconds)
        stack = Stack(
            folder, settings | {"kv_cache_bytes": 64 * MIB, "max_model_len": 512}, trainer, process, registry, exits
        )

        @asynccontextmanager
        async def lifespan(app: App[CoordinatorConfig]) -> AsyncIterator[None]:
            service = CoordinatorService(config, registry, None)  # type: ignore[arg-type]
            app.add(FULL_NAME, add_CoordinatorServiceServicer_to_server, service)
            yield

        app = await exits.enter_async_context(serving(config, lifespan))
        stack.coordinator = app.address
        context: Any = SimpleNamespace(
            run_id=RUN,
            config=SimpleNamespace(deployment="separate"),
            settings=config,
            registry=registry,
            directory=MemoryDirectory(registry),
            status=SimpleNamespace(set_waiting=print, report=print),
            peers=SimpleNamespace(trainer=trainer, connect_receiver=stack.connect),
        )
        stack.sync = WeightSync(context)
        # As in a rollout phase.
        await exits.enter_async_context(stack.sync.run(0))
        yield stack


async def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print(json.dumps(describe_machine()), flush=True)
    async with running_stack(options.model, options.dtype) as stack:
        print("first, from the trainer:", await stack.join(), flush=True)
        training = asyncio.create_task(stack.train())
        print("trainer trains:", await stack.join(), flush=True)
        assert not training.done()
        await end_tasks(training)
        assert stack.sync is not None
        await stack.sync.wait_until_free()
        await stack.trainer.offload(pb.OffloadRequest(run_id=RUN, iteration=1))
        print("trainer is offloaded:", await stack.join(), flush=True)
        stack.process.kill()
        print("trainer is gone:", await stack.join(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
