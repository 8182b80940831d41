"""Queues, cancellation, deadlines, and the end of the service: nothing waits for ever and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from perigee.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime.cgroups import find_cgroups
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

SLEEPER = pb.ExecuteRequest(
    language="python",
    source=b"import time\nprint('awake', flush=True)\ntime.sleep(60)",
    limits=pb.Limits(wall_ms=60_000),
)
SHELL_SLEEPER = pb.ExecuteRequest(
    language="bash", source=b"sleep 30 & echo awake; sleep 30; wait", limits=pb.Limits(wall_ms=40_000)
)
HELLO = pb.ExecuteRequest(language="python", source=b"print('hello')")
ROOT = Path(__file__).parents[2]


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something that happens in another process."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- other processes set no event
            await asyncio.sleep(0.01)


async def sleep_in_the_sandbox(
    client: SandboxClient, awake: asyncio.Event, sleeper: pb.ExecuteRequest = SLEEPER
) -> pb.ExecuteResponse | None:
    """Runs a sleeper; tells when it runs."""
    async for event in client.execute_stream(sleeper):
        if event.HasField("stdout"):
            awake.set()
        if event.HasField("finished"):
            return event.finished
    return None


def instances(service_pid: int) -> set[str]:
    """Names of the pools that a process has open."""
    host = find_cgroups()
    assert host is not None
    return {path.name for path in next(iter(host.mounts.values())).glob(f"perigee-sandbox/{service_pid}-*")}


def slot_processes(instance: int | str) -> list[int]:
    """Every process in the control groups of a service's pool; the number of a process stands for all of its pools."""
    host = find_cgroups()
    assert host is not None
    mount = next(iter(host.mounts.values()))
    name = f"{instance}-*" if isinstance(instance, int) else instance
    paths = mount.glob(f"perigee-sandbox/{name}/slot-*/cgroup.procs")
    return [int(pid) for path in paths for pid in path.read_text().split()]


def owned_by_root(instance_pid: int) -> list[int]:
    """The sandbox's own processes in the control groups; the programs belong to other users."""
    found = []
    for pid in slot_processes(instance_pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}").stat().st_uid == 0:
                found.append(pid)
    return found


def left_behind(instance_pid: int) -> list[str]:
    """Control groups of a service, in all hierarchies."""
    host = find_cgroups()
    assert host is not None
    return [str(path) for mount in host.mounts.values() for path in mount.glob(f"perigee-sandbox/{instance_pid}-*")]


@pytest.mark.parametrize("isolation", ["zygote", "crun"])
async def test_full_queue_cancel_and_deadline(isolation: str, tmp_path: Path) -> None:
    skip_unless_possible(isolation)
    async with running_sandbox(tmp_path, isolation=isolation, slots=1, queue_limit=1) as client:
        awake = asyncio.Event()
        running = asyncio.create_task(sleep_in_the_sandbox(client, awake))
        await asyncio.wait_for(awake.wait(), 60)
        calls = [asyncio.create_task(client.execute(HELLO)) for _ in range(2)]
        # One place in the queue: which of the two gets it is not said; the other is refused at once.
        [refused], [waiting] = await asyncio.wait(calls, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(ResourceExhaustedError) as refusal:
            refused.result()
        assert refusal.value.retry_after_s is not None
        assert refusal.value.retry_after_s > 0
        running.cancel()
        assert (await asyncio.wait_for(waiting, 50)).stdout == b"hello\n"  # the sleeper's own end comes later
        with pytest.raises(DeadlineExceededError):
            await client.execute(SLEEPER, timeout_s=0.5)
        assert (await client.execute(HELLO)).stdout == b"hello\n"
        look = pb.ExecuteRequest(language="bash", source=b"echo /proc/[0-9]*")
        assert len((await client.execute(look)).stdout.split()) == 2  # the init and the program itself


@pytest.mark.parametrize("isolation", ["zygote", "crun"])
async def test_a_broken_slot_is_an_infrastructure_error_and_comes_back(isolation: str, tmp_path: Path) -> None:
    skip_unless_possible(isolation)
    async with running_sandbox(tmp_path, isolation=isolation, slots=1) as client:
        awake = asyncio.Event()
        running = asyncio.create_task(sleep_in_the_sandbox(client, awake))
        await asyncio.wait_for(awake.wait(), 60)
        for pid in owned_by_root(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        response = await running
        assert response is not None
        assert response.status == pb.STATUS_INFRA_ERROR
        assert "slot-0" in response.reason
        assert (await client.execute(HELLO)).stdout == b"hello\n"


def is_running(pid: int) -> bool:
    """Whether a process exists."""
    return Path(f"/proc/{pid}").exists()


def entries(folder: Path) -> list[str]:
    """What a folder holds."""
    return [path.name for path in folder.iterdir()]


def read_mounts(state_path: Path) -> list[str]:
    """Mounts that a service has in this process's namespace; other tests may mount at the same time."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if str(state_path) in line or "perigee-sandbox" in line]


def start_service(state_path: Path, isolation: str, slots: int = 4) -> tuple[subprocess.Popen[str], str]:
    """A sandbox in a process of its own, and its address."""
    settings = {"isolation": isolation, "state_path": state_path, "slots": slots, "server.drain_seconds": 1}
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "services.sandbox", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if '"listening"' in line:
            return process, json.loads(line)["address"]
    raise AssertionError("the service did not start")


@pytest.mark.parametrize("isolation", ["zygote", "crun"])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_end_of_the_service_leaves_nothing(isolation: str, end: signal.Signals, tmp_path: Path) -> None:
    skip_unless_possible(isolation)
    mounts = read_mounts(tmp_path)
    process, address = await asyncio.to_thread(start_service, tmp_path, isolation)
    try:
        async with SandboxClient.connect(address) as client:
            jobs = [asyncio.create_task(client.execute(SLEEPER)) for _ in range(10)]
            await until(lambda: len(slot_processes(process.pid)) >= 8)
            inside = slot_processes(process.pid)
            process.send_signal(end)
            await asyncio.to_thread(process.wait, 60)
            for job in jobs:  # they would try again for three minutes
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        await until(lambda: not any(is_running(pid) for pid in inside))
        if end == signal.SIGKILL:
            assert entries(tmp_path) != []
            async with running_sandbox(tmp_path, isolation=isolation, slots=1) as client:
                assert (await client.execute(HELLO)).stdout == b"hello\n"
        assert left_behind(process.pid) == []
        assert entries(tmp_path) == []
        assert read_mounts(tmp_path) == mounts
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


async def test_a_killed_service_leaves_nothing_of_50_jobs(tmp_path: Path) -> None:
    for isolation in ("zygote", "crun"):
        skip_unless_possible(isolation)
    mounts = read_mounts(tmp_path)
    process, address = await asyncio.to_thread(start_service, tmp_path, "zygote", 50)
    try:
        async with SandboxClient.connect(address) as client:
            sleepers = [(asyncio.Event(), sleeper) for sleeper in (SLEEPER, SHELL_SLEEPER) for _ in range(25)]
            jobs = [asyncio.create_task(sleep_in_the_sandbox(client, *sleeper)) for sleeper in sleepers]
            async with asyncio.timeout(90):
                await asyncio.gather(*(awake.wait() for awake, _ in sleepers))
            inside = slot_processes(process.pid)
            assert len(inside) >= 25 * 3 + 25 * 5  # supervisor, init, Python; launcher, crun, init, shell, sleep
            process.kill()
            await asyncio.to_thread(process.wait, 60)
            ends = await asyncio.gather(*jobs, return_exceptions=True)
            assert all(isinstance(end, Exception) for end in ends)
        async with running_sandbox(tmp_path, isolation="zygote", slots=1) as client:
            assert (await client.execute(HELLO)).stdout == b"hello\n"
            await until(lambda: not any(is_running(pid) for pid in inside))
            assert left_behind(process.pid) == []
        assert entries(tmp_path) == []
        assert read_mounts(tmp_path) == mounts
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


async def test_a_program_does_not_run_before_it_is_measured(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    known = set(job_supervisors())
    async with running_sandbox(tmp_path, isolation="zygote", slots=1) as client:
        assert (await client.execute(HELLO)).stdout == b"hello\n"
        # The next program waits for its request, and has an init beside it.
        supervisors = set(job_supervisors()) - known
        await until(lambda: any(len(each.children()) == 2 for each in supervisors))
        [supervisor] = [each for each in supervisors if each.children()]
        supervisor.suspend()
        running = asyncio.create_task(client.run("held = bytearray(b'x') * (100 << 20)"))
        await asyncio.sleep(0.5)  # enough for the program to end, had it been given the request
        supervisor.resume()
        response = await running
    assert response.status == pb.STATUS_OK
    assert 100 << 20 <= response.peak_memory_bytes <= 140 << 20


def job_supervisors() -> list[psutil.Process]:
    """The processes below this one that have the programs of warm Python run."""
    zygotes = [child for child in psutil.Process().children() if "agent.zygote" in " ".join(child.cmdline())]
    return [child for zygote in zygotes for child in zygote.children()]


async def test_wrong_requests_name_their_fields(sandbox_address: str) -> None:
    def fields(error: InvalidArgumentError) -> set[str]:
        return {violation.field for violation in error.violations}

    async with SandboxClient.connect(sandbox_address) as client:
        with pytest.raises(InvalidArgumentError) as error:
            await client.execute(pb.ExecuteRequest(language="cobol", limits=pb.Limits(wall_ms=10**9, memory_bytes=1)))
        assert fields(error.value) == {"language", "limits.wall_ms", "limits.memory_bytes"}
        test = pb.TestCase(function=pb.FunctionTest(arguments_json="{", expected_json="[1"))
        with pytest.raises(InvalidArgumentError) as error:
            await client.judge(pb.JudgeRequest(language="python", source=b"x", function_name="f()", tests=[test]))
        names = {"function_name", "tests[0].function.arguments_json", "tests[0].function.expected_json"}
        assert fields(error.value) == names
        with pytest.raises(InvalidArgumentError) as error:
            await client.judge(pb.JudgeRequest(language="python", source=b"x"))
        assert fields(error.value) == {"tests"}


async def test_runtimes_tell_version_and_isolation(sandbox_address: str) -> None:
    async with SandboxClient.connect(sandbox_address) as client:
        runtimes = (await client.list_runtimes(pb.ListRuntimesRequest())).runtimes
        [runtime] = [runtime for runtime in runtimes if runtime.language == "python"]
        reported = await client.execute(
            pb.ExecuteRequest(language="python", source=b"import platform; print(platform.python_version())")
        )
    assert (runtime.language, runtime.isolation) == ("python", "zygote")
    assert reported.stdout.decode().strip() == runtime.version
