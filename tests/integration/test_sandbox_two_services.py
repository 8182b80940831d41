"""Several services on one machine, over the same control groups and the same folder."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

BUSY = pb.ExecuteRequest(language="python", source=b"print(sum(range(10 ** 5)))")


async def test_services_start_run_and_end_beside_each_other(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    fields = {"isolation": "zygote", "slots": 1, "max_sessions": 0}
    async with running_sandbox(tmp_path, **fields) as first:
        async with AsyncExitStack() as others:
            opening = [others.enter_async_context(running_sandbox(tmp_path, **fields)) for _ in range(2)]
            clients = [first, *await asyncio.gather(*opening)]
            for response in await asyncio.gather(*(client.execute(BUSY) for client in clients * 3)):
                assert response.stdout == b"4999950000\n", response
        assert (await first.execute(BUSY)).status == pb.STATUS_OK  # the end of the others has removed nothing of it
        assert len([*tmp_path.glob("*-*/")]) == 1  # noqa: ASYNC240
    assert [*tmp_path.glob("*-*/")] == []  # noqa: ASYNC240
