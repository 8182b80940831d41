"""What only a GPU can show: engines that leave its memory, captured graphs, the trainer on NCCL, weights out of it.

`make gpu-check` runs these in a few minutes; elsewhere each is skipped by name.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file

from bench.rollout_stack import fine_tune, start_service
from perigee.buffer.packing import pack_token_ids
from perigee.cli.stack import HOST, pick_ports, wait_ready
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2
from services.weights.config import WeightsConfig
from services.weights.transport import MooncakeTransport
from tests.fixtures.rollout import wait_for_status
from tests.fixtures.trainer import write_dataset, write_model
from tests.fixtures.weights import equal, local_receiver

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]
GPUS = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU: engines that leave and return, graphs, NCCL, weights")
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: collectives of a trainer and of an engine over NCCL")
CARDS = [path.name for path in Path("/sys/class/infiniband").glob("*")]
needs_rdma = pytest.mark.skipif(GPUS < 1 or not CARDS, reason="needs a GPU and an RDMA card: weights over RDMA")

RUN = "gpu"
KV_CACHE_BYTES = 1 << 30
# About 30 million parameters, most of them in few large matrices.
DENSE = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 4}
DENSE |= {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
EXPERTS = DENSE | {"intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
PROMPTS = [[3, 4, 5], list(range(2, 30)), [7] * 16]


def engine_settings(model: Path, **fields: Any) -> dict[str, Any]:
    """A worker whose engine leaves most of a GPU to others."""
    settings: dict[str, Any] = {
        "model": str(model),
        "coordinator_address": None,
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.2,
        "kv_cache_bytes": KV_CACHE_BYTES,
        "enable_sleep_mode": True,
    }
    return settings | fields


def trainer_settings(model: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    """A trainer with its files in a folder."""
    return {"model": str(model), "run_path": str(folder), "offload_path": str(folder), "dtype": "bfloat16"} | fields


def used_bytes() -> int:
    """Memory of the first GPU that all processes have together."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free


@dataclass
class Trainer:
    """A trainer process and the version that it has."""

    client: TrainerClient
    dataset: Path
    version: int = 0

    async def train(self) -> float:
        """Takes two supervised steps; the last loss."""
        async with asyncio.timeout(120):
            loss = await fine_tune(self.client, RUN, self.dataset, self.version + 1)
        self.version += 1
        return loss

    async def push(self, address: str) -> None:
        """Has a worker take the version that is pushed to it."""
        target = pb.PushTarget(worker_id="worker", address=address)
        request = pb.PushWeightsRequest(run_id=RUN, policy_version=self.version, targets=[target])
        [outcome] = (await self.client.push_weights(request)).outcomes
        assert outcome.committed, outcome.reason

    async def pulled_by(self, address: str) -> None:
        """Has a receiver pull the version; an engine's log-probabilities are then compared with the trainer's."""
        published = await self.client.publish_weights(pb.PublishWeightsRequest(run_id=RUN, policy_version=self.version))
        async with WeightReceiverClient.connect(address) as receiver:
            await receiver.pull(weights_pb2.PullRequest(image_id=published.image_id, sources=[published.source]))

    async def export(self, folder: Path) -> dict[str, torch.Tensor]:
        """The tensors of the version."""
        await self.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(folder)))
        return load_file(folder / "model.safetensors")


async def generate(rollout: RolloutClient) -> list[bytes]:
    """The tokens of greedy responses."""
    items = [
        rollout_pb2.GenerateItem(id=str(n), prompt_token_ids=pack_token_ids(prompt), max_tokens=32)
        for n, prompt in enumerate(PROMPTS)
    ]
    tokens = dict.fromkeys((item.id for item in items), b"")
    request = rollout_pb2.GenerateRequest(items=items, sampling=rollout_pb2.Sampling(temperature=0))
    async for response in rollout.generate(request, timeout_s=60):
        tokens[response.id] += response.token_ids
    return list(tokens.values())


Start = Callable[..., Any]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def processes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """A function that starts a service with settings; its address."""
    async with AsyncExitStack() as stack:

        async def start(name: str, settings: dict[str, Any]) -> str:
            [port] = pick_ports(1)
            process = await start_service(tmp_path_factory.mktemp(name), name, port, settings)
            stack.push_async_callback(process.stop)
            await wait_ready(process, f"{HOST}:{port}", "")
            return f"{HOST}:{port}"

        yield start


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def start_trainer(processes: Start, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """A function that starts a trainer of a model."""
    async with AsyncExitStack() as stack:

        async def start(model: Path, **fields: Any) -> Trainer:
            folder = tmp_path_factory.mktemp("run")
            address = await processes("trainer", trainer_settings(model, folder, **fields))
            client = await stack.enter_async_context(TrainerClient.connect(address))
            return Trainer(client, write_dataset(folder / "sft.jsonl", 32))

        yield start


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def start_worker(processes: Start) -> AsyncIterator[Start]:
    """A function that starts a worker of a model and waits for its engine."""
    async with AsyncExitStack() as stack:

        async def start(model: Path, **fields: Any) -> RolloutClient:
            address = await processes("rollout", engine_settings(model, **fields))
            client = await stack.enter_async_context(RolloutClient.connect(address))
            await wait_for_status(client, rollout_pb2.WORKER_STATUS_EMPTY)
            return client

        yield start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Qwen2 that kernels for GPUs take."""
    return write_model(tmp_path_factory.mktemp("dense"), **DENSE)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def trainer(start_trainer: Start, model: Path) -> Trainer:
    """A trainer that shares the GPU with the workers of the module."""
    trainer: Trainer = await start_trainer(model)
    return trainer


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def worker(start_worker: Start, model: Path) -> RolloutClient:
    """A worker without captured graphs."""
    worker: RolloutClient = await start_worker(model)
    return worker


@needs_gpu
@pytest.mark.parametrize("residence", ["RESIDENCE_SLEEP", "RESIDENCE_RESTART"])
async def test_trainer_and_engine_take_turns_on_a_gpu(trainer: Trainer, worker: RolloutClient, residence: str) -> None:
    await trainer.push(worker.target)
    before, both = await generate(worker), used_bytes()
    offloaded = await trainer.client.offload(pb.OffloadRequest(run_id=residence))
    assert both - used_bytes() > 0.8 * offloaded.shelved_bytes
    assert await generate(worker) == before
    alone = used_bytes()
    await worker.leave(rollout_pb2.LeaveRequest(run_id=residence, residence=residence))  # type: ignore[arg-type]
    assert alone - used_bytes() > 0.9 * KV_CACHE_BYTES
    await trainer.client.onload(pb.OnloadRequest(run_id=residence))
    assert math.isfinite(await trainer.train())
    # With the weights from before the training.
    await worker.come_back(rollout_pb2.ComeBackRequest(run_id=residence))
    assert await generate(worker) == before
    await trainer.pulled_by(worker.target)


@needs_gpu
async def test_weights_leave_and_return_to_a_gpu_bit_for_bit(trainer: Trainer, tmp_path: Path) -> None:
    weights = await trainer.export(tmp_path / "before")
    await trainer.client.offload(pb.OffloadRequest(run_id=RUN))
    async with local_receiver(WeightsConfig()) as receiver:
        await trainer.pulled_by(receiver.address)
        assert equal(receiver.loaded, weights)
        await trainer.push(receiver.address)
        assert equal(receiver.loaded, weights)
    assert equal(await trainer.export(tmp_path / "after"), weights)


@needs_gpu
async def test_captured_graphs_take_new_weights(trainer: Trainer, start_worker: Start, model: Path) -> None:
    worker = await start_worker(model, enforce_eager=False)
    await trainer.push(worker.target)
    await generate(worker)
    await worker.leave(rollout_pb2.LeaveRequest(run_id=RUN, residence=rollout_pb2.RESIDENCE_SLEEP))
    await trainer.train()
    await trainer.pulled_by(worker.target)
    replayed = await generate(worker)
    # An engine that captures its graphs anew is right for certain.
    await worker.leave(rollout_pb2.LeaveRequest(run_id=RUN, iteration=1, residence=rollout_pb2.RESIDENCE_RESTART))
    await worker.come_back(rollout_pb2.ComeBackRequest(run_id=RUN, iteration=1))
    assert await generate(worker) == replayed


@needs_gpu
async def test_experts_train_and_generate_alike(start_trainer: Start, start_worker: Start, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "Qwen3Moe", tied=False, norm_topk_prob=True, **EXPERTS)
    trainer = await start_trainer(folder, router_aux_loss_coef=0.01)
    worker = await start_worker(folder)
    assert math.isfinite(await trainer.train())
    await trainer.pulled_by(worker.target)
    before = await generate(worker)
    await worker.leave(rollout_pb2.LeaveRequest(run_id=RUN, residence=rollout_pb2.RESIDENCE_SLEEP))
    await worker.come_back(rollout_pb2.ComeBackRequest(run_id=RUN))
    assert await generate(worker) == before


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def loss_alone(start_trainer: Start, model: Path) -> float:
    """The loss of a trainer of one process after its first job."""
    alone: Trainer = await start_trainer(model)
    return await alone.train()


@needs_two
@pytest.mark.parametrize("sizes", [{"data_parallel": 2}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=str)
async def test_ranks_over_nccl_train_as_one_does(
    loss_alone: float, start_trainer: Start, model: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    several = await start_trainer(model, **sizes)
    assert await several.train() == pytest.approx(loss_alone, rel=0.02)
    await several.client.offload(pb.OffloadRequest(run_id=RUN))
    async with local_receiver(WeightsConfig()) as receiver:
        await several.pulled_by(receiver.address)
        assert equal(receiver.loaded, await several.export(tmp_path / "model"))


@needs_two
async def test_an_engine_over_two_gpus_pulls_its_slices(trainer: Trainer, start_worker: Start, model: Path) -> None:
    worker = await start_worker(model, tensor_parallel_size=2)
    await trainer.pulled_by(worker.target)
    before = await generate(worker)
    await worker.leave(rollout_pb2.LeaveRequest(run_id=RUN, residence=rollout_pb2.RESIDENCE_SLEEP))
    await worker.come_back(rollout_pb2.ComeBackRequest(run_id=RUN))
    assert await generate(worker) == before


@needs_rdma
async def test_weights_go_over_rdma(start_trainer: Start, model: Path, tmp_path: Path) -> None:
    config = WeightsConfig(transport="rdma")
    MooncakeTransport(config).close()
    trainer = await start_trainer(model, weights={"transport": "rdma"})
    async with local_receiver(config) as receiver:
        await trainer.pulled_by(receiver.address)
        assert equal(receiver.loaded, await trainer.export(tmp_path / "model"))
        await trainer.push(receiver.address)
