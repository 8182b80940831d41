"""Segments between a real buffer and an engine that stands still when told to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from perigee.buffer.client import BufferClient
from perigee.errors import DataLossError, UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from services.buffer.config import BufferConfig, OffloadConfig
from services.buffer.service import lifespan
from services.kit.server import serving
from services.rollout.extend import SegmentResult, extend_trajectories
from services.rollout.model import open_policy
from services.rollout.segment import SegmentSettings
from services.rollout.worker import DRAINING, READY, Worker
from tests.fixtures.rollout import CHUNK, EOS, NewTrajectories, extend_request, rollout_config
from tests.fixtures.rollout_engine import PausedEngine

TOKENS = 3 * CHUNK + 2
_runs = itertools.count()


class Extension:
    """A call in flight whose segments have all but their last token."""

    def __init__(self, buffer: BufferClient, worker: Worker, engine: PausedEngine) -> None:
        self.engine = engine
        self.worker = worker
        self.trajectories = NewTrajectories(buffer, RolloutClient("127.0.0.1:1"), f"extend-{next(_runs)}")
        self.results: list[SegmentResult] = []

    @asynccontextmanager
    async def running(self, ids: Sequence[str]) -> AsyncIterator[asyncio.Task[None]]:
        """Extends trajectories; the block runs once every segment waits for its last token."""
        request = extend_request(
            self.trajectories.run_id,
            await self.trajectories.lease(ids),
            token_budget=TOKENS,
            max_response_tokens=TOKENS,
        )
        task = asyncio.create_task(self._extend(request))
        try:
            async with asyncio.timeout(30):
                while self.engine.waiting < len(ids):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _extend(self, request: pb.ExtendTrajectoriesRequest) -> None:
        settings = SegmentSettings(request.sampling, request.repetition_stop, (EOS,), CHUNK)
        async for batch in extend_trajectories(self.worker, self.trajectories.buffer, request, settings):
            self.results += batch


@pytest.fixture
async def extension(policy_folder: Path, buffer_address: str, buffer_client: BufferClient) -> Extension:
    engine = PausedEngine()
    config = rollout_config(policy_folder, buffer_address)
    worker = Worker(config, open_policy(str(policy_folder), None), engine, "w")
    extension = Extension(buffer_client, worker, engine)
    worker.set_status(READY, extension.trajectories.run_id, 0)
    return extension


async def test_chunks_reach_the_buffer_while_a_segment_runs(extension: Extension) -> None:
    ids = await extension.trajectories.create([[5, 6]], k=3)
    async with extension.running(ids) as task:
        held = [await extension.trajectories.read(trajectory_id) for trajectory_id in ids]
        # What the engine has handed over does not wait for the end.
        assert [len(response.token_ids) for response in held] == [TOKENS - 1] * 3
        assert extension.results == []
        extension.engine.go_on.set()
        await task
    assert {result.trajectory_id for result in extension.results} == set(ids)
    assert [result.tokens for result in extension.results if isinstance(result, pb.SegmentEnd)] == [TOKENS] * 3
    assert len((await extension.trajectories.read(ids[0])).token_ids) == TOKENS


async def test_a_lease_taken_away_under_way_fails_the_segment(extension: Extension) -> None:
    ids = await extension.trajectories.create([[5, 6]], k=4)
    async with extension.running(ids) as task:
        await extension.trajectories.lease(ids[:2])
        extension.engine.go_on.set()
        await task
    failed = {
        result.trajectory_id: result.reason for result in extension.results if isinstance(result, pb.SegmentFailure)
    }
    ended = {result.trajectory_id for result in extension.results if isinstance(result, pb.SegmentEnd)}
    assert (set(failed), ended) == (set(ids[:2]), set(ids[2:]))
    assert all("fenced" in reason for reason in failed.values())


async def test_a_call_that_is_cancelled_ends_its_requests(extension: Extension) -> None:
    ids = await extension.trajectories.create([[5, 6]], k=4)
    async with extension.running(ids):
        assert extension.worker.running == 4
    assert (extension.worker.running, extension.engine.waiting) == (0, 0)


async def test_a_worker_that_shuts_down_hands_trajectories_back_with_all_their_tokens(extension: Extension) -> None:
    ids = await extension.trajectories.create([[5, 6]], k=4)
    async with extension.running(ids) as task:
        extension.worker.set_status(DRAINING)
        with pytest.raises(UnavailableError, match="hands 4 trajectories back"):
            await task
    # None has ended, and what was less than a chunk is in the buffer, for the next worker to go on from.
    assert extension.results == []
    for trajectory_id in ids:
        assert len((await extension.trajectories.read(trajectory_id)).token_ids) == TOKENS - 1
    assert [lease.tokens for lease in await extension.trajectories.lease(ids)] == [TOKENS - 1] * 4
    assert extension.worker.running == 0


async def test_a_trajectory_goes_on_from_files_and_one_that_is_gone_is_named(
    policy_folder: Path, tmp_path: Path
) -> None:
    offload = OffloadConfig(location=str(tmp_path / "files"), min_tokens=1)
    config = BufferConfig(data_path=tmp_path / "data", offload=offload)
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        engine = PausedEngine()
        worker = Worker(rollout_config(policy_folder, app.address), open_policy(str(policy_folder), None), engine, "w")
        extension = Extension(client, worker, engine)
        worker.set_status(READY, extension.trajectories.run_id, 0)
        engine.go_on.set()
        [trajectory_id] = await extension.trajectories.create([[5, 6]])

        async def extend() -> None:
            leases = await extension.trajectories.lease([trajectory_id])
            request = extend_request(extension.trajectories.run_id, leases, token_budget=5)
            async with asyncio.timeout(30):
                await extension._extend(request)

        async with Redis(unix_socket_path=str(tmp_path / "data/valkey.sock")) as redis, asyncio.timeout(30):
            for _ in range(2):
                await extend()
                while await redis.exists(f"perigee:{{{extension.trajectories.run_id}}}:tokens:{trajectory_id}"):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        held = await extension.trajectories.read(trajectory_id)
        assert len(held.token_ids) == 10
        for file in tmp_path.glob("files/*/*"):  # noqa: ASYNC240
            file.unlink()
        with pytest.raises(DataLossError, match=r"buffer\.offload\.location: .* does not exist"):
            await extend()
        assert worker.running == 0


async def test_a_trajectory_may_have_a_budget_of_its_own(extension: Extension) -> None:
    leases = await extension.trajectories.lease(await extension.trajectories.create([[5, 6]], k=3))
    leases[0].token_budget, leases[1].token_budget = 3, 9
    extension.engine.go_on.set()
    await extension._extend(extend_request(extension.trajectories.run_id, leases, token_budget=5))
    tokens = {end.trajectory_id: end.tokens for end in extension.results if isinstance(end, pb.SegmentEnd)}
    assert [tokens[lease.trajectory_id] for lease in leases] == [3, 9, 5]
