"""The share of an iteration that is neither rollout nor training, from a run's metrics.jsonl."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class IterationShare:
    """Shares of each iteration's seconds; the first iteration of the run is left out."""

    seconds: list[float]
    other: list[float]

    @property
    def median(self) -> float:
        """Median share of an iteration that is neither rollout nor training."""
        return statistics.median(self.other)


def measure_iteration_share(run: Path) -> IterationShare:
    """Reads a run's folder. Raises ValueError when it holds fewer than two iterations."""
    lines = _read_iterations(run)
    if not lines:
        raise ValueError(f"{run / 'metrics.jsonl'} holds fewer than two iterations")
    seconds = [line["iteration_seconds"] for line in lines]
    return IterationShare(seconds, [_other_share(line["phases"], line["iteration_seconds"]) for line in lines])


def longest_others(run: Path) -> list[tuple[str, float]]:
    """Median seconds of the phases beside rollout and training, the longest first; phases may overlap."""
    phases = [line["phases"] for line in _read_iterations(run)]
    names = {name for phase in phases for name in phase} - {"rollout", "training"}
    medians = {name: statistics.median(phase.get(name, {}).get("seconds", 0.0) for phase in phases) for name in names}
    return sorted(medians.items(), key=lambda item: -item[1])


def _read_iterations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines[1:]


def _other_share(phases: dict[str, dict[str, float]], seconds: float) -> float:
    """Rollout and training never overlap: training waits for the end of the rollout."""
    return 1.0 - (phases["rollout"]["seconds"] + phases["training"]["seconds"]) / seconds
