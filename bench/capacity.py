"""What the services need for each 1,000 trajectories in flight: memory of Redis, buffer and coordinator, CPU time.

    python -m bench.capacity [--trajectories 1000] [--tokens 1024 8192 32768] [--iterations 3] [--files]

Buffer, Valkey and coordinator are processes of their own, as in a stack. The buffer gets trajectories of so many tokens
each, in chunks of 512, and reads them all back; with --files it moves them to files, and reads them again from there.
The coordinator runs iterations with so many trajectories in flight,
then with four times as many, around a worker, a trainer and a reward service that cost nothing; memory is the
difference of the two.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
from redis.asyncio import Redis

from bench.machine import describe_machine
from bench.token_hops import VOCABULARY, PackedForm, append_all
from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2
from perigee.errors import NotFoundError, UnavailableError
from services.kit.hf import open_tokenizer
from tests.fixtures.coordinator import write_run_section
from tests.fixtures.coordinator_fakes import fake_peers, worker_in_service

MIB = 1 << 20
# Trajectories of one group; a call with a chunk of each stays below 4 MiB.
GROUP = 250
PROMPT_TOKENS = 256


@asynccontextmanager
async def service(name: str, **settings: object) -> AsyncIterator[tuple[str, psutil.Process]]:
    """A service as a process: its address, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"server.port": port, "telemetry.log_level": "error"} | settings
    words = [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", f"services.{name}", *words)
    try:
        yield f"127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        await process.wait()


def reset_peak(process: psutil.Process) -> None:
    """Begins to measure the largest resident memory of a process anew."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def read_peak(process: psutil.Process) -> int:
    """Largest resident bytes of a process since `reset_peak`."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def wait_for_buffer(client: BufferClient) -> None:
    """Returns when the buffer answers."""
    while True:
        try:
            await client.get_run(buffer_pb2.GetRunRequest(run_id="-"))
        except NotFoundError:
            return
        except UnavailableError:
            await asyncio.sleep(0.1)


async def fill(client: BufferClient, run_id: str, count: int, length: int) -> list[str]:
    """Creates trajectories of `length` tokens each; returns their ids."""
    generator = random.Random(0)
    tokens = [generator.randrange(VOCABULARY) for _ in range(length)]
    logprobs = [-generator.random() for _ in range(length)]
    await client.create_run(buffer_pb2.CreateRunRequest(run_id=run_id, config_digest="bench"))
    ids = [f"trajectory-{number:08}" for number in range(count)]
    for start in range(0, count, GROUP):
        some = ids[start : start + GROUP]
        group = buffer_pb2.NewGroup(
            group_id=f"group-{start}",
            prompt_id=f"prompt-{start}",
            prompt_token_ids=pack_token_ids(tokens[:PROMPT_TOKENS]),
            trajectory_ids=some,
        )
        await client.create_groups(buffer_pb2.CreateGroupsRequest(run_id=run_id, groups=[group]))
        lease = buffer_pb2.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=some)
        await client.lease_trajectories(lease)
        await append_all(PackedForm(client), run_id, some, tokens, logprobs)
    return ids


async def wait_for_files(redis: Redis) -> None:
    """Returns when no trajectory waits for its move."""
    while await redis.zcard("perigee:{run}:unmoved"):  # noqa: ASYNC110 (what a service does sets no event here)
        await asyncio.sleep(0.05)


async def measure_buffer(count: int, lengths: Sequence[int], *, files: bool = False) -> None:
    """Prints a line for each length, and with `files` one more."""
    for length in lengths:
        with tempfile.TemporaryDirectory(prefix="perigee-") as folder:
            settings = {"offload.location": f"{folder}/files", "offload.min_tokens": 1} if files else {}
            async with (
                service("buffer", data_path=f"{folder}/redis", **settings) as (address, process),
                BufferClient.connect(address) as client,
                Redis(unix_socket_path=f"{folder}/redis/valkey.sock") as redis,
            ):
                await wait_for_buffer(client)
                (valkey,) = process.children()
                empty = (await redis.info("memory"))["used_memory"]
                begun = cpu_seconds(process), cpu_seconds(valkey)
                reset_peak(process)
                # Whatever their number, they are written and read group by group.
                ids = await fill(client, "run", count, length)
                used = (await redis.info("memory"))["used_memory"] - empty
                if files:
                    await wait_for_files(redis)
                written = cpu_seconds(process), cpu_seconds(valkey)
                left = (await redis.info("memory"))["used_memory"] - empty
                async for _ in client.read_trajectories("run", ids, with_logprobs=True, tokens=count * length):
                    pass
                read = cpu_seconds(process), cpu_seconds(valkey)
                disk = sum(file.stat().st_size for file in Path(f"{folder}/redis").rglob("*") if file.is_file())  # noqa: ASYNC240
                peak = read_peak(process)
        scale, millions = 1000 / count, count * length / 1e6
        before = f"{used / millions / MIB:.1f} MiB before they were moved, " if files else ""
        writing, reading = (
            f"{(end[0] - start[0]) * scale:.2f} + {(end[1] - start[1]) * scale:.2f}"
            for start, end in ((begun, written), (written, read))
        )
        print(
            f"1,000 trajectories of {length:>6,} tokens: Redis {left * scale / MIB:6.0f} MiB (for a million tokens "
            f"{before}{left / millions / MIB:.1f} MiB, {left / count / length:.1f} bytes a token), append-only file "
            f"{disk * scale / MIB:6.0f} MiB, buffer {peak / MIB:.0f} MiB resident at most; CPU seconds writing "
            f"{writing} (buffer, Redis), reading {reading}"
        )


async def run_coordinator(count: int, iterations: int) -> tuple[int, float, int]:
    """Resident bytes, CPU seconds and segments of a coordinator with so many trajectories in flight."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perigee-")))
        buffer_address, _ = await stack.enter_async_context(service("buffer", data_path=folder / "buffer"))
        peers = await stack.enter_async_context(fake_peers(buffer_address))
        await wait_for_buffer(peers.buffer)
        section = write_run_section(
            folder,
            prompts=2 * count,
            max_live_groups=count // 4,
            iterations=iterations,
            evaluation={"every": 0},
        )
        settings = {key: value for key, value in peers.settings().items() if key.endswith("_address")}
        address, process = await stack.enter_async_context(service("coordinator", **settings))
        client = await stack.enter_async_context(CoordinatorClient.connect(address))
        async with asyncio.timeout(120):
            await client.channel.channel_ready()
        worker = peers.add_worker("a", open_tokenizer(folder / "model", "run.model"), capacity=256)
        await stack.enter_async_context(worker_in_service(worker, address))
        started = cpu_seconds(process)
        request = coordinator_pb2.StartRunRequest(run_id="run", config_yaml=section, run_path=str(folder / "run"))
        await client.start_run(request)
        resident = 0
        async for response in client.watch_run(coordinator_pb2.WatchRunRequest(run_id="run"), timeout_s=1800):
            resident = max(resident, process.memory_info().rss)
            assert response.run.error == "", response.run.error
        return resident, cpu_seconds(process) - started, len(worker.extended)


async def measure_coordinator(count: int, iterations: int) -> None:
    """Prints the coordinator's line."""
    few, seconds_few, segments_few = await run_coordinator(count, iterations)
    many, seconds_many, segments_many = await run_coordinator(4 * count, iterations)
    memory = (many - few) / (3 * count) * 1000
    seconds = (seconds_many - seconds_few) / (segments_many - segments_few) * 1000
    print(
        f"coordinator: {few / MIB:.0f} MiB resident with {count:,} trajectories in flight, {many / MIB:.0f} MiB with "
        f"{4 * count:,}: {memory / MIB:.1f} MiB for 1,000; {seconds:.2f} CPU seconds for 1,000 segments"
    )


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="What the services need for 1,000 trajectories in flight.")
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--iterations", type=int, default=3, help="of the coordinator; 0 leaves it out")
    parser.add_argument("--files", action="store_true", help="move what has finished to files")
    arguments = parser.parse_args()
    print(describe_machine())
    asyncio.run(measure_buffer(arguments.trajectories, arguments.tokens, files=arguments.files))
    if arguments.iterations:
        asyncio.run(measure_coordinator(arguments.trajectories, arguments.iterations))


if __name__ == "__main__":
    main()
