"""The coordinator killed in every phase of a run on shared devices and started again: nothing trained twice, no group
dropped."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.stack import pick_ports
from perigee.cli.train import Cursor, watch_run
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import UnavailableError
from services.kit.hf import open_tokenizer
from tests.fixtures.coordinator import write_lines, write_run_section
from tests.fixtures.coordinator_fakes import FakePeers, fake_peers, worker_in_service

ITERATIONS = 5
BUDGET = 6


@asynccontextmanager
async def coordinator_process(recipe: Path, port: int, run_path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.coordinator", "--config", str(recipe),
        "--set", f"server.port={port}", "--set", f"run_path={run_path}",
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, the fakes tell nobody
            await asyncio.sleep(0.02)


async def call_when_up(call: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await call()
                return
            except UnavailableError:
                await asyncio.sleep(0.1)


@dataclass
class Watched:
    """What the command line is told of a run from its start to its end."""

    iterations: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    last: pb.RunSnapshot = field(default_factory=pb.RunSnapshot)


async def watch_to_the_end(client: CoordinatorClient, request: pb.StartRunRequest) -> Watched:
    watched = Watched()
    async for response in watch_run(client, request, Cursor(), lambda note: None):
        if response.HasField("iteration"):
            watched.iterations.append(response.iteration.iteration)
        if response.HasField("evaluation"):
            watched.evaluations.append(response.evaluation.iteration)
        if response.HasField("run"):
            watched.last = response.run
    return watched


async def wait_for_version(peers: FakePeers, run_id: str, version: int) -> None:
    request = buffer_pb2.GetRunRequest(run_id=run_id)
    async with asyncio.timeout(60):
        while (await peers.buffer.get_run(request)).run.policy_version < version:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def live_groups(peers: FakePeers, run_id: str) -> dict[str, int]:
    """Response tokens of each live group."""
    request = buffer_pb2.ListGroupsRequest(run_id=run_id)
    groups = [group async for page in peers.buffer.list_groups(request) for group in page.groups]
    return {group.group_id: sum(member.tokens for member in group.trajectories) for group in groups}


@pytest.mark.timeout(180)
async def test_killed_in_every_phase_it_goes_on(buffer_address: str, tmp_path: Path) -> None:
    run_id, run_path, port = f"run-{uuid.uuid4().hex}", tmp_path / "run", pick_ports(1)[0]
    dataset = write_lines(tmp_path / "sft.jsonl", [{"prompt": "1+1=", "response": "2"}])
    stages = [{"dataset": str(dataset), "steps": 2}, {"dataset": str(dataset), "steps": 3}]
    section = write_run_section(
        tmp_path,
        iterations=ITERATIONS,
        sft=stages,
        rollout={"token_budget": BUDGET, "max_response_tokens": 24, "max_prefill_share": 1},
        drop_uniform_groups=False,
        deployment="hybrid",
        hybrid={"engine": "restart", "workers": ["a"]},
    )
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with fake_peers(buffer_address) as peers:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"coordinator": peers.settings()}))
        worker = peers.add_worker("a", tokenizer, capacity=16)
        address = f"127.0.0.1:{port}"
        async with (
            worker_in_service(worker, address),
            CoordinatorClient.connect(address) as client,
            asyncio.TaskGroup() as tasks,
        ):
            request = pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path))
            watch: asyncio.Task[Watched] | None = None
            for stall_in in ("FineTune", "rollout", "Onload", "Train", "SaveCheckpoint", "Offload", "PushWeights"):
                peers.trainer.stalled.clear()
                if stall_in == "rollout":
                    worker.call_seconds, worker.calls = 0.2, []
                else:
                    peers.trainer.stall_in = stall_in
                async with coordinator_process(recipe, port, run_path) as process:
                    if watch is None:
                        await call_when_up(lambda: client.start_run(request))
                        watch = tasks.create_task(watch_to_the_end(client, request))
                    if stall_in == "rollout":
                        # The second call of several: some trajectories have ended, some are under way.
                        await wait_until(lambda: len(worker.calls) >= 2)
                    else:
                        await asyncio.wait_for(peers.trainer.stalled.wait(), timeout=60)
                    if stall_in == "PushWeights":
                        # Committed, but the line of metrics.jsonl is not written.
                        await wait_for_version(peers, run_id, peers.trainer.version)
                    process.send_signal(signal.SIGKILL)
                    await process.wait()
                worker.call_seconds = 0.0
            async with coordinator_process(recipe, port, run_path) as process:
                assert watch is not None
                watched = await watch
                assert (watched.last.phase, watched.last.error) == (pb.RUN_PHASE_FINISHED, "")
                process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(process.wait(), timeout=20) == 0
        live = await live_groups(peers, run_id)

    # Whenever it died, what it had committed was told once.
    assert watched.iterations == list(range(1, ITERATIONS + 1))
    assert watched.evaluations == [0, ITERATIONS]
    # Each supervised stage has counted once; the first was cut and began anew.
    assert [r.new_version for r in peers.trainer.fine_tuned] == [1, 2]
    # An iteration that was cut is trained again from the version before; its last request is the committed one.
    committed = {r.iteration: r for r in peers.trainer.trained}
    assert all(r.new_version == r.base_version + 1 for r in committed.values())
    assert len(peers.trainer.trained) > len(committed)
    lines = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1))
    # An iteration that was cut has all of its figures but those that a call tells at its end.
    ends = {"rollout/prefill_seconds", "rollout/decode_seconds", "rollout/prefill_time_share"}
    assert {key for line in lines for key, value in line.items() if value is None} <= ends
    assert {line["iteration"]: n for line in lines if (n := line["train/trajectories"])} == {
        iteration: sum(len(group.trajectories) for group in request.groups) for iteration, request in committed.items()
    }
    trained = Counter(member.trajectory_id for r in committed.values() for g in r.groups for member in g.trajectories)
    assert set(trained.values()) == {1}
    # Groups are numbered without a gap: each was trained once, dropped as uniform, or is still live.
    trained_groups = {group.group_id for r in committed.values() for group in r.groups}
    assert not trained_groups & {*live}
    created = 1 + max(int(group.removeprefix("g")) for group in trained_groups | {*live})
    assert created == len(trained_groups) + len(live)
    assert len(live) == lines[-1]["rollout/live_groups"]
    # Every token is counted, and no iteration gave a second budget to what it had extended before it was cut.
    tokens = [m.tokens_by_version for r in committed.values() for g in r.groups for m in g.trajectories]
    trained_tokens = sum(sum(by_version.values()) for by_version in tokens)
    assert sum(line["rollout/tokens"] for line in lines) == trained_tokens + sum(live.values())
    first = len(stages)
    assert max(n for by_version in tokens for version, n in by_version.items() if version > first) == BUDGET
    totals = json.loads((run_path / "summary.json").read_text())
    assert totals["trajectories_trained"] == sum(trained.values())


async def test_a_coordinator_that_stops_ends_its_watches_at_once(buffer_address: str, tmp_path: Path) -> None:
    run_id, run_path, port = f"run-{uuid.uuid4().hex}", tmp_path / "run", pick_ports(1)[0]
    section = write_run_section(tmp_path)
    tokenizer = open_tokenizer(tmp_path / "model", "run.model")
    async with fake_peers(buffer_address) as peers:
        recipe = tmp_path / "recipe.yaml"
        settings = peers.settings() | {"server": {"drain_seconds": 600.0}}
        recipe.write_text(yaml.safe_dump({"coordinator": settings}))
        worker = peers.add_worker("a", tokenizer, hang=True)
        address = f"127.0.0.1:{port}"
        async with (
            worker_in_service(worker, address),
            CoordinatorClient.connect(address) as client,
            coordinator_process(recipe, port, run_path) as process,
        ):
            request = pb.StartRunRequest(run_id=run_id, config_yaml=section, run_path=str(run_path))
            await call_when_up(lambda: client.start_run(request))
            watches = [client.watch_run(pb.WatchRunRequest(run_id=run_id)) for _ in range(2)]
            for watch in watches:
                assert (await anext(watch)).HasField("run")
            process.send_signal(signal.SIGTERM)
            # Far below the time that calls in flight are given.
            async with asyncio.timeout(60):
                for watch in watches:
                    with pytest.raises(UnavailableError, match=r"The coordinator is stopping\."):
                        [response async for response in watch]
                assert await process.wait() == 0
    # Not called stopped: the next process goes on with it.
    assert json.loads((run_path / "run.json").read_text())["status"] == "running"
