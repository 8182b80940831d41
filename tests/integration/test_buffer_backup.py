"""Backup and restoration of a run's Redis, as docs/operations.md has them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from redis.asyncio import Redis

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from services.buffer.config import BufferConfig, OffloadConfig
from services.buffer.service import lifespan
from services.kit.server import serving

IDS = ["t0", "t1"]


async def write_run(client: BufferClient) -> None:
    """A run at iteration 3 with a group of two trajectories, one of which is under way."""
    await client.create_run(pb.CreateRunRequest(run_id="r", config_digest="d"))
    new = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1, 2]), trajectory_ids=IDS)
    await client.create_groups(pb.CreateGroupsRequest(run_id="r", groups=[new]))
    await client.lease_trajectories(pb.LeaseTrajectoriesRequest(run_id="r", worker_id="w", trajectory_ids=IDS))
    chunks = [
        pb.Chunk(
            trajectory_id=trajectory_id,
            epoch=1,
            token_ids=pack_token_ids([5, 6, 7]),
            logprobs=pack_logprobs([-0.5, -1, -2]),
            versions=[pb.VersionSpan(policy_version=4, tokens=3)],
            end_reason=reason,
        )
        for trajectory_id, reason in zip(IDS, (pb.END_REASON_STOP, pb.END_REASON_UNSPECIFIED), strict=True)
    ]
    await client.append_chunks(pb.AppendChunksRequest(run_id="r", chunks=chunks))
    for iteration in (1, 2, 3):
        await client.commit_iteration(pb.CommitIterationRequest(run_id="r", iteration=iteration, policy_version=4))


async def read_run(client: BufferClient) -> tuple[pb.RunState, list[StoredTrajectory]]:
    state = (await client.get_run(pb.GetRunRequest(run_id="r"))).run
    return state, [stored async for stored in client.read_trajectories("r", IDS, with_logprobs=True)]


@pytest.mark.parametrize("moved", [False, True], ids=["in redis", "in a file"])
async def test_a_snapshot_restores_the_run(tmp_path: Path, moved: bool) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    offload = OffloadConfig(location=str(tmp_path / "files") if moved else None, min_tokens=3)
    async with (
        serving(BufferConfig(data_path=before, offload=offload), lifespan) as app,
        BufferClient.connect(app.address) as client,
        Redis(unix_socket_path=str(before / "valkey.sock")) as redis,
    ):
        await write_run(client)
        async with asyncio.timeout(60):
            while moved and await redis.exists("perigee:{r}:tokens:t0"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await redis.save()  # what `redis-cli --rdb` sends over the network
        saved = await read_run(client)
        # Its file outlives the group for as long as snapshots are restored.
        await client.commit_iteration(
            pb.CommitIterationRequest(run_id="r", iteration=4, policy_version=5, consumed_group_ids=["g"])
        )

    base = after / "appendonlydir"
    base.mkdir(parents=True)
    shutil.copy(before / "dump.rdb", base / "appendonly.aof.1.base.rdb")
    (base / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")
    config = BufferConfig(data_path=after, offload=offload)
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        assert await read_run(client) == saved
        commit = pb.CommitIterationRequest(run_id="r", iteration=4, policy_version=6)
        assert not (await client.commit_iteration(commit)).duplicate
        saved = await read_run(client)
    # What is written after the restoration outlives a restart.
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        assert await read_run(client) == saved
