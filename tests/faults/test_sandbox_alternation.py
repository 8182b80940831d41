"""Jobs of different kinds that alternate in one worker slot leave nothing of each other there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import skip_unless_there
from tests.faults.test_sandbox_lifecycle import instances, slot_processes
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

JOBS = (("python", b"pass"), ("bash", b":"))


async def test_languages_that_take_turns(tmp_path: Path) -> None:
    for isolation in ("zygote", "crun"):
        skip_unless_possible(isolation)
    others = instances(os.getpid())
    async with running_sandbox(tmp_path, isolation="zygote", slots=1) as client:
        [own] = instances(os.getpid()) - others
        counts = []
        for _ in range(40):
            for language, source in JOBS:
                response = await client.execute(pb.ExecuteRequest(language=language, source=source))
                assert response.status == pb.STATUS_OK, response
            counts.append(len(slot_processes(own)))
        assert max(counts) <= 12, counts  # a launcher, a container, and what is just ending


async def test_what_a_compiled_program_leaves_is_gone_before_the_next_job(tmp_path: Path) -> None:
    """What was compiled is forgotten when its job ends, and with it a container that was made in advance."""
    for isolation in ("zygote", "crun"):
        skip_unless_possible(isolation)
    jobs = [
        pb.ExecuteRequest(language=language, source=source)
        for language, source in (("c", b"int main(void) { return 0; }"), ("python", b"pass"))
    ]
    async with running_sandbox(tmp_path, isolation="zygote", slots=1) as client:
        await skip_unless_there(client, "program.c")
        for response in await asyncio.gather(*(client.execute(job) for _ in range(20) for job in jobs)):
            assert response.status == pb.STATUS_OK, response
