"""The trainer, or buffer, trainer and coordinator at once, gone for a while in the middle of a run."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from perigee.buffer.packing import unpack_token_ids
from perigee.cli.train import Cursor, watch_run
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.trainer.v1 import trainer_pb2
from perigee.trainer.v1.trainer_pb2_grpc import add_TrainerServiceServicer_to_server
from services.buffer.config import BufferConfig
from services.buffer.service import lifespan as buffer_lifespan
from services.coordinator.__main__ import lifespan
from services.coordinator.config import CoordinatorConfig
from services.kit.config import ServerConfig
from services.kit.hf import open_tokenizer
from services.kit.server import serving
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import FakePeers, fake_peers, fake_server, worker_in_service

AWAY_SECONDS = 0.5
ITERATIONS = 6


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, the fakes tell nobody
            await asyncio.sleep(0.02)


class Outages:
    """A real buffer and coordinator and a fake trainer, each of which can be cut and brought back at its address."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._running = {name: AsyncExitStack() for name in ("coordinator", "trainer", "buffer")}
        for running in self._running.values():
            stack.push_async_callback(running.aclose)
        self.addresses = dict.fromkeys(self._running, "127.0.0.1:0")
        self.peers: FakePeers

    async def start(self) -> None:
        await self._bring("buffer")
        self.peers = await self._stack.enter_async_context(fake_peers(self.addresses["buffer"]))
        await self._bring("trainer")
        self.peers.trainer_address = self.addresses["trainer"]
        await self._bring("coordinator")

    async def cut(self, *names: str) -> None:
        for name in names:
            await self._running[name].aclose()
        await asyncio.sleep(AWAY_SECONDS)

    async def bring_back(self, *names: str) -> None:
        self.peers.trainer.version = 0
        for name in reversed(names):
            await self._bring(name)

    async def _bring(self, name: str) -> None:
        port = int(self.addresses[name].rpartition(":")[2])
        server = ServerConfig(port=port, drain_seconds=0.0)
        started: AbstractAsyncContextManager[Any]
        if name == "trainer":
            started = fake_server(add_TrainerServiceServicer_to_server, self.peers.trainer, port)
        elif name == "buffer":
            started = serving(BufferConfig(data_path=self._folder / "store", server=server), buffer_lifespan)
        else:
            settings = self.peers.settings() | {"run_path": str(self._folder / "own"), "server": server}
            started = serving(CoordinatorConfig(**settings), lifespan)
        opened = await self._running[name].enter_async_context(started)
        self.addresses[name] = opened if isinstance(opened, str) else opened.address


@pytest.mark.timeout(120)
async def test_a_run_that_was_cut_trains_the_same_groups_in_the_same_order(tmp_path: Path) -> None:
    section = write_run_section(tmp_path, iterations=ITERATIONS, rollout={"token_budget": 6, "max_response_tokens": 24})
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with AsyncExitStack() as stack:
        outages = Outages(tmp_path, stack)
        await outages.start()
        requests = outages.peers.trainer.trained
        client = await stack.enter_async_context(CoordinatorClient.connect(outages.addresses["coordinator"]))
        worker = outages.peers.add_worker("a", tokenizer)
        await stack.enter_async_context(worker_in_service(worker, client.target))

        async def train(
            name: str, *outages_in_turn: Sequence[str]
        ) -> tuple[dict[int, list[trainer_pb2.TrainingGroup]], list[str]]:
            """Returns what each committed iteration trained, and the prompts in their order."""
            requests.clear()
            run_id = f"{name}-{uuid.uuid4().hex}"
            request = pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(tmp_path / run_id))
            await client.start_run(request)
            for names in outages_in_turn:
                reached = len(requests)
                await wait_until(lambda: len(requests) >= reached + 2)  # noqa: B023, it is awaited here
                await outages.cut(*names)
                await outages.bring_back(*names)
            last = pb.RunSnapshot()
            async for response in watch_run(client, request, Cursor(), lambda note: None):
                last = response.run if response.HasField("run") else last
            assert (last.phase, last.error) == (pb.RUN_PHASE_FINISHED, "")
            path = tmp_path / "own" / "runs" / run_id / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
            trained = {each.iteration: list(each.groups) for each in requests}
            assert sum(len(groups) for groups in trained.values()) == sum(line["train/groups"] for line in lines)
            first = [group.trajectories[0].trajectory_id for groups in trained.values() for group in groups]
            prompts = [outages.peers.trainer.prompts[trajectory_id] for trajectory_id in first]
            return trained, [tokenizer.decode(list(unpack_token_ids(prompt))) for prompt in prompts]

        whole, whole_prompts = await train("whole")
        worker.call_seconds = 0.05
        cut, cut_prompts = await train("cut", ["trainer"], ["coordinator", "trainer", "buffer"])
    assert len(whole) >= ITERATIONS
    # The same prompts in the same order, as many tokens of each version, the same rewards.
    assert cut_prompts == whole_prompts
    assert cut == whole
