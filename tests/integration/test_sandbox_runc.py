"""Containers that runc runs in place of crun."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.server import serving
from services.sandbox.__main__ import lifespan
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.isolation import choose_isolation, read_machine

PROGRAMS = {
    "echo 42": (pb.STATUS_OK, b"42\n"),
    "sleep 60 & sleep 60": (pb.STATUS_TIME_LIMIT, b""),
    "a=x; while :; do a=$a$a; done": (pb.STATUS_MEMORY_LIMIT, b""),
    "echo again": (pb.STATUS_OK, b"again\n"),
}


def instance_in(state: Path) -> str:
    """The name of the one service with this folder of states."""
    [folder] = state.iterdir()
    return folder.name


def groups_of(instance: str) -> list[Path]:
    """Control groups with the name of an instance, in any hierarchy."""
    return [*Path("/sys/fs/cgroup").glob(f"**/{instance}*")]


@pytest.mark.skipif(shutil.which("runc") is None, reason="needs runc (apt-get install runc)")
async def test_programs_end_as_under_crun(tmp_path: Path) -> None:
    config = SandboxConfig(oci_runtime="runc", isolation="crun", slots=1, max_sessions=0, state_path=str(tmp_path))
    assert choose_isolation(config, read_machine()).label(python=False) == "runc"
    async with serving(config, lifespan) as app, SandboxClient.connect(app.address) as client:
        for source, expected in PROGRAMS.items():
            limits = pb.Limits(wall_ms=1500, cpu_ms=1500, memory_bytes=64 << 20)
            request = pb.ExecuteRequest(language="bash", source=source.encode(), limits=limits)
            response = await client.execute(request, timeout_s=60)
            assert (response.status, response.stdout) == expected, response
        instance = instance_in(tmp_path)
    assert groups_of(instance) == []
