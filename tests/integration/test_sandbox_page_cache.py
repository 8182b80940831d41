"""Memory of jobs: files that a job was the first to read are charged to its place, and later jobs get neither their
room nor their size; where the kernel cannot reset the peak of a control group, it is that of the largest process.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.usage import UsageFiles, open_usage
from services.sandbox.runtime import worker_slots
from services.sandbox.runtime.cgroups import find_cgroups
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

READER = b"""
import os
left = 300 << 20  # more than the limits of the jobs that follow
for folder, _, names in os.walk('/usr/lib'):
    for name in names:
        path = os.path.join(folder, name)
        if left > 0 and os.path.isfile(path) and not os.path.islink(path):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while part := os.read(descriptor, 1 << 20):
                left -= len(part)
            os.close(descriptor)
"""
TOUCH = b"import sys\nheld = bytearray(b'x') * (int(sys.argv[1]) << 20)\n"


ADD = pb.JudgeRequest(
    language="python",
    source=b"def add(a, b): return a + b",
    function_name="add",
    tests=[pb.TestCase(code=pb.CodeTest(code=b"assert add(1, 2) == 3"))],
    limits=pb.Limits(memory_bytes=64 << 20),
)


def cached_bytes() -> int:
    host = find_cgroups()
    assert host is not None
    mount = host.mounts["memory"] if host.version == 1 else host.mounts["unified"]
    found = 0
    for path in mount.glob("perigee-sandbox/*/slot-0/memory.stat"):
        fields = dict(line.split() for line in path.read_text().splitlines())
        found = max(found, int(fields["total_cache" if host.version == 1 else "file"]))
    return found


@pytest.mark.parametrize("isolation", ["zygote", "crun"])
async def test_cached_files_give_no_room_and_take_none(isolation: str, tmp_path: Path) -> None:
    skip_unless_possible(isolation)

    async with running_sandbox(tmp_path, isolation=isolation, slots=1) as client:

        async def touch(mib: int, most_mib: int) -> pb.ExecuteResponse:
            limits = pb.Limits(memory_bytes=most_mib << 20, wall_ms=60_000, cpu_ms=60_000)
            request = pb.ExecuteRequest(language="python", source=TOUCH, args=[str(mib)], limits=limits)
            return await client.execute(request)

        roomy = pb.Limits(memory_bytes=512 << 20, wall_ms=60_000, cpu_ms=60_000)
        read = await client.execute(pb.ExecuteRequest(language="python", source=READER, limits=roomy))
        assert read.status == pb.STATUS_OK, read.stderr
        if cached_bytes() < 128 << 20:
            pytest.skip("needs files that nobody has read yet: they are all in another group's cache")
        judged = await client.judge(ADD)  # by a test that talks with it
        assert judged.verdict == pb.TEST_VERDICT_ACCEPTED, judged
        read = await client.execute(pb.ExecuteRequest(language="python", source=READER, limits=roomy))
        assert read.status == pb.STATUS_OK, read.stderr
        making_room = await touch(200, 256)  # while it runs
        assert making_room.status == pb.STATUS_OK
        # At least half of its limit was full of files, so without what made room for it this would be 128 MiB at most.
        assert 160 << 20 <= making_room.peak_memory_bytes <= 225 << 20
        assert (await touch(128, 64)).status == pb.STATUS_MEMORY_LIMIT
        fitting = await touch(40, 64)
        assert fitting.status == pb.STATUS_OK
        assert 38 << 20 <= fitting.peak_memory_bytes <= 56 << 20


async def test_memory_is_known_where_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in cgroup v2 before Linux 6.12, where the file is read-only."""
    skip_unless_possible("zygote")

    def open_read_only(version: int, paths: dict[str, str]) -> UsageFiles:
        opened = open_usage(version, paths)
        os.close(opened.peak)
        return replace(opened, peak=os.open(paths["peak"], os.O_RDONLY | os.O_CLOEXEC))

    monkeypatch.setattr(worker_slots, "open_usage", open_read_only)
    async with running_sandbox(tmp_path, isolation="zygote", slots=1) as client:
        response = await client.execute(pb.ExecuteRequest(language="python", source=TOUCH, args=["40"]))
    assert response.status == pb.STATUS_OK, response
    assert 40 << 20 <= response.peak_memory_bytes <= 80 << 20
