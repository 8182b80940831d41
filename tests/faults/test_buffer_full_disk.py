"""The buffer on a disk that fills up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import UnavailableError
from services.buffer.config import BufferConfig
from services.buffer.service import lifespan
from services.kit.server import serving

RUN = "full"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount: the program is not there")
    if mounted.returncode:
        pytest.skip("needs mount: file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def create_group(client: BufferClient, name: str, tokens: int) -> None:
    prompt = pack_token_ids(range(tokens))
    group = pb.NewGroup(group_id=name, prompt_id="p", prompt_token_ids=prompt, trajectory_ids=[f"{name}.0"])
    await client.create_groups(pb.CreateGroupsRequest(run_id=RUN, groups=[group]))


async def fill(client: BufferClient, acknowledged: list[str]) -> None:
    """Creates groups of 400 kB, noting each, until one fails."""
    for index in range(100):
        await create_group(client, f"g{index}", tokens=100_000)
        acknowledged.append(f"g{index}")


async def list_groups(client: BufferClient) -> list[str]:
    pages = client.list_groups(pb.ListGroupsRequest(run_id=RUN))
    return [group.group_id async for page in pages for group in page.groups]


async def test_a_full_disk_loses_nothing_acknowledged_and_is_recovered_from(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    config = BufferConfig(data_path=small_disk / "buffer")
    acknowledged: list[str] = []
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        await client.create_run(pb.CreateRunRequest(run_id=RUN, config_digest="d"))
        with pytest.raises(UnavailableError, match="redis cannot be used"):
            await fill(client, acknowledged)
        assert 3 < len(acknowledged) < 20
        ballast.unlink()
        # The calls are retried while the server starts again.
        await create_group(client, "after", tokens=1000)
        held = await list_groups(client)
        assert held[: len(acknowledged)] == acknowledged
        assert held[-1] == "after"
    async with serving(config, lifespan) as app, BufferClient.connect(app.address) as client:
        assert await list_groups(client) == held
