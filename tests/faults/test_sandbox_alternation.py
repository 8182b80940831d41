"""Kinds of jobs that take turns in one place leave nothing of each other there."""

from __future__ import annotations

import os
from pathlib import Path

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.test_sandbox_lifecycle import slot_processes
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

JOBS = (("python", b"pass"), ("bash", b":"))


async def test_languages_that_take_turns(tmp_path: Path) -> None:
    for isolation in ("zygote", "crun"):
        skip_unless_possible(isolation)
    async with running_sandbox(tmp_path, isolation="zygote", slots=1) as client:
        counts = []
        for _ in range(40):
            for language, source in JOBS:
                response = await client.execute(pb.ExecuteRequest(language=language, source=source))
                assert response.status == pb.STATUS_OK, response
            counts.append(len(slot_processes(os.getpid())))
        assert max(counts) <= 12, counts  # a launcher, a container, and what is just ending
