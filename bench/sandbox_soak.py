"""Many jobs, well-behaved and not, and whether the service is afterwards what it was before."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sandbox_figures import Growth, growth_of, percentile
from sandbox_service import CALL_S, EMPTY, Service, sandbox_service

from perigee.sandbox.v1 import sandbox_pb2 as pb

MIB = 1 << 20
WARM_UP = 200
LOOK_S = 0.2
REST_S = 30.0
CONTAINED_EVERY = 20
LABELS = {
    "service_rss_mib": "the service's RSS, MiB",
    "helpers_rss_mib": "its helpers' RSS, MiB",
    "processes": "processes",
    "open_files": "open files",
    "mounts": "mounts",
    "control_groups": "control groups of its own",
    "kernel_control_groups": "control groups in the kernel",
    "state_files": "files below its state folder",
    "median_ms": "a light job's time, median ms",
    "p95_ms": "a light job's time, p95 ms",
}


@dataclass(frozen=True)
class Kind:
    """One job in `every` is of this kind, and is to end with `status`."""

    name: str
    every: int
    status: int
    request: pb.ExecuteRequest


def _python(source: str, **limits: int) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(language="python", source=source.encode(), limits=pb.Limits(**limits))


LIGHT = Kind("light", 1, pb.STATUS_OK, pb.ExecuteRequest(language="python", source=EMPTY["python"]))
# The first that fits a job's number is taken.
KINDS = (
    Kind("past its memory", 500, pb.STATUS_MEMORY_LIMIT, _python("held = bytearray(b'x') * (1 << 28)", memory_bytes=32 * MIB)),  # noqa: E501
    Kind("past its time", 250, pb.STATUS_TIME_LIMIT, _python("import time\ntime.sleep(60)", wall_ms=100)),
    Kind("with a daemon", 125, pb.STATUS_OK, _python("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)")),  # noqa: E501
    Kind("talkative", 100, pb.STATUS_OK, _python("print('x' * 60_000)")),
    Kind("failing", 50, pb.STATUS_RUNTIME_ERROR, _python("raise SystemExit(3)")),
    LIGHT,
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the service and its helpers hold after `jobs` jobs, while none runs."""

    jobs: int
    service_rss_mib: float
    helpers_rss_mib: float
    processes: int
    open_files: int
    mounts: int
    control_groups: int
    kernel_control_groups: int
    state_files: int


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the light jobs of one stretch, from call to result."""

    jobs: int
    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Soak:
    """Everything that was sampled; `unexpected` are jobs that ended otherwise than their kind does."""

    jobs: int
    seconds: float
    samples: list[Sample]
    latencies: list[Latency]
    unexpected: list[str]

    def growths(self) -> dict[str, Growth]:
        """Growth of each series; latencies count from the first stretch."""
        jobs = [sample.jobs for sample in self.samples]
        names = [name for name in vars(self.samples[0]) if name != "jobs"]
        growths = {name: growth_of(jobs, [getattr(sample, name) for sample in self.samples]) for name in names}
        stretches = [latency.jobs for latency in self.latencies]
        for name in ("median_ms", "p95_ms"):
            growths[name] = growth_of(stretches, [getattr(latency, name) for latency in self.latencies])
        return growths


async def measure_soak(folder: Path, jobs: int, concurrency: int, lean: str | None) -> Soak:
    """Runs `jobs` jobs in stretches of a thousand; a twentieth are containers if there is another language."""
    async with sandbox_service(folder, "zygote") as service:
        kinds = _kinds(service, lean)
        run = _Run(service, kinds, concurrency)
        await run.stretch(WARM_UP)
        stretch = min(1000, max(1, jobs // 5))
        samples, latencies = [await settled_sample(service, folder, 0)], []
        begin = time.perf_counter()
        for first in range(0, jobs, stretch):
            times = await run.stretch(min(stretch, jobs - first))
            done = first + min(stretch, jobs - first)
            latencies.append(Latency(done, statistics.median(times), percentile(times, 0.95)))
            samples.append(await settled_sample(service, folder, done))
        return Soak(jobs, time.perf_counter() - begin, samples, latencies, run.unexpected)


def _kinds(service: Service, lean: str | None) -> tuple[Kind, ...]:
    languages = [lean] if lean else list(EMPTY)
    contained = [name for name in languages if name in service.runtimes and service.runtimes[name].isolation == "crun"]
    if not contained:
        return KINDS
    request = pb.ExecuteRequest(language=contained[0], source=EMPTY[contained[0]])
    return (*KINDS[:-1], Kind(f"in a container ({contained[0]})", CONTAINED_EVERY, pb.STATUS_OK, request), LIGHT)


class _Run:
    """Jobs by number, a few at once."""

    def __init__(self, service: Service, kinds: Sequence[Kind], concurrency: int) -> None:
        self.unexpected: list[str] = []
        self._service = service
        self._kinds = kinds
        self._concurrency = concurrency
        self._number = 0

    async def stretch(self, jobs: int) -> list[float]:
        """Runs so many jobs; milliseconds of the light ones."""
        numbers = iter(range(self._number + 1, self._number + jobs + 1))
        self._number += jobs
        times: list[float] = []
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._work(numbers, times))
        return times

    async def _work(self, numbers: Iterator[int], times: list[float]) -> None:
        for number in numbers:
            kind = next(kind for kind in self._kinds if number % kind.every == 0)
            begin = time.perf_counter()
            response = await self._service.client.execute(kind.request, timeout_s=CALL_S)
            if kind is LIGHT:
                times.append((time.perf_counter() - begin) * 1000)
            if response.status != kind.status:
                status = pb.Status.Name(response.status)
                self.unexpected.append(f"job {number}, {kind.name}: {status} {response.reason}")


async def settled_sample(service: Service, folder: Path, jobs: int) -> Sample:
    """A sample once the same processes are there in two looks: helpers of the last jobs may still be ending.

    Raises TimeoutError when the service does not come to rest.
    """
    served = psutil.Process(service.pid)
    async with asyncio.timeout(REST_S):
        before: set[int] = set()
        while True:
            now = {process.pid for process in served.children(recursive=True)}
            if now == before:
                try:
                    return take_sample(service, folder, jobs)
                except (psutil.NoSuchProcess, FileNotFoundError):
                    now = set()  # one ended between the look and the sample
            before = now
            await asyncio.sleep(LOOK_S)


def take_sample(service: Service, folder: Path, jobs: int) -> Sample:
    """Looks at the service's processes from outside."""
    served = psutil.Process(service.pid)
    helpers = served.children(recursive=True)
    everyone = [served, *helpers]
    return Sample(
        jobs=jobs,
        service_rss_mib=round(served.memory_info().rss / MIB, 1),
        helpers_rss_mib=round(sum(helper.memory_info().rss for helper in helpers) / MIB, 1),
        processes=len(everyone),
        open_files=sum(process.num_fds() for process in everyone),
        mounts=_count_mounts([process.pid for process in everyone]),
        control_groups=sum(len(files) for files in _groups_of(service.pid).values()),
        kernel_control_groups=_kernel_groups(),
        state_files=sum(1 for _ in folder.rglob("*")),
    )


def _count_mounts(pids: Sequence[int]) -> int:
    """Mounts in all the mount namespaces that the processes are in, each namespace counted once."""
    namespaces = {Path(f"/proc/{pid}/ns/mnt").stat().st_ino: pid for pid in pids}
    return sum(Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8").count("\n") for pid in namespaces.values())


def _groups_of(pid: int) -> dict[Path, list[Path]]:
    """The control groups whose path tells that a process made them, by mount."""
    mounts = [
        Path(line.split()[4])
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
        if " - cgroup" in line
    ]
    return {mount: [path for path in mount.rglob(f"*{pid}*/**/") if path.is_dir()] for mount in mounts}


def _kernel_groups() -> int:
    """Control groups that the kernel keeps, dying ones included, in all hierarchies."""
    lines = Path("/proc/cgroups").read_text(encoding="utf-8").splitlines()[1:]
    hierarchies = {line.split()[1]: int(line.split()[2]) for line in lines}
    return sum(hierarchies.values())


def table_of(soak: Soak) -> list[tuple[str, ...]]:
    """Rows of series, growth from the first sample to the last; first, middle and last value, and slope."""
    rows = []
    for name, growth in soak.growths().items():
        ends = f"{growth.first:.4g}, {growth.middle:.4g}, {growth.last:.4g}"
        detail = f"{ends}; {growth.per_thousand:+.3f} per 1000 jobs"
        rows.append((f"growth of {LABELS[name]}", f"{growth.change:+.4g}", "", detail))
    rows.append(("jobs that ended unexpectedly", str(len(soak.unexpected)), "<= 0", f"of {soak.jobs}"))
    rows.append(("jobs/s", f"{soak.jobs / soak.seconds:.1f}", "", f"{soak.seconds:.0f} s"))
    return rows


def to_json(soak: Soak) -> dict[str, Any]:
    """The figures as JSON."""
    return {
        "jobs": soak.jobs,
        "seconds": soak.seconds,
        "samples": [vars(sample) for sample in soak.samples],
        "latencies": [vars(latency) for latency in soak.latencies],
        "unexpected": soak.unexpected,
        "growth": {name: vars(growth) | {"change": growth.change} for name, growth in soak.growths().items()},
    }
