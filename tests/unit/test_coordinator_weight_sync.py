"""What becomes of a push that is under way when nobody needs it any more."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perigee.errors import UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.trainer.v1 import trainer_pb2
from services.coordinator.config import CoordinatorConfig
from services.coordinator.context import RunContext
from services.coordinator.weight_sync import WeightSync
from services.coordinator.workers import WorkerRegistry


class Sync(WeightSync):
    """Pushes that end when the test says so, by a trainer that is there or away."""

    def __init__(self, deployment: str, is_away: bool = False) -> None:
        context: Any = SimpleNamespace(
            run_id="run",
            config=SimpleNamespace(deployment=deployment),
            settings=CoordinatorConfig(),
            registry=WorkerRegistry(RolloutClient.connect, lease_seconds=10.0),
            status=SimpleNamespace(set_waiting=lambda _: None),
            peers=SimpleNamespace(trainer=self, connect_receiver=None),
        )
        super().__init__(cast(RunContext, context))
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
