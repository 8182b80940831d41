"""What the service says when what it needs is gone: FAILED, and never a reward."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED
from perigee.cli.stack import pick_ports
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.server import serving
from services.reward.config import CodeConfig, MathConfig
from services.sandbox.__main__ import lifespan as sandbox_lifespan
from services.sandbox.config import SandboxConfig, SandboxServerConfig
from tests.fixtures.reward import math_item, running_reward, score, score_one
from tests.fixtures.sandbox import function_tests, skip_unless_possible

FoundT = TypeVar("FoundT")

ENDLESS = "9^{9^{9^{9}}}"
# What no plain comparison decides.
ALGEBRA = math_item("algebra", "\\sqrt{8}", "#2\\sqrt{2}")
PROGRAM = pb.ScoreItem(
    id="p",
    response="#def f(x):return 2*x",
    answer_marker="#",
    code=pb.CodeVerifier(language="python", function_name="f", tests=function_tests([([3], 6)])),
)


# Supervisors of services that other tests started in this process and still use: their children may have worked long
# enough to be taken for one that is in an endless check.
BYSTANDERS: set[int] = set()


@pytest.fixture(autouse=True)
def note_bystanders() -> None:
    """Before each test."""
    BYSTANDERS.clear()
    BYSTANDERS.update(worker.pid for worker in checking_processes(psutil.Process().pid, depth=1))


def checking_processes(supervisors_of: int, depth: int) -> list[psutil.Process]:
    """The math workers of a process: depth 1 the supervisors, depth 2 the children that do the checks."""
    children = [child for child in children_of(psutil.Process(supervisors_of)) if child.pid not in BYSTANDERS]
    supervisors = [child for child in children if is_math_worker(child)]
    return supervisors if depth == 1 else [child for each in supervisors for child in children_of(each)]


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """None of a process that is gone."""
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def is_math_worker(process: psutil.Process) -> bool:
    """Whether a process is a supervisor of the math verifier; one that is gone is none."""
    try:
        return process.cmdline()[2:4] == ["services.reward.pool.check_worker", "math"]
    except psutil.NoSuchProcess:
        return False


async def wait_until(condition: Callable[[], FoundT]) -> FoundT:
    """What the condition found."""
    async with asyncio.timeout(60):
        while not (found := condition()):  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.02)
        return found


def assert_failed(outcome: pb.ScoreResponse, reason: str) -> None:
    """FAILED with its reason and when to ask again, and without a reward."""
    assert (outcome.verdict, outcome.HasField("reward")) == (VERDICT_FAILED, False)
    assert reason in outcome.reason
    assert outcome.retryable
    assert outcome.retry_after_ms > 0


async def test_a_sandbox_that_is_down_is_a_failure_without_a_reward() -> None:
    config = CodeConfig(timeout_s=2)
    async with running_reward(sandbox_address=f"127.0.0.1:{pick_ports(1)[0]}", code=config) as client:
        outcome, other = sorted(await score(client, [PROGRAM, math_item("q", "1", "#1")]), key=lambda o: o.id)
        assert_failed(outcome, "SandboxService")
        assert other.verdict == VERDICT_CORRECT


async def test_a_sandbox_that_comes_back_within_the_deadline_judges(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    port = pick_ports(1)[0]
    async with running_reward(sandbox_address=f"127.0.0.1:{port}", code=CodeConfig(timeout_s=30)) as client:
        scoring = asyncio.create_task(score_one(client, PROGRAM))
        await asyncio.sleep(0.5)
        config = SandboxConfig(server=SandboxServerConfig(port=port), isolation="zygote", state_path=str(tmp_path))
        async with serving(config, sandbox_lifespan):
            outcome = await scoring
        assert (outcome.verdict, outcome.reward) == (VERDICT_CORRECT, 1.0)


@pytest.mark.parametrize("depth", [1, 2], ids=["supervisor", "child"])
async def test_a_worker_killed_mid_check_is_tried_once_more_then_fails(depth: int) -> None:
    async with running_reward(math=MathConfig(workers=1, check_timeout_s=15)) as client:
        scoring = asyncio.create_task(score_one(client, math_item("a", "7", f"#{ENDLESS}")))
        me = psutil.Process().pid
        killed: set[int] = set()
        for _ in range(2):
            [victim] = await wait_until(lambda: [child for child in busy_child(me) if child.pid not in killed])
            killed.add(victim.pid)
            if depth == 1:
                victim = psutil.Process(victim.ppid())
            victim.kill()
        outcome = await scoring
        assert_failed(outcome, "died 2 times")
        assert (await score_one(client, ALGEBRA)).verdict == VERDICT_CORRECT


async def test_a_worker_killed_once_costs_nothing() -> None:
    async with running_reward(math=MathConfig(workers=1)) as client:
        for victim in checking_processes(psutil.Process().pid, depth=1):
            victim.kill()
        outcome = await score_one(client, ALGEBRA)
        assert outcome.verdict == VERDICT_CORRECT


async def test_a_frozen_worker_is_replaced() -> None:
    async with running_reward(math=MathConfig(workers=1, check_timeout_s=0.5)) as client:
        [supervisor] = checking_processes(psutil.Process().pid, depth=1)
        supervisor.suspend()
        begin = time.monotonic()
        outcome = await score_one(client, ALGEBRA)
        assert outcome.verdict == VERDICT_CORRECT
        assert time.monotonic() - begin < 60
        assert not psutil.pid_exists(supervisor.pid)


async def test_a_caller_that_goes_away_frees_the_worker() -> None:
    async with running_reward(math=MathConfig(workers=1, check_timeout_s=60)) as client:
        scoring = asyncio.create_task(score_one(client, math_item("a", "7", f"#{ENDLESS}")))
        me = psutil.Process().pid
        await wait_until(lambda: bool(busy_child(me)))
        scoring.cancel()
        await asyncio.wait({scoring})
        begin = time.monotonic()
        assert (await score_one(client, ALGEBRA)).verdict == VERDICT_CORRECT
        assert time.monotonic() - begin < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_service_that_ends_leaves_no_process(number: signal.Signals) -> None:
    port = pick_ports(1)[0]
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.reward"),
        *("--set", f"server.port={port}", "--set", "server.drain_seconds=0.2"),
    )
    try:
        async with RewardClient.connect(f"127.0.0.1:{port}") as client:
            await wait_until(lambda: len(checking_processes(service.pid, depth=2)) == 2)
            scoring = asyncio.create_task(score(client, [math_item("a", "7", f"#{ENDLESS}")]))
            await wait_until(lambda: bool(busy_child(service.pid)))
            family = checking_processes(service.pid, 1) + checking_processes(service.pid, 2)
            service.send_signal(number)
            await asyncio.wait({scoring})
            assert scoring.exception() is not None or scoring.result()[0].verdict == VERDICT_FAILED
            await wait_until(lambda: not any(process.is_running() for process in family))
    finally:
        if service.returncode is None:
            service.kill()
        await service.wait()


def busy_child(service: int) -> list[psutil.Process]:
    """The child that is in a check that does not end."""
    return [child for child in checking_processes(service, depth=2) if cpu_seconds(child) > 0.2]


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time; 0 when the process is gone."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


async def test_a_sandbox_that_never_answers_is_a_failure_without_a_reward() -> None:
    async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(keep_silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with running_reward(sandbox_address=f"127.0.0.1:{port}", code=CodeConfig(timeout_s=2)) as client:
            outcome = await score_one(client, PROGRAM)
    assert_failed(outcome, "did not answer within 2 s")


async def test_a_sandbox_that_is_slow_is_a_failure_without_a_reward(sandbox_address: str) -> None:
    sleeper = pb.ScoreItem(
        id="s",
        response="#import time\ndef f(x):\n    time.sleep(5)\n    return 2*x",
        answer_marker="#",
        code=PROGRAM.code,
    )
    async with running_reward(sandbox_address=sandbox_address, code=CodeConfig(timeout_s=1)) as client:
        outcomes = {outcome.id: outcome for outcome in await score(client, [sleeper, PROGRAM])}
    assert_failed(outcomes["s"], "did not answer within 1 s")
    assert outcomes["p"].verdict == VERDICT_CORRECT


async def test_checks_that_hang_among_many_take_nobody_along() -> None:
    radicals = "7"
    for _ in range(200):
        radicals = f"\\sqrt{{2+{radicals}}}"
    bombs = {"tower": ENDLESS, "factorial": "123456789!", "radicals": radicals, "long": "x+" * 50_000 + "1"}
    items = [math_item(name, "\\sqrt{7}", f"#{text}") for name, text in bombs.items()]
    items += [math_item(str(i), f"\\sqrt{{{4 * i}}}", f"#2\\sqrt{{{i}}}") for i in range(2, 100)]
    async with running_reward(math=MathConfig(workers=1, check_timeout_s=1)) as client:
        outcomes = [outcome async for outcome in client.score(pb.ScoreRequest(items=items), timeout_s=60)]
    assert len(outcomes) == len(items)
    by_id = {outcome.id: outcome for outcome in outcomes}
    assert {by_id[str(i)].verdict for i in range(2, 100)} == {VERDICT_CORRECT}
    for name in ("tower", "factorial"):
        assert (by_id[name].verdict, by_id[name].HasField("reward")) == (VERDICT_FAILED, False)
        assert "did not end within 1 s" in by_id[name].reason
    for name in ("radicals", "long"):
        assert by_id[name].verdict != VERDICT_CORRECT


async def test_more_checks_that_hang_than_may_be_slow_only_take_longer() -> None:
    items = [math_item(f"bomb-{i}", "7", f"#{9 + i}^{{9^{{9^{{9}}}}}}") for i in range(5)]
    items.append(ALGEBRA)
    config = MathConfig(workers=1, check_timeout_s=1, slow_checks=1, slow_check_s=0.1)
    async with running_reward(math=config) as client:
        outcomes = {outcome.id: outcome.verdict for outcome in await score(client, items)}
    assert outcomes.pop("algebra") == VERDICT_CORRECT
    assert set(outcomes.values()) == {VERDICT_FAILED}
    assert len(outcomes) == 5
