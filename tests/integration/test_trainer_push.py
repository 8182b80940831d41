"""Weights from the trainer to receivers: every tensor as Hugging Face names it, each worker with its own outcome."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perigee.buffer.client import BufferClient
from perigee.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.client import WeightReceiverClient
from perigee.weights.v1 import weights_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.directory import MemoryDirectory
from services.coordinator.weight_sync import WeightSync
from services.coordinator.workers import READY, WorkerRegistry
from services.trainer import engine
from services.trainer.config import TrainerConfig
from services.trainer.engine import Sink
from services.trainer.megatron.parallel import join_group
from services.trainer.trainer import Trainer
from services.weights.config import WeightsConfig
from services.weights.send import WeightSender
from tests.fixtures.trainer import TrainerAt, make_groups, store_groups, train_request
from tests.fixtures.weights import equal, local_receiver

RUN = "trainer-run"


async def test_each_version_reaches_the_receiver_bit_for_bit(
    trainer: TrainerAt, buffer_client: BufferClient, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=0))
    groups = make_groups("push", 8, groups=2, k=2, spans=[[(0, 8)]])
    await store_groups(buffer_client, RUN, groups)
    pushed: list[dict[str, torch.Tensor]] = []
    async with local_receiver(WeightsConfig()) as receiver:
        targets = [
            pb.PushTarget(worker_id="there", address=receiver.address),
            pb.PushTarget(worker_id="gone", address="127.0.0.1:1"),
        ]
        for version in range(2):
            if version:
                async for _ in trainer.client.train(train_request(RUN, groups, [1.0, 0.0]), timeout_s=60):
                    pass
            request = pb.PushWeightsRequest(run_id=RUN, policy_version=version, targets=targets[: 2 - version])
            response = await trainer.client.push_weights(request, timeout_s=60)
            assert response.outcomes[0].committed
            assert receiver.versions[-1] == version
            pushed.append(dict(receiver.loaded))
            published = await trainer.client.publish_weights(
                pb.PublishWeightsRequest(run_id=RUN, policy_version=version), timeout_s=60
            )
            async with WeightReceiverClient.connect(receiver.address) as client:
                pull = weights_pb2.PullRequest(image_id=published.image_id, sources=[published.source])
                assert (await client.pull(pull, timeout_s=60)).bytes >= published.bytes
            assert receiver.versions[-2:] == [version, version]
            assert equal(receiver.loaded, pushed[-1])
            path = tmp_path / str(version)
            await trainer.client.export_model(pb.ExportModelRequest(run_id=RUN, path=str(path)))
            exported = load_file(path / "model.safetensors")
            assert exported.keys() == receiver.loaded.keys()
            assert all(torch.equal(exported[name], receiver.loaded[name]) for name in exported)
            if version == 0:
                assert not response.outcomes[1].committed
                assert "127.0.0.1:1" in response.outcomes[1].reason
        again = await trainer.client.push_weights(request, timeout_s=60)
        assert again.outcomes[0].committed
        assert again.export_seconds < response.export_seconds  # the image is there: nothing is waited for
    assert any(not torch.equal(pushed[0][name], pushed[1][name]) for name in pushed[0])
    with pytest.raises(FailedPreconditionError, match="policy_version is 0, but the trainer has version 1 loaded"):
        await trainer.client.push_weights(pb.PushWeightsRequest(run_id=RUN, policy_version=0), timeout_s=60)


async def test_workers_pull_from_one_another_while_the_trainer_is_offloaded_or_gone(trainer: TrainerAt) -> None:
    await trainer.client.load_checkpoint(pb.LoadCheckpointRequest(run_id=RUN, policy_version=0))
    settings = CoordinatorConfig.model_validate({"weights": {"transfer": "pull"}, "run_path": "unused"})
    registry = WorkerRegistry(RolloutClient.connect, lease_seconds=60)
    sources: list[list[str]] = []

    class Receiver(WeightReceiverClient):
        """Keeps from where it pulled."""

        async def pull(self, request: weights_pb2.PullRequest, *, timeout_s: float = 600.0) -> weights_pb2.PullResponse:
            response = await super().pull(request, timeout_s=timeout_s)
            sources.append(list(response.sources))
            return response

    context = SimpleNamespace(
        run_id=RUN,
        peers=SimpleNamespace(trainer=trainer.client, connect_receiver=Receiver),
        registry=registry,
        directory=MemoryDirectory(registry),
        settings=settings,
        config=SimpleNamespace(deployment="separate"),
        status=SimpleNamespace(set_waiting=print, report=print),
    )
    sync = WeightSync(context)  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        # Hosts of their own, none of them the trainer's.
        first, second, third = [
            await stack.enter_async_context(local_receiver(WeightsConfig(), host=f"127.0.0.{n}")) for n in (2, 3, 4)
        ]
        registry.register("first", first.address, 1, 0, READY)
        assert await sync.push(0) == 1
        assert await sync.push(0) == 1
        assert first.versions == [0]
        await trainer.client.offload(pb.OffloadRequest(run_id=RUN, iteration=1))
        registry.register("second", second.address, 1, 0, READY)
        assert await sync.push(0) == 2
        await trainer.client.onload(pb.OnloadRequest(run_id=RUN, iteration=1))
        sync._trainer = await stack.enter_async_context(TrainerClient.connect("127.0.0.1:1"))
        registry.register("third", third.address, 1, 0, READY)
        assert await sync.push(0) == 3
        assert sources == [[trainer.address], [first.address], [second.address]]
        assert equal(second.loaded, first.loaded)
        assert equal(third.loaded, first.loaded)
    for worker in registry.all():
        await worker.client.close()


class EngineOfOneTensor:
    """An engine without a model, since this process cannot have a second Megatron."""

    broken = False

    def run(self, command: object, sink: Sink | None = None) -> Any:
        return None if sink is None else sink([("weight", torch.ones(4))])

    def close(self) -> None:
        pass


async def test_a_run_that_follows_one_that_never_trained_pushes_its_own_image(tmp_path: Path) -> None:
    """Neither run has loaded or trained anything, so that the weights are the same."""
    config = TrainerConfig(model=str(tmp_path), run_path=str(tmp_path))
    sender = WeightSender(config.weights)
    async with BufferClient.connect("127.0.0.1:1") as buffer, local_receiver(WeightsConfig()) as receiver:
        trainer = Trainer(config, buffer, sender)
        trainer.engine = EngineOfOneTensor()  # type: ignore[assignment]
        for run_id in ("first", "second", "second"):
            await trainer.push_weights(run_id, 0, [pb.PushTarget(worker_id="there", address=receiver.address)])
        assert receiver.run_ids == ["first", "second", "second"]
        await sender.close()
        await trainer.close()


async def test_a_trainer_whose_ranks_lost_each_other_ends_with_an_error(tmp_path: Path) -> None:
    """A launcher that saw it end well would wait for the other machines."""
    config = TrainerConfig(model=str(tmp_path), run_path=str(tmp_path))
    async with BufferClient.connect("127.0.0.1:1") as buffer:
        trainer = Trainer(config, buffer, WeightSender(config.weights))
        trainer.engine = EngineOfOneTensor()  # type: ignore[assignment]
        trainer.engine.broken = True
        with pytest.raises(UnavailableError, match="start all of its processes again"):
            await trainer.close()


def test_ranks_without_a_gpu_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InvalidArgumentError, match=r"trainer\.nodes: this machine has 2 GPUs for more processes"):
        join_group(tensor=2, data=2)


def test_a_rank_that_follows_is_ended_by_rank_0_and_gives_its_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Follower:
        def __init__(self, *_: object) -> None: ...

        def follow(self) -> None:
            signal.raise_signal(signal.SIGTERM)

        def close(self) -> None:
            events.append("closed")

    monkeypatch.setattr(engine, "Engine", Follower)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    before = signal.signal(signal.SIGTERM, lambda *_: events.append("ended"))
    try:
        engine.follow(TrainerConfig(model=str(tmp_path), run_path=str(tmp_path)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert events == ["closed"]
