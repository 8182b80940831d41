"""The version of a runtime is asked for again when the sandbox failed to ask."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.test_sandbox_lifecycle import owned_by_root, slot_processes
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

RUNTIME = """
name: a-first-one
title: Told after a moment
source: main.sh
run: [sh, "{source}"]
version: [sh, -c, "sleep 2; echo 1.2.3"]
"""


def is_asked() -> bool:
    """Whether the version's command runs; a process that has just ended is none."""
    names = []
    for pid in slot_processes(os.getpid()):
        try:
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return "sleep" in names


async def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    skip_unless_possible("crun")
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes" / "first.yaml").write_text(RUNTIME)
    paths = {"state_path": tmp_path / "state", "runtimes_path": str(tmp_path / "runtimes")}
    async with running_sandbox(**paths, isolation="crun", slots=1) as client:
        listing = asyncio.create_task(client.list_runtimes(pb.ListRuntimesRequest()))
        async with asyncio.timeout(30):
            while not is_asked():  # noqa: ASYNC110 -- other processes set no event
                await asyncio.sleep(0.01)
        for pid in owned_by_root(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        [failed] = [each for each in (await listing).runtimes if each.language == "a-first-one"]
        assert failed.version.startswith("unknown (slot-0")
        listed = await client.list_runtimes(pb.ListRuntimesRequest())
        [known] = [each for each in listed.runtimes if each.language == "a-first-one"]
        assert known.version == "1.2.3"
