"""A rollout worker in a process of its own: engines that are killed, services that are killed, orderly ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from perigee.buffer.client import BufferClient
from perigee.errors import FailedPreconditionError, UnavailableError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from tests.fixtures.rollout import (
    CHUNK,
    NewTrajectories,
    Pusher,
    make_policy,
    policy_logprobs,
    policy_tensors,
    wait_for_state,
    wait_for_status,
)

PROMPT = [5, 6, 7, 8]
POLICY = make_policy(21)
ROLLOUT = "perigee.rollout.v1.RolloutService"


@dataclass
class ServiceProcess:
    """The service and what it has written to standard error."""

    process: asyncio.subprocess.Process
    address: str

    def engines(self) -> list[psutil.Process]:
        """Processes that run an engine: children of the fork server, which is one of the service."""
        children = psutil.Process(self.process.pid).children()
        return [engine for child in children for engine in child.children() if engine.status() != psutil.STATUS_ZOMBIE]


def wait_for_address(process: asyncio.subprocess.Process, log: Path) -> str:
    """Where the service listens, from its log."""
    while not (match := re.search(r'"address": "([^"]+)".*"listening"', log.read_text())):
        assert process.returncode is None, log.read_text()
        time.sleep(0.1)
    return match[1]


@asynccontextmanager
async def running_service(
    model: Path, buffer_address: str, log: Path, **overrides: object
) -> AsyncIterator[ServiceProcess]:
    """`python -m services.rollout` on a free port; killed at the end if it still runs."""
    settings = {
        "model": model,
        "buffer_address": buffer_address,
        "coordinator_address": "null",
        "dtype": "float32",
        "kv_cache_bytes": 64 << 20,
        "server.drain_seconds": 0.3,
        **overrides,
    }
    arguments = [item for name, value in settings.items() for item in ("--set", f"{name}={value}")]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.rollout",
            *arguments,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield ServiceProcess(process, await asyncio.to_thread(wait_for_address, process, log))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def is_serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = await check(health_pb2.HealthCheckRequest(service=ROLLOUT))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Fails when one of them still runs after this time."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, seconds)
    assert alive == []


@pytest.mark.timeout(240)
async def test_a_killed_engine_comes_back_filled_and_a_killed_service_leaves_none(
    policy_folder: Path, buffer_address: str, buffer_client: BufferClient, pusher: Pusher, tmp_path: Path
) -> None:
    async with (
        # Few at once, so that most responses wait for the engine when the first one has ended.
        running_service(policy_folder, buffer_address, tmp_path / "log", max_num_seqs=4) as service,
        RolloutClient.connect(service.address) as client,
    ):
        trajectories = NewTrajectories(buffer_client, client, "rollout-faults")
        ids = await trajectories.create([PROMPT], k=256)
        await wait_for_status(client, pb.WORKER_STATUS_EMPTY)
        assert not await is_serving(service.address)
        with pytest.raises(FailedPreconditionError, match="push a policy version"):
            await trajectories.extend(ids)
        assert await pusher.push(policy_tensors(POLICY), 0, service.address, trajectories.run_id) == ""
        assert await is_serving(service.address)

        [engine] = service.engines()
        running = asyncio.create_task(trajectories.extend(ids, token_budget=200, max_response_tokens=200))
        # Of four at a time the first are there. The rest is work for many seconds, however late the state is read.
        await wait_for_state(client, lambda state: state.generated_tokens > 0)
        engine.kill()
        ended, failed = await running
        assert set(ended) | set(failed) == set(ids)
        assert failed
        assert all("EngineCore" in reason or "engine" in reason for reason in failed.values())
        await wait_for_state(client, lambda state: state.engine_restarts == 1)
        assert not await is_serving(service.address)
        with pytest.raises(FailedPreconditionError, match="starting"):
            await trajectories.extend(list(failed))

        state = await wait_for_status(client, pb.WORKER_STATUS_READY)
        assert (state.engine_restarts, state.policy_version, state.running) == (1, 0, 0)
        assert await is_serving(service.address)
        again = list(failed)[:16]
        resumed, refused = await trajectories.extend(again, token_budget=200, max_response_tokens=200)
        assert refused == {}
        assert set(resumed) == set(again)
        for trajectory_id in [*again, *list(ended)[:16]]:
            held = await trajectories.read(trajectory_id)
            expected = policy_logprobs(POLICY, PROMPT, held.token_ids)
            assert max(abs(a - b) for a, b in zip(expected, held.logprobs, strict=True)) < 1e-3

        # The engine goes with the process that it was forked from, and both are replaced.
        [engine] = service.engines()
        fork_server = engine.parent()
        assert fork_server is not None
        fork_server.kill()
        await wait_for_state(client, lambda state: state.engine_restarts == 2)
        await wait_for_status(client, pb.WORKER_STATUS_READY)
        assert not engine.is_running()

        [engine] = service.engines()
        processes = psutil.Process(service.process.pid).children(recursive=True)
        assert engine in processes
        assert fork_server not in processes
        service.process.kill()
        await service.process.wait()
        await wait_gone(processes, seconds=30)


@pytest.mark.timeout(240)
async def test_sigterm_ends_requests_engine_and_service(
    policy_folder: Path, buffer_address: str, buffer_client: BufferClient, pusher: Pusher, tmp_path: Path
) -> None:
    def images() -> set[Path]:
        return set(Path("/dev/shm").glob(f"perigee-weights-{service.process.pid}-*"))

    async with (
        # Few at once, so that most responses have not begun when the signal comes, however late that is. The drain
        # ends when all have been handed back, and with them the call.
        running_service(
            policy_folder, buffer_address, tmp_path / "log", max_num_seqs=8, **{"server.drain_seconds": 60}
        ) as service,
        RolloutClient.connect(service.address) as client,
    ):
        await wait_for_status(client, pb.WORKER_STATUS_EMPTY)
        trajectories = NewTrajectories(buffer_client, client, "rollout-sigterm")
        assert await pusher.push(policy_tensors(POLICY), 0, service.address, trajectories.run_id) == ""
        assert images()
        ids = await trajectories.create([PROMPT] * 16, k=16)
        running = asyncio.create_task(trajectories.extend(ids, token_budget=200, max_response_tokens=200))
        await trajectories.wait_for_tokens(ids[0])
        processes = psutil.Process(service.process.pid).children(recursive=True)
        # As a shell does; the engine is needed until its requests have ended.
        os.killpg(service.process.pid, signal.SIGTERM)
        with pytest.raises(UnavailableError, match=r"hands \d+ trajectories back"):
            await running
        async with asyncio.timeout(60):
            assert await service.process.wait() == 0, (tmp_path / "log").read_text()
        await wait_gone(processes, seconds=30)
        assert images() == set()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log
    assert "segments failed" not in log, log
    assert "engine died" not in log, log
    # The tokens of unfinished chunks have reached the buffer, with their log-probabilities and versions.
    held = [await trajectories.read(trajectory_id) for trajectory_id in ids]
    assert any(len(each.token_ids) % CHUNK for each in held)
    assert all(len(each.token_ids) == len(each.logprobs) == sum(span.tokens for span in each.versions) for each in held)


@pytest.mark.timeout(240)
async def test_sigterm_while_the_engine_starts_ends_both(policy_folder: Path, tmp_path: Path) -> None:
    async with running_service(policy_folder, "127.0.0.1:1", tmp_path / "log") as service:
        while not (engines := service.engines()):  # noqa: ASYNC110, it is another process
            await asyncio.sleep(0.01)
        # Without it a start of a second could end first.
        engines[0].suspend()
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await service.process.wait() == 0, (tmp_path / "log").read_text()
        await wait_gone(engines, seconds=30)
    assert "engine started" not in (tmp_path / "log").read_text()
