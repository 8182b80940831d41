"""Cells that turn on their own session: it may be lost, the other sessions and the sandbox are not."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub
from tests.faults.attack_runs import (
    MEMORY_LIMIT,
    OK,
    RUNTIME_ERROR,
    TIME_LIMIT,
    assert_serves,
    make_limits,
    read_program,
)

AT_ONCE_S = 60.0
FORGES = ("sessions/patches.py", "sessions/steals_cells.py")
GONE = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}


class Session:
    """An open session of the sandbox."""

    def __init__(self, stub: Any, session_id: str) -> None:
        self.session_id = session_id
        self._stub = stub

    async def run(self, code: bytes, **fields: Any) -> Any:
        """Runs one cell."""
        request = pb.RunCellRequest(session_id=self.session_id, code=code, **fields)
        return await self._stub.RunCell(request, timeout=AT_ONCE_S)


@asynccontextmanager
async def open_session(client: SandboxClient, **limits: int) -> AsyncIterator[Session]:
    """A session with small limits, closed at the end whatever has become of it."""
    stub: Any = SandboxServiceStub(client.channel)
    request = pb.CreateSessionRequest(language="python", limits=make_limits("python", **limits))
    created = await stub.CreateSession(request, timeout=AT_ONCE_S)
    try:
        yield Session(stub, created.session_id)
    finally:
        await stub.CloseSession(pb.CloseSessionRequest(session_id=created.session_id), timeout=AT_ONCE_S)


async def run_or_code(session: Session, code: bytes) -> tuple[Any, grpc.StatusCode | None]:
    """The response to a cell, or the code of its refusal."""
    try:
        return await session.run(code), None
    except grpc.aio.AioRpcError as error:
        return None, error.code()


@pytest.mark.parametrize(
    ("program", "statuses"),
    [
        ("sessions/exits.py", {RUNTIME_ERROR}),
        ("sessions/closes_descriptors.py", {OK, RUNTIME_ERROR}),
        ("sessions/floods_descriptors.py", {OK, RUNTIME_ERROR}),
        ("sessions/patches.py", {OK, RUNTIME_ERROR}),
        ("sessions/forks.py", {OK, RUNTIME_ERROR}),
        ("sessions/daemon.py", {OK, RUNTIME_ERROR}),
        ("sessions/kills_the_session.py", {RUNTIME_ERROR}),
        ("sessions/steals_cells.py", {OK}),
        ("sessions/deaf.py", {TIME_LIMIT}),
        ("resources/busy.py", {TIME_LIMIT}),
        ("resources/asleep.py", {TIME_LIMIT}),
        ("resources/memory_bomb.py", {MEMORY_LIMIT}),
        ("resources/fork_bomb.py", {TIME_LIMIT, MEMORY_LIMIT}),
        ("resources/output_from_children.py", {pb.STATUS_OUTPUT_LIMIT}),
        ("breakouts/kill_group.py", {RUNTIME_ERROR}),
    ],
)
async def test_a_cell_hurts_its_own_session_alone(sandbox: SandboxClient, program: str, statuses: set[int]) -> None:
    async with open_session(sandbox) as neighbour, open_session(sandbox, wall_ms=3000) as session:
        assert (await neighbour.run(b"kept = 6")).status == OK
        response = await session.run(read_program(program))
        assert response.status in statuses, response
        again, code = await run_or_code(session, b"print(7 * 6)")
        if again is None:
            assert code in GONE
            # Forks of an interrupted bomb live on in its session, and may meet the memory limit before the next cell.
            assert not response.alive or (program, response.status) == ("resources/fork_bomb.py", TIME_LIMIT)
        else:
            assert again.status != OK or again.stdout == b"42\n" or program in FORGES
        assert (await neighbour.run(b"print(7 * kept)")).stdout == b"42\n"
    await assert_serves(sandbox)


async def test_a_session_ends_with_its_memory(sandbox: SandboxClient) -> None:
    async with open_session(sandbox) as session:
        response = await session.run(read_program("resources/memory_bomb.py"))
        assert (response.status, response.alive) == (MEMORY_LIMIT, False)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await session.run(b"1")
        assert error.value.code() in GONE


@pytest.mark.parametrize("target", ["host_secret", "/etc/passwd"])
async def test_files_of_a_running_session_are_own_or_an_error(
    sandbox: SandboxClient, host_secret: str, target: str
) -> None:
    """Here the program still runs while its files are read, so it can exchange them at any moment."""
    path = host_secret if target == "host_secret" else target
    names = ["out", f"folder/{path.rpartition('/')[2]}"]
    async with open_session(sandbox, cpu_ms=20_000) as session:
        code = f"import sys\nsys.argv[1:] = [{path!r}]\n".encode() + read_program("files/race.py")
        await session.run(code)
        for _ in range(30):
            response = await session.run(b"1", output_files=names * 4)
            for file in response.files:
                assert b"root:" not in file.content
                assert file.error or file.content in (b"own", b"")
    await assert_serves(sandbox)


@pytest.mark.parametrize("program", ["fifo", "kernel_links", "device", "huge", "sparse", "socket", "growing"])
async def test_files_of_a_session_come_at_once(sandbox: SandboxClient, program: str) -> None:
    names = ["out", "locked", "memory", "environment", "root", "input", "disk", "folder/etc/passwd"]
    async with open_session(sandbox, file_bytes=32 << 20, memory_bytes=256 << 20) as session:
        async with asyncio.timeout(AT_ONCE_S):
            response = await session.run(read_program(f"files/{program}.py"), output_files=names)
        assert [file.path for file in response.files] == names
        for file in response.files:
            assert b"root:" not in file.content
            assert set(file.content) <= set(b"own\0x")
    await assert_serves(sandbox)


async def test_sessions_do_not_see_each_other(sandbox: SandboxClient) -> None:
    secret = f"sesame-{secrets.token_hex(8)}"
    async with open_session(sandbox) as holder, open_session(sandbox, cpu_ms=10_000) as other:
        keep = f"key = {secret!r}\nfor folder in ('/box', '/tmp', '/dev/shm'): open(folder + '/key', 'w').write(key)"
        assert (await holder.run(keep.encode())).status == OK
        found = await other.run(read_program("secrets/search.py") + b"\nprint('key' in globals())")
        assert found.stdout == b"nothing\nFalse\n"
        assert (await holder.run(b"key")).result == repr(secret)


async def test_sessions_cannot_be_guessed(sandbox: SandboxClient) -> None:
    async with open_session(sandbox) as first, open_session(sandbox) as second:
        assert len({first.session_id, second.session_id}) == 2
        assert min(len(first.session_id), len(second.session_id)) >= 16
        for guess in ("", "0", first.session_id[:-1], first.session_id[:-1] + "0" * 2, f"../{first.session_id}"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await Session(SandboxServiceStub(sandbox.channel), guess).run(b"1")
            assert error.value.code() in (*GONE, grpc.StatusCode.INVALID_ARGUMENT)
