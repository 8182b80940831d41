"""Many trajectories of 131,072 tokens: what holds them in memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from bench.capacity import fill, read_peak, reset_peak, service, wait_for_buffer
from perigee.buffer.client import BufferClient

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
