"""Pushes: under way when nobody needs them, by a trainer that restarted, and to workers that join meanwhile."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

from perigee.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    PerigeeError,
    UnavailableError,
)
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.v1 import trainer_pb2
from perigee.weights.v1 import weights_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.context import RunContext
from services.coordinator.directory import MemoryDirectory
from services.coordinator.run_config import HybridConfig
from services.coordinator.weight_sync import WeightSync
from services.coordinator.workers import AWAY, EMPTY, READY, WorkerRegistry


def make_context(
    trainer: object,
    deployment: str = "separate",
    registry: WorkerRegistry | None = None,
    transfer: str = "push",
    connect_receiver: object = None,
) -> RunContext:
    registry = registry or WorkerRegistry(RolloutClient.connect, lease_seconds=10.0)
    context = SimpleNamespace(
        run_id="run",
        config=SimpleNamespace(deployment=deployment, hybrid=HybridConfig(workers=("a", "b"))),
        settings=CoordinatorConfig.model_validate({"weights": {"transfer": transfer}}),
        registry=registry,
        directory=MemoryDirectory(registry),
        status=SimpleNamespace(set_waiting=print, report=print),
        peers=SimpleNamespace(trainer=trainer, connect_receiver=connect_receiver),
    )
    return cast(RunContext, context)


class Sync(WeightSync):
    """Pushes that end when the test says so, by a trainer that is there or away."""

    def __init__(self, deployment: str, is_away: bool = False) -> None:
        super().__init__(make_context(self, deployment))
        self.is_away = is_away
        self.begun, self.arrived, self.ended = asyncio.Event(), asyncio.Event(), False

    async def get_state(self, *_: object, timeout_s: float) -> trainer_pb2.GetStateResponse:
        """As the trainer's client."""
        if self.is_away:
            raise UnavailableError("refused")
        return trainer_pb2.GetStateResponse()

    async def push(self, version: int) -> int:
        self.begun.set()
        await self.arrived.wait()
        self.ended = True
        return 1


async def work(sync: Sync, error: Exception | None = None) -> None:
    async with sync.run(1):
        await sync.begun.wait()
        if error is not None:
            raise error


async def test_a_push_under_way_is_cut_unless_the_worker_must_leave_next() -> None:
    separate, shared = Sync("separate"), Sync("hybrid")
    await work(separate)
    assert not separate.ended
    working = asyncio.create_task(work(shared))
    await shared.begun.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not working.done()
    shared.arrived.set()
    await working
    assert shared.ended


@pytest.mark.parametrize("deployment", ["separate", "hybrid"])
async def test_a_block_that_failed_waits_for_no_push(deployment: str) -> None:
    sync = Sync(deployment)
    with pytest.raises(ValueError, match="failed"):
        await work(sync, ValueError("failed"))
    assert not sync.ended


async def test_a_trainer_that_is_away_at_the_end_has_no_push() -> None:
    await work(Sync("separate", is_away=True))


class Pod:
    """A trainer that has restarted, and two workers on its devices: `a` holds version 1, `b` none. Tells of each call.

    `broken` are workers that do not come back.
    """

    def __init__(self, broken: str = "") -> None:
        self.calls: list[str] = []
        self.broken = broken
        self.version, self.offloaded = 0, False
        self.registry = WorkerRegistry(
            lambda name: cast(RolloutClient, PodWorker(self, name[0])), 60.0, clock=itertools.count(step=60).__next__
        )
        self.status = {"a": READY, "b": EMPTY}
        for name, status in self.status.items():
            self.registry.register(name, f"{name}:1", 4, 0, status)
        self.registry.mark_pushed(self.registry.all()[0], 1)
        self.sync = WeightSync(make_context(self, "hybrid", self.registry))

    async def get_state(self, *_: object, timeout_s: float) -> trainer_pb2.GetStateResponse:
        return trainer_pb2.GetStateResponse(policy_version=self.version, offloaded=self.offloaded)

    async def onload(self, *_: object, timeout_s: float) -> None:
        self.calls.append("onload")

    async def load_checkpoint(self, request: trainer_pb2.LoadCheckpointRequest, *, timeout_s: float) -> None:
        assert set(self.status.values()) == {AWAY}
        self.calls.append("load")
        self.version = request.policy_version

    async def offload(self, *_: object, timeout_s: float) -> None:
        self.calls.append("offload")
        self.offloaded = True

    async def push_weights(
        self, request: trainer_pb2.PushWeightsRequest, *, timeout_s: float
    ) -> trainer_pb2.PushWeightsResponse:
        if request.policy_version != self.version:
            raise FailedPreconditionError(f"the trainer has version {self.version} loaded")
        names = [target.worker_id for target in request.targets]
        self.calls.append(f"push {' '.join(names)}".strip())
        response = trainer_pb2.PushWeightsResponse()
        for name in names:
            response.outcomes.add(worker_id=name, committed=name not in self.broken, reason="no engine")
        return response


class PodWorker:
    """The client of a worker of a Pod."""

    def __init__(self, pod: Pod, name: str) -> None:
        self._pod, self._name = pod, name

    async def leave(self, *_: object, timeout_s: float) -> rollout_pb2.LeaveResponse:
        self._pod.calls.append(f"leave {self._name}")
        self._pod.status[self._name] = AWAY
        return rollout_pb2.LeaveResponse()

    async def get_state(self, *_: object, timeout_s: float) -> rollout_pb2.GetStateResponse:
        return rollout_pb2.GetStateResponse(status=self._pod.status[self._name], policy_version=1)

    async def come_back(self, *_: object, timeout_s: float) -> rollout_pb2.ComeBackResponse:
        assert self._pod.offloaded
        self._pod.calls.append(f"come back {self._name}")
        if self._name in self._pod.broken:
            raise InternalError("the engine failed in the commit and is restarted")
        return rollout_pb2.ComeBackResponse(policy_version=1)


async def test_workers_leave_before_a_trainer_that_restarted_loads_what_one_of_them_lacks() -> None:
    pod = Pod()
    assert await pod.sync.push(1) == 2
    assert pod.calls == [
        *("leave a", "leave b", "onload", "load"),
        # What a worker holds is not sent again.
        *("push", "offload", "come back a", "push b"),
    ]


async def test_a_worker_that_does_not_come_back_is_lost_and_not_the_run() -> None:
    pod = Pod(broken="a")
    assert await pod.sync.push(1) == 1
    assert pod.calls[-2:] == ["come back a", "push a b"]
    assert [worker.worker_id for worker in pod.registry.with_version(1)] == ["b"]


class Pulls:
    """Workers whose pulls end when the test says so, and a trainer that publishes as often as it is asked."""

    def __init__(self) -> None:
        self.sources: dict[str, list[str]] = {}
        self.arrived: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.published = 0

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(pull=partial(self.pull, address))

    async def pull(self, address: str, request: weights_pb2.PullRequest, timeout_s: float) -> weights_pb2.PullResponse:
        """As a receiver's client."""
        self.sources[address] = list(request.sources)
        await self.arrived[address].wait()
        return weights_pb2.PullResponse()

    async def publish_weights(self, *_: object, timeout_s: float) -> trainer_pb2.PublishWeightsResponse:
        """As the trainer's client."""
        self.published += 1
        return trainer_pb2.PublishWeightsResponse(image_id="image", source="trainer:1")

    async def get_state(self, *_: object, timeout_s: float) -> trainer_pb2.GetStateResponse:
        return trainer_pb2.GetStateResponse()


async def test_a_worker_that_joins_waits_for_no_other_ones_pull_and_reads_from_it() -> None:
    pulls = Pulls()
    context = make_context(pulls, transfer="pull", connect_receiver=pulls.connect)
    registry = context.registry

    async def until_filled(count: int) -> None:
        changed = asyncio.Event()
        with registry.watch(changed.set):
            while len(registry.with_version(1)) < count:
                changed.clear()
                await changed.wait()

    async with asyncio.timeout(30), WeightSync(context).run(1):
        for name in ("slow", "quick", "late"):
            registry.register(name, f"{name}:1", 4, 0, EMPTY)
            while f"{name}:1" not in pulls.sources:  # noqa: ASYNC110
                await asyncio.sleep(0)
            if name != "slow":
                pulls.arrived[f"{name}:1"].set()
                await until_filled(1 if name == "quick" else 2)
    assert pulls.sources == {
        "slow:1": ["trainer:1"],
        "quick:1": ["slow:1", "trainer:1"],
        "late:1": ["slow:1", "quick:1", "trainer:1"],
    }
    # Once somebody has the weights, nobody waits for the trainer to say so.
    assert pulls.published == 2


@pytest.mark.parametrize("error", [UnavailableError("refused"), DeadlineExceededError("frozen")])
async def test_a_trainer_that_is_gone_or_frozen_keeps_nobody_from_what_a_worker_lends(error: PerigeeError) -> None:
    async def publish(*_: object, timeout_s: float) -> trainer_pb2.PublishWeightsResponse:
        raise error

    pulls = Pulls()
    context = make_context(pulls, transfer="pull", connect_receiver=pulls.connect)
    context.directory.publish("run", 1, await pulls.publish_weights(timeout_s=1.0))
    context.directory.add("image", context.registry.register("old", "old:1", 4, 1, READY))
    joining = context.registry.register("new", "new:1", 4, 0, EMPTY)
    pulls.arrived["new:1"].set()
    setattr(pulls, "publish_weights", publish)  # noqa: B010
    sync = WeightSync(context)
    # One that has failed before asks the trainer again.
    sync._retry_at[joining] = 0.0
    await sync._pull_to([joining], 1, [])
    assert (joining.pushed_version, pulls.sources["new:1"]) == (1, ["old:1", "trainer:1"])


async def test_what_is_wrong_with_pulled_weights_is_an_event_and_comes_once_for_each_version() -> None:
    refused = FailedPreconditionError("2 nats off: refused")
    answers: list[FailedPreconditionError | weights_pb2.PullResponse] = [
        *[refused] * 2,
        weights_pb2.PullResponse(warning="0.2 nats off"),
        weights_pb2.PullResponse(),
        refused,
        weights_pb2.PullResponse(),
    ]

    async def pull(*_: object, timeout_s: float) -> weights_pb2.PullResponse:
        answer = answers.pop(0)
        if isinstance(answer, FailedPreconditionError):
            raise answer
        return answer

    @asynccontextmanager
    async def connect(_: str) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(pull=pull)

    context = make_context(Pulls(), transfer="pull", connect_receiver=connect)
    sync, events = WeightSync(context), list[str]()
    worker = context.registry.register("w", "w:1", 4, 0, READY)
    context.registry.report = events.append
    while answers:
        await sync._pull(worker, 1, "image", ["trainer:1"])
    refusal = "w did not take the weights: 2 nats off: refused"
    assert events == [refusal, "w: 0.2 nats off", refusal]
    assert worker.pushed_version == 1
    assert not sync._retry_at
