"""Many trajectories of 131,072 tokens: what holds them in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.capacity import fill, service, wait_for_buffer
from perigee.buffer.client import BufferClient

MIB = 1 << 20
TRAJECTORIES, TOKENS = 64, 131_072
# Of a process, above what it has before: a fraction of the 64 MiB of tokens and log-probabilities.
MOST_MIB = 32


def reset_peak(pid: int) -> float:
    """Begins to measure the largest memory of a process anew; returns what it has, in MiB."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return read_memory(pid, "VmRSS")


def read_memory(pid: int, name: str) -> float:
    """A figure of a process's memory, in MiB: VmRSS as it is, VmHWM the largest since `reset_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


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
        pids = {"front": front.pid, "client": os.getpid()}
        before = {name: reset_peak(pid) for name, pid in pids.items()}
        ids = await fill(client, "run", TRAJECTORIES, TOKENS)
        wrote = {name: round(read_memory(pid, "VmHWM") - before[name]) for name, pid in pids.items()}
        found = 0
        async for each in client.read_trajectories("run", ids, with_logprobs=True):
            found += each.tokens
        grown = {name: round(read_memory(pid, "VmHWM") - before[name]) for name, pid in pids.items()}
    assert found == TRAJECTORIES * TOKENS
    assert max(grown.values()) < MOST_MIB, (wrote, grown)
