"""Memory of process trees, sampled: PSS from /proc/PID/smaps_rollup, and what they have in /dev/shm once.

Pages of code that several processes map count in part for each; an image in shared memory counts whole, mapped or not.
Whoever samples must not have loaded the libraries of those who are measured, or takes a part of their pages.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.kit.server import end_tasks

INTERVAL_S = 0.1
SHARED_MEMORY = Path("/dev/shm")
# A process, or a file of one, that ended since it was found.
_GONE = (FileNotFoundError, ProcessLookupError)
_PSS = re.compile(r"^Pss_(Anon|File|Shmem):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class TreeMemory:
    """Bytes of a process and all below it."""

    own: int = 0
    """Anonymous memory and mapped files."""
    shared: int = 0
    """Images of weights in shared memory that they made, or all shared memory that they map where that is more."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.own + self.shared


@dataclass
class PairPeaks:
    """Largest memory of a trainer's and a worker's tree, each by itself and both at one time."""

    trainer: int = 0
    worker: int = 0
    pair: int = 0
    at_peak: tuple[TreeMemory, TreeMemory] = (TreeMemory(), TreeMemory())
    samples: int = 0

    def add(self, trainer: TreeMemory, worker: TreeMemory) -> None:
        """Adds a sample."""
        self.samples += 1
        self.trainer, self.worker = max(self.trainer, trainer.total), max(self.worker, worker.total)
        if trainer.total + worker.total > self.pair:
            self.pair, self.at_peak = trainer.total + worker.total, (trainer, worker)


@asynccontextmanager
async def sampling(trainer: int, worker: int, interval_s: float = INTERVAL_S) -> AsyncIterator[PairPeaks]:
    """Samples the trees of two processes while the block runs."""
    peaks = PairPeaks()

    async def sample() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + interval_s
            peaks.add(*await asyncio.to_thread(read_trees, (trainer, worker)))
            await asyncio.sleep(due - loop.time())

    task = asyncio.create_task(sample())
    try:
        yield peaks
    finally:
        await end_tasks(task)


def read_trees(roots: Sequence[int]) -> list[TreeMemory]:
    """Returns the memory of the trees below some processes."""
    children = find_children()
    return [measure(list_tree(root, children)) for root in roots]


def find_children() -> dict[int, list[int]]:
    """Returns the children of every process."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(*_GONE):
            # The name in parentheses may have any character.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            children[int(fields[1])].append(int(path.parent.name))
    return children


def list_tree(root: int, children: dict[int, list[int]]) -> list[int]:
    """Returns a process and all below it."""
    return [root, *(each for child in children[root] for each in list_tree(child, children))]


def measure(processes: Sequence[int]) -> TreeMemory:
    """Returns the memory of processes together; those that have ended have none."""
    found: Counter[str] = Counter()
    files = 0
    for process in processes:
        with suppress(*_GONE):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
            found.update({name: int(size) * 1024 for name, size in _PSS.findall(rollup)})
        for image in SHARED_MEMORY.glob(f"perigee-weights-{process}-*"):
            with suppress(*_GONE):
                files += image.stat().st_blocks * 512
    return TreeMemory(found["Anon"] + found["File"], max(found["Shmem"], files))
