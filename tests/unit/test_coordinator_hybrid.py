"""Workers leave the trainer's devices before it takes them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perigee.errors import FailedPreconditionError, InternalError, PerigeeError, UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.client import TrainerClient
from services.coordinator.config import CoordinatorConfig
from services.coordinator.hybrid import SharedDevices
from services.coordinator.run_config import HybridConfig
from services.coordinator.workers import AWAY, EMPTY, READY, WorkerRegistry


class Client:
    """Of a worker that fails to leave as often as there are errors."""

    def __init__(self) -> None:
        self.errors: list[PerigeeError] = []
        self.on_call: Callable[[], None] = lambda: None
        self.hangs = False
        self.called = asyncio.Event()

    async def leave(self, request: rollout_pb2.LeaveRequest, *, timeout_s: float) -> rollout_pb2.LeaveResponse:
        self.on_call()
        self.called.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop()
        return rollout_pb2.LeaveResponse()


class Devices(SharedDevices):
    """Shared devices with one worker, and what the trainer and the watchers of the run are told."""

    def __init__(self, *names: str) -> None:
        self.client = Client()
        # It has been there for longer than workers take to register.
        clock = itertools.count(step=10).__next__
        registry = WorkerRegistry(lambda _: cast(RolloutClient, self.client), lease_seconds=10.0, clock=clock)
        self.worker = registry.register("w", "127.0.0.1:1", 4, 0, READY)
        self.onloads = 0
        self.reports: list[str] = []
        config: Any = SimpleNamespace(deployment="hybrid", hybrid=HybridConfig(workers=names))
        settings = CoordinatorConfig(weights={"retry_s": 0.01})  # type: ignore[arg-type]
        trainer, convert = cast(TrainerClient, self), self.make_image
        super().__init__("run", config, settings, registry, trainer, self.reports.append, convert)

    async def make_image(self, version: int) -> None:
        """Makes nothing."""

    async def give_to_trainer(self) -> None:
        """Gives the devices to a trainer that does nothing."""
        async with self.trainers_turn():
            pass

    async def onload(self, *_: object, timeout_s: float) -> None:
        """As the trainer's client."""
        self.onloads += 1


async def test_a_worker_that_fails_to_leave_is_told_again() -> None:
    devices = Devices()
    devices.client.errors = [InternalError("the engine failed and is restarted"), UnavailableError("it starts again")]
    await devices.give_to_trainer()
    assert devices.worker.status == AWAY
    assert devices.onloads == 1
    assert not devices.reports


async def test_a_worker_that_died_is_waited_for_until_its_lease_ends() -> None:
    devices = Devices()
    calls: list[None] = []

    def end_lease() -> None:
        calls.append(None)
        devices.client.errors = [UnavailableError("refused")]
        if len(calls) == 3:
            devices.registry.deregister("w", devices.worker.lease_epoch)

    devices.client.on_call = end_lease
    await devices.give_to_trainer()
    assert len(calls) == 3
    assert devices.onloads == 1


async def test_workers_of_a_coordinator_that_starts_again_register_before_the_trainer_takes_the_devices() -> None:
    devices = Devices()
    client = cast(RolloutClient, devices.client)
    devices.registry = WorkerRegistry(lambda _: client, lease_seconds=0.03, clock=lambda: 0.0)
    giving = asyncio.create_task(devices.give_to_trainer())
    await asyncio.sleep(0)
    worker = devices.registry.register("w", "127.0.0.1:1", 4, 0, READY)
    await giving
    assert (worker.status, devices.onloads) == (AWAY, 1)


async def test_nobody_waits_for_the_answer_of_a_worker_that_hangs_after_its_lease() -> None:
    devices = Devices()
    devices.client.hangs = True
    giving = asyncio.create_task(devices.give_to_trainer())
    await devices.client.called.wait()
    assert not devices.onloads
    devices.registry.deregister("w", devices.worker.lease_epoch)
    async with asyncio.timeout(60):
        await giving
    assert devices.onloads == 1


async def test_a_worker_that_registers_while_the_trainer_has_the_devices_leaves() -> None:
    devices = Devices()
    async with devices.trainers_turn(), asyncio.timeout(60):
        devices.client.called.clear()
        restarted = devices.registry.register("w", "127.0.0.1:1", 4, 0, EMPTY)
        await devices.client.called.wait()
    assert restarted.status == AWAY
    devices.client.called.clear()
    devices.registry.register("w", "127.0.0.1:1", 4, 0, EMPTY)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not devices.client.called.is_set()


async def test_a_worker_that_registers_beside_the_trainer_and_stays_is_reported() -> None:
    devices = Devices()
    async with devices.trainers_turn(), asyncio.timeout(60):
        devices.client.errors = [FailedPreconditionError("the engine cannot sleep")]
        devices.registry.register("w", "127.0.0.1:1", 4, 0, EMPTY)
        while not devices.reports:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert devices.reports == ["Workers did not leave the shared devices: w: the engine cannot sleep"]


async def test_a_worker_that_refuses_to_leave_keeps_the_trainer_off_the_devices() -> None:
    devices = Devices()
    devices.client.errors = [FailedPreconditionError("run run is in iteration 2, not 1")]
    with pytest.raises(UnavailableError, match="did not leave the shared devices: w: run run is in iteration 2"):
        await devices.give_to_trainer()
    assert not devices.onloads


async def test_the_workers_of_the_trainers_host_or_those_named_leave() -> None:
    for names, leaves in (((), True), (("w",), True), (("v",), False)):
        devices = Devices(*names)
        assert devices.leaves(devices.worker) is leaves
        cast(Any, devices.config).deployment = "separate"
        assert not devices.leaves(devices.worker)


async def test_it_is_told_once_when_no_worker_is_on_the_devices() -> None:
    devices = Devices("v")
    for _ in range(2):
        await devices.give_to_trainer()
    assert devices.worker.status == READY
    [report] = devices.reports
    assert "run.hybrid.workers" in report
