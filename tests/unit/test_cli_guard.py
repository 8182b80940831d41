"""The guard above a service: whatever ends first, the whole process tree ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from perigee.cli.stack import start_guarded

# A service with a child in a session of its own that ignores SIGTERM, as an engine or a database may.
STUBBORN = """
import os, signal, subprocess, sys, time
child = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
child += "; print('child', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""
# Starts the service as the CLI does, tells the guard's id, and waits to be killed.
OWNER = """
import asyncio, sys
from pathlib import Path
from perigee.cli.stack import start_guarded

async def main():
    process = await start_guarded("x", [sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]))
    print(process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


COMMAND = [sys.executable, "-c", STUBBORN]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "x.log"


def wait_until_started(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not (log.is_file() and "child" in log.read_text()):
        assert time.monotonic() < deadline, "the child of the service did not start"
        time.sleep(0.02)


@contextlib.contextmanager
def tree_that_ends(guard_pid: int) -> Iterator[list[psutil.Process]]:
    """The processes below a guard, all of which must be gone soon after the block."""
    tree = psutil.Process(guard_pid).children(recursive=True)
    assert len(tree) == 2
    yield tree
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []


async def test_stop_ends_the_whole_tree(log: Path) -> None:
    process = await start_guarded("x", COMMAND, log)
    wait_until_started(log)
    with tree_that_ends(process.pid):
        await process.stop()
    assert process.exit_code == 128 + signal.SIGTERM


async def test_what_a_killed_service_leaves_is_ended(log: Path) -> None:
    process = await start_guarded("x", COMMAND, log)
    wait_until_started(log)
    with tree_that_ends(process.pid) as tree:
        tree[0].kill()
        assert await process.wait() == 128 + signal.SIGKILL
    assert process.describe_end(137).startswith("x was ended by SIGKILL")


def test_nothing_outlives_an_owner_that_is_killed(log: Path) -> None:
    arguments = [sys.executable, "-c", OWNER, STUBBORN, str(log)]
    owner = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    guard = psutil.Process(int(owner.stdout.readline()))
    wait_until_started(log)
    with owner.stdout, tree_that_ends(guard.pid):
        owner.kill()
        owner.wait()
    assert psutil.wait_procs([guard], timeout=60)[1] == []


async def test_a_killed_guard_takes_the_service_along(log: Path) -> None:
    plain = [sys.executable, "-c", "import time; print('child', flush=True); time.sleep(600)"]
    process = await start_guarded("x", plain, log)
    wait_until_started(log)
    tree = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert await process.wait() == 128 + signal.SIGKILL
    assert psutil.wait_procs(tree, timeout=60)[1] == []


async def test_the_exit_code_and_the_log_are_the_commands(log: Path) -> None:
    script = "import sys; print('out'); sys.exit('ValueError: wrong')"
    process = await start_guarded("x", [sys.executable, "-c", script], log)
    assert await process.wait() == 1
    assert process.describe_end(1) == f"x ended with exit code 1: ValueError: wrong (log: {log})"


async def test_a_program_that_is_not_there_is_named(log: Path) -> None:
    process = await start_guarded("x", ["/nowhere/program"], log)
    assert await process.wait() == 127
    assert "/nowhere/program cannot be started: [Errno 2]" in process.describe_end(127)


async def test_a_signal_before_the_service_runs_is_not_lost(log: Path) -> None:
    process = await start_guarded("x", [sys.executable, "-c", "import time; time.sleep(600)"], log)
    await asyncio.wait_for(process.stop(), 60)
    assert process.exit_code == 128 + signal.SIGTERM
