"""Start to result of an empty job, one at a time: bare processes, bare containers, and the sandbox, in turn."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_bare import PYTHON, open_bare_crun, open_spawner
from sandbox_figures import Arm, Ratio, ratio_of
from sandbox_service import EMPTY, Service, sandbox_service

# figure: (what is divided, by what, at most)
TARGETS = {
    "zygote / bare python": ("zygote python", "bare python", 0.50),
    "zygote / crun python": ("zygote python", "crun python", 0.25),
    "crun lean / bare crun": ("crun lean", "bare crun true", 1.30),
}
HURRIED = ("bare python", "zygote python", "crun lean")
Measure = Callable[[int], Awaitable[list[float]]]


@dataclass(frozen=True)
class Starts:
    """Milliseconds of each arm; `lean` is the language of the arm of that name."""

    lean: str
    arms: dict[str, Arm]

    def ratios(self) -> dict[str, Ratio]:
        """The figures that have targets."""
        return {name: ratio_of(self.arms[top], self.arms[base]) for name, (top, base, _) in TARGETS.items()}


async def measure_starts(folder: Path, lean: str | None, turns: int, block: int) -> Starts:
    """Each turn starts every arm once, `block` times over; then some of them once more, `block` starts one right after
    another, which find less prepared.

    `lean` names the language of the smallest container, the fastest of those known unless given.
    """
    async with AsyncExitStack() as stack:
        spawner = await stack.enter_async_context(open_spawner())
        crun = await stack.enter_async_context(open_bare_crun(folder / "bare"))
        zygote = await stack.enter_async_context(sandbox_service(folder, "zygote"))
        contained = await stack.enter_async_context(sandbox_service(folder, "crun"))
        crun.add("true", ["/bin/true"])
        crun.add("python", [PYTHON, "-c", "pass"])
        crun.add("true-unfiltered", ["/bin/true"], seccomp=False)
        lean = lean or await contained.leanest(EMPTY)
        measures: dict[str, Measure] = {
            "bare python": lambda count: spawner.time([PYTHON, "-c", "pass"], count),
            "zygote python": lambda count: time_service(zygote, "python", count),
            "crun python": lambda count: time_service(contained, "python", count),
            "bare crun python": lambda count: crun.time("python", count),
            "crun lean": lambda count: time_service(contained, lean, count),
            "bare crun true": lambda count: crun.time("true", count),
            "bare crun true, no seccomp": lambda count: crun.time("true-unfiltered", count),
        }
        return Starts(lean, await take_turns(measures, turns, block))


async def take_turns(measures: dict[str, Measure], turns: int, block: int) -> dict[str, Arm]:
    """A, B, A, B: every arm in every turn, in the same order."""
    taken: dict[str, list[list[float]]] = {name: [] for name in measures}
    hurried: dict[str, list[list[float]]] = {f"{name}, back to back": [] for name in HURRIED if name in measures}
    for _ in range(turns):
        starts: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(block):
            for name, measure in measures.items():
                starts[name] += await measure(1)
        for name, times in starts.items():
            taken[name].append(times)
        for name in (name for name in HURRIED if name in measures):
            hurried[f"{name}, back to back"].append((await measures[name](block + 1))[1:])
    return {name: Arm(name, turns_of_arm) for name, turns_of_arm in {**taken, **hurried}.items()}


async def time_service(service: Service, language: str, count: int) -> list[float]:
    """Milliseconds of each of `count` calls of Execute with an empty program, one at a time."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        await service.run_empty(language)
        times.append((time.perf_counter() - begin) * 1000)
    return times


def table_of(starts: Starts) -> Sequence[tuple[str, ...]]:
    """Rows of name, median, 95th percentile, and of ratios with their targets."""
    rows: list[tuple[str, ...]] = []
    for name, arm in starts.arms.items():
        shown = name.replace("lean", starts.lean)
        rows.append((f"{shown}, ms", f"{arm.median:.1f}", "", f"p95 {arm.p95:.1f}, {len(arm.samples)} starts"))
    for name, ratio in starts.ratios().items():
        spread = f"turns {ratio.least:.2f} to {ratio.largest:.2f}"
        rows.append((name.replace("lean", starts.lean), f"{ratio.median:.2f}", f"<= {TARGETS[name][2]:.2f}", spread))
    return rows


def to_json(starts: Starts) -> dict[str, Any]:
    """The figures as JSON."""
    arms = {
        name: {"median_ms": arm.median, "p95_ms": arm.p95, "turns_ms": arm.turns} for name, arm in starts.arms.items()
    }
    ratios = {name: vars(ratio) | {"target": TARGETS[name][2]} for name, ratio in starts.ratios().items()}
    return {"lean": starts.lean, "arms": arms, "ratios": ratios}
