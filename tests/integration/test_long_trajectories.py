"""Many trajectories of 131,072 tokens: what holds them in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from bench.capacity import read_peak, reset_peak, service, wait_for_buffer
from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2
from services.kit.hf import open_tokenizer
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import fake_peers, worker_in_service

TRAJECTORIES, TOKENS = 64, 131_072
# Of a process, above what it has before: a fraction of the 64 MiB of tokens and log-probabilities.
MOST_MIB = 48
CHUNK = 2048
T = TypeVar("T")
LONG = pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")


async def fill(client: BufferClient, run_id: str, tokens: int) -> list[str]:
    """Creates trajectories of so many tokens each, a chunk of each in one call; returns their ids."""
    ids = [f"t{number}" for number in range(TRAJECTORIES)]
    await client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="d"))
    group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1]), trajectory_ids=ids)
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group]))
    await client.lease_trajectories(pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=ids))
    token_ids, logprobs = pack_token_ids(range(CHUNK)), pack_logprobs([-0.5] * CHUNK)
    for offset in range(0, tokens, CHUNK):
        chunks = [
            pb.Chunk(
                trajectory_id=each,
                epoch=1,
                offset=offset,
                token_ids=token_ids,
                logprobs=logprobs,
                versions=[pb.VersionSpan(policy_version=1, tokens=CHUNK)],
                end_reason=pb.END_REASON_STOP if offset + CHUNK == tokens else pb.END_REASON_UNSPECIFIED,
            )
            for each in ids
        ]
        response = await client.append_chunks(pb.AppendChunksRequest(run_id=run_id, chunks=chunks))
        assert set(response.outcomes) == {pb.APPEND_OUTCOME_APPENDED}
    return ids


@pytest.mark.parametrize("moved", [pytest.param(False, id="in redis"), pytest.param(True, id="in files", marks=LONG)])
async def test_memory_of_front_and_client_does_not_grow_with_the_tokens(tmp_path: Path, moved: bool) -> None:
    settings = {"offload.location": str(tmp_path / "files")} if moved else {}
    async with (
        service("buffer", data_path=tmp_path / "data", **settings) as (address, front),
        BufferClient.connect(address) as client,
    ):
        await wait_for_buffer(client)
        # What requests of this size take once, whatever their number.
        ids = await fill(client, "warm", TOKENS // 8)
        async for _ in client.read_trajectories("warm", ids, with_logprobs=True):
            pass
        processes = {"front": front, "client": psutil.Process()}

        async def grow(work: Awaitable[T]) -> tuple[T, dict[str, int]]:
            """The result of the work, and by how many MiB it has each process grow at most."""
            before = {}
            for name, process in processes.items():
                before[name] = process.memory_info().rss
                reset_peak(process)
            result = await work
            return result, {name: (read_peak(each) - before[name]) >> 20 for name, each in processes.items()}

        async def count() -> int:
            return sum([each.tokens async for each in client.read_trajectories("run", ids, with_logprobs=True)])

        ids, written = await grow(fill(client, "run", TOKENS))
        found, read = await grow(count())
    assert found == TRAJECTORIES * TOKENS
    assert max(*written.values(), *read.values()) < MOST_MIB, (written, read)


@LONG
@pytest.mark.timeout(900)
async def test_memory_of_the_coordinator_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    peaks = {}
    for tokens in (64, TOKENS):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        section = write_run_section(
            folder,
            context=2 * TOKENS,
            iterations=2,
            max_live_groups=TRAJECTORIES // 4,
            evaluation={"every": 0},
            drop_uniform_groups=False,
            rollout={"token_budget": tokens, "max_response_tokens": tokens},
        )
        async with (
            service("buffer", data_path=folder / "buffer") as (buffer_address, _),
            fake_peers(buffer_address) as peers,
        ):
            await wait_for_buffer(peers.buffer)
            settings = {key: value for key, value in peers.settings().items() if key.endswith("_address")}
            worker = peers.add_worker("a", open_tokenizer(folder / "model", "run.model"), capacity=TRAJECTORIES)
            worker.respond = lambda trajectory_id, prompt, tokens=tokens: "1" * (tokens - 2) + trajectory_id[-1]
            async with (
                service("coordinator", **settings) as (address, coordinator),
                CoordinatorClient.connect(address) as client,
                worker_in_service(worker, address),
            ):
                async with asyncio.timeout(120):
                    await client.channel.channel_ready()
                reset_peak(coordinator)
                request = coordinator_pb2.StartRunRequest(run_id="r", config_yaml=section, run_path=str(folder / "run"))
                await client.start_run(request)
                watch = coordinator_pb2.WatchRunRequest(run_id="r")
                last = [response async for response in client.watch_run(watch, timeout_s=800)][-1]
                assert last.run.error == ""
                assert max(peers.trainer.lengths.values()) == tokens
                peaks[tokens] = read_peak(coordinator) >> 20
    assert peaks[TOKENS] - peaks[64] < 64, peaks
