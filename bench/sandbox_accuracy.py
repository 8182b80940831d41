"""What the sandbox says of a program's memory and CPU time, against programs whose use is known."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_figures import largest_accepted, relative_error, worst
from sandbox_service import CALL_S, Service, sandbox_service

from perigee.sandbox.v1 import sandbox_pb2 as pb

TARGET = 0.05
KIB, MIB = 1 << 10, 1 << 20
PROGRAMS = Path(__file__).with_name("sandbox_programs")
LANGUAGES = {".py": "python", ".c": "c"}
TOUCHED_MIB = (64, 128, 200)
BURNT_S = (0.5, 1.0, 2.0)
LIMIT_MIB = 128
ROOMY = pb.Limits(wall_ms=60_000, cpu_ms=30_000, memory_bytes=512 * MIB)


@dataclass(frozen=True)
class Accuracy:
    """Measurements of one quantity, each with what is known; `target` is the largest error that is right, if any."""

    name: str
    known: list[float]
    measured: list[float]
    target: float | None = TARGET

    @property
    def errors(self) -> list[float]:
        """Relative error of each."""
        return [relative_error(measured, known) for measured, known in zip(self.measured, self.known, strict=True)]

    @property
    def worst(self) -> float:
        """The largest of the errors, with its sign."""
        return worst(self.errors)


async def measure_accuracy(folder: Path, repeats: int) -> tuple[list[Accuracy], list[str]]:
    """All figures, and what was left out because its language is not there."""
    results: list[Accuracy] = []
    missing: list[str] = []
    for isolation, suffixes in (("zygote", (".py",)), ("crun", (".py", ".c"))):
        async with sandbox_service(folder, isolation) as service:
            for suffix in suffixes:
                if LANGUAGES[suffix] not in service.runtimes:
                    missing.append(f"{isolation} {LANGUAGES[suffix]}: the service has no such runtime")
                    continue
                results += await _measure_memory(service, suffix, repeats)
                results += await _measure_cpu(service, suffix, repeats)
    return results, missing


async def _measure_memory(service: Service, suffix: str, repeats: int) -> list[Accuracy]:
    name = f"{service.isolation} {LANGUAGES[suffix]}"
    sizes = [size for size in TOUCHED_MIB for _ in range(repeats)]
    empty = statistics.median([await _peak_bytes(service, suffix, 0) for _ in range(repeats)])
    peaks = [await _peak_bytes(service, suffix, size * KIB) for size in sizes]
    known = [float(size * MIB) for size in sizes]
    largest = KIB * await _largest_touched(service, suffix)
    limit = float(LIMIT_MIB * MIB)
    return [
        Accuracy(f"{name}: peak memory", known, [peak - empty for peak in peaks]),
        Accuracy(f"{name}: peak memory, the empty program's in it", known, list(map(float, peaks)), None),
        Accuracy(f"{name}: memory limit, with the empty program's peak", [limit], [largest + empty]),
        Accuracy(f"{name}: memory limit, largest allocation alone", [limit], [float(largest)], None),
    ]


async def _measure_cpu(service: Service, suffix: str, repeats: int) -> list[Accuracy]:
    name = f"{service.isolation} {LANGUAGES[suffix]}"
    results = []
    for program in ("burn", *(["burn_in_children"] if suffix == ".py" else [])):
        known, measured = [], []
        for seconds in [seconds for seconds in BURNT_S for _ in range(repeats)]:
            response = await service.run(_request(f"{program}{suffix}", seconds, ROOMY))
            known.append(float(response.stdout))
            measured.append(response.cpu_ms / 1000)
        results.append(Accuracy(f"{name}: CPU time, {program.replace('_', ' ')}", known, measured))
    over = [await _cpu_at_limit_ms(service, suffix, 1000) for _ in range(repeats)]
    results.append(Accuracy(f"{name}: CPU time at which a limit of 1 s ends it", [1000.0] * repeats, over, None))
    return results


def _request(program: str, argument: float, limits: pb.Limits) -> pb.ExecuteRequest:
    path = PROGRAMS / program
    return pb.ExecuteRequest(
        language=LANGUAGES[path.suffix], source=path.read_bytes(), args=[str(argument)], limits=limits
    )


async def _peak_bytes(service: Service, suffix: str, kib: int) -> int:
    return (await service.run(_request(f"touch{suffix}", kib, ROOMY))).peak_memory_bytes


async def _largest_touched(service: Service, suffix: str) -> int:
    """KiB of the largest allocation that may be touched below the limit, to 1 percent."""
    limits = pb.Limits(wall_ms=60_000, cpu_ms=30_000, memory_bytes=LIMIT_MIB * MIB)
    limit_kib = LIMIT_MIB * KIB
    loop = asyncio.get_running_loop()

    async def fits(kib: int) -> bool:
        response = await service.client.execute(_request(f"touch{suffix}", kib, limits), timeout_s=CALL_S)
        if response.status not in (pb.STATUS_OK, pb.STATUS_MEMORY_LIMIT, pb.STATUS_RUNTIME_ERROR):
            raise RuntimeError(f"{service.isolation}: {pb.Status.Name(response.status)} {response.reason}")
        return response.status == pb.STATUS_OK

    def accepts(kib: int) -> bool:
        return asyncio.run_coroutine_threadsafe(fits(kib), loop).result()

    return await asyncio.to_thread(largest_accepted, accepts, limit_kib // 4, 2 * limit_kib, limit_kib // 100)


async def _cpu_at_limit_ms(service: Service, suffix: str, limit_ms: int) -> float:
    limits = pb.Limits(wall_ms=60_000, cpu_ms=limit_ms)
    response = await service.client.execute(_request(f"burn{suffix}", 30, limits), timeout_s=CALL_S)
    if response.status != pb.STATUS_TIME_LIMIT:
        raise RuntimeError(f"{service.isolation}: {pb.Status.Name(response.status)} instead of a time limit")
    return float(response.cpu_ms)


def table_of(results: Sequence[Accuracy], missing: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of quantity, median error, target."""
    rows = []
    for result in results:
        median = statistics.median(result.errors)
        target = f"<= {result.target:.0%}" if result.target is not None else ""
        detail = f"worst {result.worst:+.1%} of {len(result.errors)}"
        rows.append((result.name, f"{median:+.1%}", target, detail))
    return [*rows, *((text, "", "", "left out") for text in missing)]


def to_json(results: Sequence[Accuracy], missing: Sequence[str]) -> dict[str, Any]:
    """The figures as JSON."""
    return {"missing": list(missing), "quantities": [vars(result) | {"errors": result.errors} for result in results]}
