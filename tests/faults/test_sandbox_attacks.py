"""Programs that take more than they may or break out of their box: each is held, and the sandbox serves as before."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket

import pytest

from perigee.sandbox.client import SandboxClient
from services.sandbox.agent import ENVIRONMENT
from tests.faults.attack_runs import (
    MEMORY_LIMIT,
    OK,
    OUTPUT_LIMIT,
    RUNTIME_ERROR,
    TIME_LIMIT,
    Attack,
    assert_held,
    assert_serves,
    run_program,
    skip_unless_there,
)

SPACE = str(1 << 20)
SHORT = {"wall_ms": 700, "cpu_ms": 300}
PATIENT = {"memory_bytes": 128 << 20, "cpu_ms": 60_000, "wall_ms": 60_000}
ROOMY = {"memory_bytes": 256 << 20}
FOLDERS = ("/box", "/tmp", "/dev/shm")

ATTACKS = [
    Attack("resources/fork_bomb.py", (TIME_LIMIT,), limits=ROOMY),
    Attack("resources/fork_chain.py"),
    Attack("resources/busy.py", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/deaf.py", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/asleep.py", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/stopped.py", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/busy_thread.py", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/busy_child.py", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/memory_bomb.py", (MEMORY_LIMIT,)),
    Attack("resources/memory_in_protected_child.py", (MEMORY_LIMIT,)),
    Attack("resources/memory_in_many.py", (MEMORY_LIMIT,)),
    Attack("resources/memory_shared.py", (MEMORY_LIMIT,)),
    Attack("resources/memory_in_memfds.py", (MEMORY_LIMIT,)),
    Attack("resources/memory_in_segments.py", (MEMORY_LIMIT, OK)),
    Attack("resources/memory_in_pipes.py", (MEMORY_LIMIT, OK)),
    Attack("resources/memory_in_sockets.py", (MEMORY_LIMIT, OK)),
    *(Attack("resources/memory_in_files.py", (MEMORY_LIMIT,), limits={"file_bytes": 128 << 20}, args=[folder]) for folder in FOLDERS),  # noqa: E501
    *(Attack("resources/disk_fill.py", args=[folder, SPACE]) for folder in FOLDERS),
    *(Attack("resources/inode_fill.py", limits={"cpu_ms": 5000}, args=[folder]) for folder in FOLDERS),
    Attack("resources/deep_folders.py", limits={"cpu_ms": 5000}),
    Attack("resources/big_file.py"),
    Attack("resources/open_files.py"),
    Attack("resources/output_flood.py", (OUTPUT_LIMIT,), args=["stdout"]),
    Attack("resources/output_flood.py", (OUTPUT_LIMIT,), args=["stderr"]),
    Attack("resources/output_from_children.py", (OUTPUT_LIMIT,)),
    Attack("resources/output_after_the_end.py", (OK, OUTPUT_LIMIT), stdout=None),
    Attack("resources/output_with_holes.py", (OK, OUTPUT_LIMIT), stdout=None),
    Attack("resources/output_closed.py", (OK, RUNTIME_ERROR), stdout=b""),
    Attack("breakouts/processes.py"),
    Attack("breakouts/tracing.py"),
    Attack("breakouts/namespaces.py"),
    Attack("breakouts/mounts.py"),
    Attack("breakouts/kernel_calls.py"),
    Attack("breakouts/other_call_tables.py"),
    Attack("breakouts/privileges.py"),
    Attack("breakouts/setuid_binaries.py"),
    Attack("breakouts/signals.py"),
    Attack("breakouts/descriptors.py"),
    Attack("breakouts/oom_score.py"),
    Attack("breakouts/rlimits.py"),
    Attack("breakouts/priorities.py"),
    Attack("breakouts/cgroup_files.py"),
    Attack("breakouts/executables.py"),
    Attack("breakouts/core_dump.py"),
    Attack("breakouts/host_counters.py"),
    Attack("breakouts/traces_of_the_host.py"),
]  # fmt: skip

OTHER_LANGUAGES = [
    Attack("resources/fork_bomb.c", (TIME_LIMIT,), limits=ROOMY),
    Attack("resources/fork_bomb.sh", (TIME_LIMIT, MEMORY_LIMIT, RUNTIME_ERROR, OUTPUT_LIMIT), limits=ROOMY),
    Attack("resources/fork_bomb.js", (TIME_LIMIT, MEMORY_LIMIT, RUNTIME_ERROR)),
    Attack("resources/fork_bomb.pl", (TIME_LIMIT,), limits=ROOMY),
    Attack("resources/thread_bomb.cpp", (TIME_LIMIT, MEMORY_LIMIT, RUNTIME_ERROR)),
    Attack("resources/Threads.java", (TIME_LIMIT, MEMORY_LIMIT, RUNTIME_ERROR, OUTPUT_LIMIT)),
    Attack("resources/memory_bomb.c", (MEMORY_LIMIT,)),
    # giving it the last of its memory may cost the kernel seconds, which count as the program's
    Attack("resources/memory_bomb.js", (MEMORY_LIMIT,), limits=PATIENT),
    Attack("resources/memory_bomb.sh", (MEMORY_LIMIT, RUNTIME_ERROR)),
    # It goes on for ever once its share is used up, so the clock ends it.
    Attack("resources/Memory.java", (MEMORY_LIMIT, TIME_LIMIT), limits={"wall_ms": 5000}),
    Attack("resources/deaf.c", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/deaf.sh", (TIME_LIMIT,), limits=SHORT),
    Attack("resources/output_flood.c", (OUTPUT_LIMIT,)),
    Attack("resources/output_flood.sh", (OUTPUT_LIMIT,)),
    Attack("resources/output_flood.js", (OUTPUT_LIMIT,)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
async def test_attack_is_held(sandbox: SandboxClient, attack: Attack) -> None:
    response = await assert_held(sandbox, attack)
    assert max(len(response.stdout), len(response.stderr)) <= 65536


@pytest.mark.parametrize("attack", OTHER_LANGUAGES, ids=str)
async def test_attack_in_another_language_is_held(every_language: SandboxClient, attack: Attack) -> None:
    await skip_unless_there(every_language, attack.program)
    response = await assert_held(every_language, attack)
    assert max(len(response.stdout), len(response.stderr)) <= 65536


@pytest.mark.parametrize("program", ["breakouts/probes.c", "breakouts/probes.sh", "breakouts/probes.js"])
async def test_probes_in_another_language_find_nothing(
    every_language: SandboxClient, host_secret: str, program: str
) -> None:
    await skip_unless_there(every_language, program)
    await assert_held(every_language, Attack(program, args=[host_secret], limits={"cpu_ms": 10_000}))


@pytest.mark.parametrize(("program", "least", "most"), [("resources/processes.py", 8, 16), ("resources/threads.py", 4, 16)])  # fmt: skip  # noqa: E501
async def test_processes_are_counted(sandbox: SandboxClient, program: str, least: int, most: int) -> None:
    response = await run_program(sandbox, program)
    assert response.status == OK
    assert least <= int(response.stdout) <= most
    await assert_serves(sandbox)


@pytest.mark.parametrize("program", ["resources/cpu_in_children.py", "resources/cpu_in_short_children.py"])
async def test_cpu_limit_counts_children(sandbox: SandboxClient, program: str) -> None:
    response = await run_program(sandbox, program, {"wall_ms": 30_000, "cpu_ms": 300})
    assert response.status == TIME_LIMIT
    assert response.cpu_ms >= 300
    assert response.wall_ms < 20_000  # the CPU limit ended it, not the clock
    await assert_serves(sandbox)


async def test_memory_peak_is_that_of_the_limit(sandbox: SandboxClient) -> None:
    response = await run_program(sandbox, "resources/memory_bomb.py")
    assert 60 << 20 <= response.peak_memory_bytes <= 96 << 20


async def test_memory_within_the_limit_is_given(sandbox: SandboxClient) -> None:
    source = b"held = bytearray(b'x') * (40 << 20)\nprint(len(held))"
    response = await run_program(sandbox, "resources/memory_bomb.py", source=source)
    assert (response.status, response.stdout) == (OK, b"41943040\n")
    assert 40 << 20 <= response.peak_memory_bytes <= 56 << 20


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_flood_is_cut_at_the_limit(sandbox: SandboxClient, stream: str) -> None:
    response = await run_program(sandbox, "resources/output_flood.py", args=[stream])
    assert (response.stdout_truncated, response.stderr_truncated) == (stream == "stdout", stream == "stderr")
    assert getattr(response, stream) == b"x" * 65536


async def test_host_files_are_out_of_reach(sandbox: SandboxClient, host_secret: str) -> None:
    await assert_held(sandbox, Attack("breakouts/host_files.py", args=[host_secret, socket.gethostname()]))


async def test_environment_of_the_service_is_not_inherited(sandbox: SandboxClient) -> None:
    of_every_program = {*ENVIRONMENT, "PYTHONPATH", "LC_ALL", "LC_CTYPE", "PWD", "SHLVL", "_"}
    names = sorted(set(os.environ) - of_every_program)
    assert names
    await assert_held(sandbox, Attack("breakouts/environment.py", args=names))


async def test_network_is_out_of_reach(sandbox: SandboxClient) -> None:
    assert socket.create_connection(sandbox.target.rsplit(":", 1)).fileno()
    await assert_held(sandbox, Attack("breakouts/network.py", args=[sandbox.target]))


async def test_local_sockets_of_the_host_are_out_of_reach(sandbox: SandboxClient) -> None:
    name = f"perigee-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as neighbour:
        listener.bind(f"\0{name}")
        listener.listen()
        neighbour.connect(f"\0{name}")
        await assert_held(sandbox, Attack("breakouts/abstract_socket.py", args=[name]))


@pytest.mark.parametrize(
    ("program", "number"),
    [("breakouts/kill_group.py", signal.SIGKILL), ("breakouts/abort.py", signal.SIGABRT)],
)
async def test_own_end_by_a_signal_is_reported_as_such(sandbox: SandboxClient, program: str, number: int) -> None:
    response = await run_program(sandbox, program)
    assert (response.status, response.exit_code, response.signal) == (RUNTIME_ERROR, -1, number)
    await assert_serves(sandbox)


async def test_bytes_come_back_as_they_were_written(sandbox: SandboxClient) -> None:
    response = await run_program(sandbox, "breakouts/terminal.py")
    expected = b"\x1b[2J\x1b]0;owned\x07\x1b[6n\x1bP+q544e\x1b\\\r\n\x08\x7f" + bytes(range(256))
    assert (response.status, response.stdout, response.stderr) == (OK, expected, expected)


async def test_many_attacks_at_once_do_not_disturb_a_job(sandbox: SandboxClient) -> None:
    programs = ["fork_bomb.py", "memory_bomb.py", "output_from_children.py", "busy_child.py", "memory_in_many.py"]
    attacks = [run_program(sandbox, f"resources/{name}", ROOMY) for name in programs * 2]
    _, *responses = await asyncio.gather(assert_serves(sandbox), *attacks)
    assert {response.status for response in responses} <= {TIME_LIMIT, MEMORY_LIMIT, OUTPUT_LIMIT, OK}
    await assert_serves(sandbox)
