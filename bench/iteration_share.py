"""Share of an iteration that is neither rollout nor training, from a run's metrics.jsonl."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class IterationShare:
    """Shares of each iteration's seconds, without the first iteration of the run."""

    seconds: list[float]
    other: list[float]

    @property
    def median(self) -> float:
        """Median share of an iteration that is neither rollout nor training."""
        return statistics.median(self.other)


def measure_iteration_share(run: Path) -> IterationShare:
    """Reads a run's folder. Raises ValueError when it has fewer than two iterations."""
    lines = _read_iterations(run)
    if not lines:
        raise ValueError(f"{run / 'metrics.jsonl'} has fewer than two iterations")
    return IterationShare([line["time/iteration_seconds"] for line in lines], [_other_share(line) for line in lines])


def longest_others(run: Path) -> list[tuple[str, float]]:
    """Returns median seconds of the phases other than rollout and training, longest first; phases may overlap."""
    lines = _read_iterations(run)
    phases = {key.split("/")[1] for line in lines for key in line if key.endswith("/start")} - {"rollout", "training"}
    medians = {name: statistics.median(line.get(f"time/{name}/seconds", 0.0) for line in lines) for name in phases}
    return sorted(medians.items(), key=lambda item: -item[1])


def _read_iterations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines[1:]


def _other_share(line: dict[str, Any]) -> float:
    # Rollout and training never overlap: training waits for the end of the rollout.
    inside = line["time/rollout/seconds"] + line["time/training/seconds"]
    return float(1.0 - inside / line["time/iteration_seconds"])
