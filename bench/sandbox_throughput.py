"""Jobs per second and core at a steady load, through the warm interpreter and through containers, in turn.

Client and service share the cores: the client is this process, an event loop that does nothing else.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import count_cores
from sandbox_service import EMPTY, Service, sandbox_service

# Jobs per second and core of an empty job, at least.
TARGETS = {"zygote python": 100.0, "crun lean": 40.0}


@dataclass(frozen=True)
class Load:
    """A turn of one arm: jobs that ended in a time, and the CPU time that the client spent on them."""

    jobs: int
    seconds: float
    client_cpu_s: float


@dataclass(frozen=True)
class Throughput:
    """Turns of an arm at one concurrency."""

    arm: str
    concurrency: int
    loads: list[Load]

    def per_core(self, cores: int) -> float:
        """Median jobs per second and core."""
        return statistics.median(load.jobs / load.seconds for load in self.loads) / cores

    def client_share(self, cores: int) -> float:
        """Share of all cores' time that the client took."""
        return sum(load.client_cpu_s for load in self.loads) / sum(load.seconds for load in self.loads) / cores


async def measure_throughput(
    folder: Path, lean: str | None, concurrencies: Sequence[int], turns: int, seconds: float
) -> tuple[str, list[Throughput]]:
    """The lean language, and for each concurrency `turns` turns of `seconds` of each arm."""
    async with AsyncExitStack() as stack:
        zygote = await stack.enter_async_context(sandbox_service(folder, "zygote"))
        contained = await stack.enter_async_context(sandbox_service(folder, "crun"))
        lean = lean or await contained.leanest(EMPTY)
        arms = {
            "zygote python": (zygote, "python"),
            "crun lean": (contained, lean),
            "crun python": (contained, "python"),
        }
        results = [Throughput(arm, concurrency, []) for concurrency in concurrencies for arm in arms]
        for _ in range(turns):
            for result in results:
                result.loads.append(await _load(*arms[result.arm], result.concurrency, seconds))
    return lean, results


async def _load(service: Service, language: str, concurrency: int, seconds: float) -> Load:
    jobs = 0
    begin, cpu = time.perf_counter(), time.process_time()

    async def work() -> None:
        nonlocal jobs
        while time.perf_counter() - begin < seconds:
            await service.run_empty(language)
            jobs += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return Load(jobs, time.perf_counter() - begin, time.process_time() - cpu)


def table_of(lean: str, results: Sequence[Throughput]) -> list[tuple[str, ...]]:
    """Rows of arm, jobs per second and core, target."""
    cores, rows = count_cores(), []
    for result in results:
        name = f"{result.arm.replace('lean', lean)}, {result.concurrency} at once, jobs/s/core"
        target = f">= {TARGETS[result.arm]:.0f}" if result.arm in TARGETS else ""
        detail = f"client {result.client_share(cores):.0%} of {cores} cores"
        rows.append((name, f"{result.per_core(cores):.1f}", target, detail))
    return rows


def to_json(lean: str, results: Sequence[Throughput]) -> dict[str, Any]:
    """The figures as JSON."""
    cores = count_cores()
    return {
        "lean": lean,
        "targets": TARGETS,
        "arms": [
            {
                "arm": result.arm,
                "concurrency": result.concurrency,
                "per_core": result.per_core(cores),
                "client_share": result.client_share(cores),
                "loads": [vars(load) for load in result.loads],
            }
            for result in results
        ],
    }
