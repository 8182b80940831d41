"""Several buffers at once: races between replicas, and the servers that a buffer may or may not use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from services.buffer.config import BufferConfig, LocalServerConfig
from services.buffer.local_server import local_server
from services.buffer.service import lifespan
from services.kit.config import load_config
from services.kit.server import serving


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A Valkey server that belongs to no buffer."""
    async with local_server(tmp_path_factory.mktemp("shared"), LocalServerConfig()) as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def replicas(shared_url: str) -> AsyncIterator[Sequence[BufferClient]]:
    """Clients of two buffers on that server."""
    config = BufferConfig(redis_url=shared_url)
    async with (
        serving(config, lifespan) as first,
        serving(config, lifespan) as second,
        BufferClient.connect(first.address) as one,
        BufferClient.connect(second.address) as two,
    ):
        yield one, two


async def start_run(client: BufferClient, run_id: str) -> None:
    await client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="d"))
    prompt = pack_token_ids([1])
    new = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=prompt, trajectory_ids=["t"])
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[new]))


async def test_racing_leases_get_different_epochs_and_the_last_one_writes(replicas: Sequence[BufferClient]) -> None:
    await start_run(replicas[0], "leases")
    request = pb.LeaseTrajectoriesRequest(run_id="leases", worker_id="w", trajectory_ids=["t"])
    responses = await asyncio.gather(*(replicas[index % 2].lease_trajectories(request) for index in range(40)))
    epochs = [response.leases[0].epoch for response in responses]
    assert sorted(epochs) == list(range(1, 41))

    def append(epoch: int) -> pb.AppendChunksRequest:
        chunk = pb.Chunk(
            trajectory_id="t",
            epoch=epoch,
            token_ids=pack_token_ids([epoch]),
            logprobs=pack_logprobs([-1]),
            versions=[pb.VersionSpan(policy_version=1, tokens=1)],
        )
        return pb.AppendChunksRequest(run_id="leases", chunks=[chunk])

    answers = await asyncio.gather(*(replicas[epoch % 2].append_chunks(append(epoch)) for epoch in epochs))
    outcomes = {epoch: answer.outcomes[0] for epoch, answer in zip(epochs, answers, strict=True)}
    assert outcomes.pop(40) == pb.APPEND_OUTCOME_APPENDED
    assert set(outcomes.values()) == {pb.APPEND_OUTCOME_FENCED}


async def test_the_same_chunk_through_both_replicas_is_one_chunk(replicas: Sequence[BufferClient]) -> None:
    await start_run(replicas[0], "chunks")
    lease = pb.LeaseTrajectoriesRequest(run_id="chunks", worker_id="w", trajectory_ids=["t"])
    await replicas[0].lease_trajectories(lease)
    for offset in range(0, 400, 4):
        chunk = pb.Chunk(
            trajectory_id="t",
            epoch=1,
            offset=offset,
            token_ids=pack_token_ids(range(offset, offset + 4)),
            logprobs=pack_logprobs([-1] * 4),
            versions=[pb.VersionSpan(policy_version=1, tokens=4)],
        )
        request = pb.AppendChunksRequest(run_id="chunks", chunks=[chunk])
        answers = await asyncio.gather(*(replica.append_chunks(request) for replica in replicas))
        assert sorted(answer.outcomes[0] for answer in answers) == [1, 2]
    (piece,) = [piece async for piece in replicas[1].read_trajectories("chunks", ["t"])]
    assert list(unpack_token_ids(piece.token_ids)) == list(range(400))
    assert piece.logprobs == b""
    assert [(span.policy_version, span.tokens) for span in piece.versions] == [(1, 400)]


async def test_of_racing_commits_one_wins(replicas: Sequence[BufferClient]) -> None:
    await start_run(replicas[0], "commits")
    same = pb.CommitIterationRequest(run_id="commits", iteration=1, policy_version=1, consumed_group_ids=["g"])
    answers = await asyncio.gather(*(replicas[index % 2].commit_iteration(same) for index in range(20)))
    assert sorted(answer.duplicate for answer in answers) == [False] + [True] * 19

    async def commit(index: int) -> bool:
        request = pb.CommitIterationRequest(run_id="commits", iteration=2, coordinator_state=bytes([index]))
        try:
            await replicas[index % 2].commit_iteration(request)
        except AbortedError:
            return False
        return True

    assert sum(await asyncio.gather(*(commit(index) for index in range(20)))) == 1


async def test_environment_variable_points_at_the_server(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERIGEE_REDIS_URL", shared_url)
    config = load_config(BufferConfig, [])
    assert config.redis_url.get_secret_value() == shared_url
    assert shared_url not in repr(config)


async def test_without_a_sync_nothing_at_stake_is_acknowledged(shared_url: str) -> None:
    redis = Redis.from_url(shared_url)
    config = BufferConfig.model_validate({"redis_url": shared_url})
    hasty = config.model_copy(update={"durability_timeout_s": 0.2})
    try:
        # The trajectory has to be there: a lease that is refused writes nothing, and has nothing to wait for.
        async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
            await start_run(client, "synced")
        await redis.config_set("appendfsync", "no")
        async with serving(hasty, lifespan) as app, BufferClient.connect(app.address) as client:
            with pytest.raises(UnavailableError, match="did not sync its append-only file within"):
                await start_run(client, "unsynced")
            lease = pb.LeaseTrajectoriesRequest(run_id="synced", worker_id="w", trajectory_ids=["t"])
            with pytest.raises(UnavailableError, match="did not sync"):
                await client.lease_trajectories(lease)
        await redis.config_set("appendfsync", "everysec")
        async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
            await start_run(client, "unsynced")
    finally:
        await redis.config_set("appendfsync", "always")
        await redis.aclose()


async def test_a_server_that_may_drop_keys_is_refused(shared_url: str) -> None:
    redis = Redis.from_url(shared_url)
    await redis.config_set("maxmemory", 1 << 30)
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(FailedPreconditionError, match="set `maxmemory-policy noeviction`"):
            async with serving(BufferConfig(redis_url=shared_url), lifespan):
                pass
    finally:
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", 0)
        await redis.aclose()


async def test_a_server_without_append_only_file_is_refused(shared_url: str) -> None:
    redis = Redis.from_url(shared_url)
    await redis.config_set("appendonly", "no")
    try:
        with pytest.raises(FailedPreconditionError, match="set `appendonly yes` there, or `durability: none` here"):
            async with serving(BufferConfig(redis_url=shared_url), lifespan):
                pass
        config = BufferConfig(redis_url=shared_url, durability="none")
        async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
            await start_run(client, "volatile")
    finally:
        await redis.config_set("appendonly", "yes")
        await redis.aclose()


async def test_a_full_server_refuses_writes_and_still_reads(shared_url: str, replicas: Sequence[BufferClient]) -> None:
    await start_run(replicas[0], "full")
    redis = Redis.from_url(shared_url)
    await redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(ResourceExhaustedError, match="maxmemory") as caught:
            await replicas[0].create_run(pb.CreateRunRequest(run_id="more", config_digest="d"))
        assert caught.value.retry_after_s
        groups = [page async for page in replicas[0].list_groups(pb.ListGroupsRequest(run_id="full"))]
        assert groups[0].groups[0].group_id == "g"
        assert [stored.tokens async for stored in replicas[1].read_trajectories("full", ["t"])] == [0]
    finally:
        await redis.config_set("maxmemory", 0)
        await redis.aclose()


async def test_a_folder_serves_one_buffer_at_a_time(tmp_path: Path) -> None:
    config = LocalServerConfig(stop_timeout_s=0.3)
    async with local_server(tmp_path, config):
        with pytest.raises(FailedPreconditionError, match="in use by another buffer"):
            async with local_server(tmp_path, config):
                pass


async def test_a_folder_may_have_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    async with serving(BufferConfig(data_path=folder), lifespan) as app, BufferClient.connect(app.address) as client:
        await start_run(client, "long")
    assert (folder / "appendonlydir").is_dir()


async def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="redis_url"):
        async with serving(BufferConfig(redis_url="localhost:6379"), lifespan):
            pass
