"""What the sandbox is compared with: the same commands started without it, bare and in a bare crun container."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sandbox_bundle import make_bundle

PYTHON = "/usr/bin/python3"
CONTROLLERS = ("memory", "pids", "cpuacct", "cpu")
ANSWER_S = 300.0
_EMPTYING_S = 10.0


class Spawner:
    """A small parent process that starts commands and times them."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def time(self, command: Sequence[str], count: int) -> list[float]:
        """Milliseconds of each of `count` runs, one at a time. Raises RuntimeError when one fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": list(command), "count": count}).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_S)
        answer = json.loads(line) if line else {"error": "the spawner ended"}
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return [float(milliseconds) for milliseconds in answer]


@asynccontextmanager
async def open_spawner(hide: Sequence[str] = (), enter: Sequence[str] = ()) -> AsyncIterator[Spawner]:
    """A spawner that does not see the mounts `hide` and has entered the groups of the `enter` files."""
    script = Path(__file__).with_name("sandbox_spawner.py")
    options = json.dumps({"hide": list(hide), "enter": list(enter)})
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, "-I", "-S", str(script), options), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Spawner(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


class BareCrun:
    """`crun run` of an empty container, in a control group that was made before."""

    def __init__(self, spawner: Spawner, crun: str, folder: Path) -> None:
        self._spawner = spawner
        self._crun = crun
        self._folder = folder

    def add(self, name: str, command: Sequence[str], **changes: Any) -> None:
        """Writes the bundle of a command."""
        make_bundle(self._folder / name, command, **changes)

    async def time(self, name: str, count: int) -> list[float]:
        """Milliseconds of each of `count` containers, one after another."""
        state = ["--root", str(self._folder / "state"), "--cgroup-manager", "disabled"]
        command = [self._crun, *state, "run", "--bundle", str(self._folder / name), "bench-{n}"]
        return await self._spawner.time(command, count)


@asynccontextmanager
async def open_bare_crun(folder: Path) -> AsyncIterator[BareCrun]:
    """Needs root, crun and writable control groups; raises RuntimeError that names what is missing."""
    crun = shutil.which("crun")
    if crun is None:
        raise RuntimeError("crun is not installed")
    if os.geteuid() != 0:
        raise RuntimeError("bare crun is started as root")
    with made_groups() as (groups, hybrid):
        async with open_spawner(hybrid, [str(group / "cgroup.procs") for group in groups]) as spawner:
            yield BareCrun(spawner, crun, folder)


@contextmanager
def made_groups() -> Iterator[tuple[list[Path], list[str]]]:
    """A control group of one's own in each hierarchy, and the mounts to hide from crun."""
    mounts, hybrid = find_groups(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    if not mounts:
        raise RuntimeError("no control groups are mounted")
    groups = [mount / f"perigee-bench-{os.getpid()}" for mount in mounts]
    try:
        for group in groups:
            group.mkdir()
        yield groups, hybrid
    finally:
        for group in groups:
            remove_group(group)


def find_groups(mountinfo: str) -> tuple[list[Path], list[str]]:
    """Where groups are to be made: the mounts of the v1 controllers, or that of v2 alone; and the v2 mounts that stand
    beside v1 ones, which crun refuses to see.
    """
    v1: dict[str, Path] = {}
    v2: list[str] = []
    for line in mountinfo.splitlines():
        fields, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        target = fields.split()[4]
        if kind == "cgroup":
            v1 |= {name: Path(target) for name in options.split(",") if name in CONTROLLERS}
        elif kind == "cgroup2":
            v2.append(target)
    if v1:
        return list(dict.fromkeys(v1.values())), v2
    return [Path(v2[0])] if v2 else [], []


def remove_group(group: Path) -> None:
    """Ends what is left in a group and removes it. Raises OSError when the kernel does not let go of it."""
    deadline = time.monotonic() + _EMPTYING_S
    while group.exists():
        for pid in (group / "cgroup.procs").read_text(encoding="utf-8").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)  # a killed process leaves its group a moment later
