"""The service's end of a sandbox, when the other end goes away."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from services.sandbox.agent import protocol
from services.sandbox.agent.protocol import Limits, RunRequest
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.sandboxes import Sandbox
from services.sandbox.runtime.worker_slots import WorkerSlot

REQUEST = RunRequest("session", Limits(60_000, 60_000, 1 << 28, 64, 1 << 24, 1 << 20, 1024))


async def test_files_that_are_asked_for_are_not_waited_for_when_the_sandbox_breaks(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        sandbox = Sandbox(ours, WorkerSlot("slot-0", 60001, tmp_path, None))
        with pytest.raises(SandboxFailedError, match="no process runs"):
            await sandbox.collect(["a"], 10)
        running = asyncio.create_task(sandbox.run(REQUEST, []))
        await asyncio.sleep(0)
        collecting = asyncio.create_task(sandbox.collect(["a"], 10))
        await asyncio.sleep(0)
        assert [protocol.receive(theirs).header["kind"] for _ in range(2)] == ["run", "collect"]
        theirs.close()
        async with asyncio.timeout(60):
            with pytest.raises(SandboxFailedError, match="before it was reached"):
                await collecting
            with pytest.raises(SandboxFailedError, match="slot-0"):
                await running
    assert sandbox.broken
