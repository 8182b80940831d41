"""Worker slots of sessions come back, whatever happens to the call that ends one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.api.requests import read_session
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.pool import open_pool
from services.sandbox.runtime.sessions import Sessions


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: programs run under a uid of their own when the service is root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


async def test_a_close_that_is_cancelled_frees_the_slot(open_folder: Path) -> None:
    config = SandboxConfig(isolation="process", slots=1, max_sessions=1, state_path=str(open_folder))
    async with open_pool(config) as pool:
        sessions = Sessions(pool)
        program, idle_s = read_session(pb.CreateSessionRequest(language="python"), config, pool.catalog)
        try:
            for _ in range(2):
                session = await sessions.create(program, idle_s)
                closing = asyncio.create_task(sessions.end(session.id))
                await asyncio.sleep(0)
                closing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await closing
            session = await sessions.create(program, idle_s)
            assert (await sessions.run(pb.RunCellRequest(session_id=session.id, code=b"6 * 7"))).result == "42"
        finally:
            await sessions.close()
