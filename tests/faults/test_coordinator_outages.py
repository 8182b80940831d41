"""The buffer's front, or the trainer, gone for a while in the middle of a run."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.trainer.v1.trainer_pb2_grpc import add_TrainerServiceServicer_to_server
from services.buffer.config import BufferConfig
from services.buffer.service import lifespan as buffer_lifespan
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit.config import ServerConfig
from services.kit.hf import open_tokenizer
from services.kit.server import serving
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import fake_peers, fake_server, worker_in_service

AWAY_SECONDS = 1.0


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110, the fakes tell nobody
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("peer", ["buffer", "trainer"])
async def test_a_peer_that_goes_away_is_waited_for(peer: str, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4().hex}"
    section = write_run_section(tmp_path, iterations=6, rollout={"token_budget": 6, "max_response_tokens": 24})
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    config = BufferConfig(data_path=tmp_path / "store", server=ServerConfig(drain_seconds=0.0))
    async with AsyncExitStack() as stack, AsyncExitStack() as fronts, AsyncExitStack() as trainers:
        buffer = await fronts.enter_async_context(serving(config, buffer_lifespan))
        port = int(buffer.address.rpartition(":")[2])
        peers = await stack.enter_async_context(fake_peers(buffer.address))
        # A trainer of its own, which can be cut without the others.
        trainer = fake_server(add_TrainerServiceServicer_to_server, peers.trainer)
        peers.trainer_address = await trainers.enter_async_context(trainer)
        trainer_port = int(peers.trainer_address.rpartition(":")[2])
        app = await stack.enter_async_context(serving(CoordinatorConfig(**peers.settings()), lifespan))
        client = await stack.enter_async_context(CoordinatorClient.connect(app.address))
        worker = peers.add_worker("a", tokenizer, call_seconds=0.05)
        await stack.enter_async_context(worker_in_service(worker, client.target))
        request = pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / "run"))
        await client.start_run(request)
        await wait_until(lambda: len(peers.trainer.trained) >= 2)
        if peer == "buffer":
            await fronts.aclose()
            await asyncio.sleep(AWAY_SECONDS)
            again = config.model_copy(update={"server": ServerConfig(port=port, drain_seconds=0.0)})
            await fronts.enter_async_context(serving(again, buffer_lifespan))
        else:
            await trainers.aclose()
            await asyncio.sleep(AWAY_SECONDS)
            peers.trainer.version = 0
            back = fake_server(add_TrainerServiceServicer_to_server, peers.trainer, trainer_port)
            await trainers.enter_async_context(back)
        last = pb.RunSnapshot()
        async for response in client.watch_run(pb.WatchRunRequest(run_id=run_id), timeout_s=90):
            last = response.run
        assert (last.phase, last.error) == (pb.RUN_PHASE_FINISHED, "")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    committed = {request.iteration: request for request in peers.trainer.trained}
    ids = [m.trajectory_id for r in committed.values() for g in r.groups for m in g.trajectories]
    assert len(ids) == len(set(ids)) == sum(line["train/trajectories"] for line in lines)
    # The iteration that was cut gave no second budget.
    given = [m.tokens_by_version for r in committed.values() for g in r.groups for m in g.trajectories]
    assert max(n for by_version in given for version, n in by_version.items() if version) == 6
