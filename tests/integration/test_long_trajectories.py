"""Many trajectories of 131,072 tokens: what holds them in memory."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from bench.capacity import fill, read_peak, reset_peak, service, wait_for_buffer
from perigee.buffer.client import BufferClient
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2
from services.kit.hf import open_tokenizer
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import fake_peers, worker_in_service

TRAJECTORIES, TOKENS = 64, 131_072
# Of a process, above what it has before: a fraction of the 64 MiB of tokens and log-probabilities.
MOST_MIB = 32


LONG = pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")


@pytest.mark.parametrize("moved", [pytest.param(False, id="in redis"), pytest.param(True, id="in files", marks=LONG)])
async def test_memory_of_front_and_client_does_not_grow_with_the_tokens(tmp_path: Path, moved: bool) -> None:
    settings = {"offload.location": str(tmp_path / "files")} if moved else {}
    async with (
        service("buffer", data_path=tmp_path / "data", **settings) as (address, front),
        BufferClient.connect(address) as client,
    ):
        await wait_for_buffer(client)
        # What is there once, whatever the number of tokens.
        async for _ in client.read_trajectories("warm", await fill(client, "warm", 1, TOKENS), with_logprobs=True):
            pass
        processes = {"front": front, "client": psutil.Process()}
        before = {}
        for name, process in processes.items():
            before[name] = process.memory_info().rss
            reset_peak(process)
        ids = await fill(client, "run", TRAJECTORIES, TOKENS)
        wrote = {name: (read_peak(process) - before[name]) >> 20 for name, process in processes.items()}
        found = 0
        async for each in client.read_trajectories("run", ids, with_logprobs=True):
            found += each.tokens
        grown = {name: (read_peak(process) - before[name]) >> 20 for name, process in processes.items()}
    assert found == TRAJECTORIES * TOKENS
    assert max(grown.values()) < MOST_MIB, (wrote, grown)


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
