"""Records of a run in its folder (metrics.jsonl, evaluations.jsonl, summary.json, recipe.yaml) and its headline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.config import read_yaml
from perigee.errors import InvalidArgumentError
from perigee.files import read_lines
from perigee.statistics import Interval

OVERALL = "overall"


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy of one policy version, by domain and for all of them under `overall`."""

    iteration: int
    greedy: Mapping[str, Interval]
    sampled: Mapping[str, Interval]

    @property
    def domains(self) -> list[str]:
        """`overall` first, then the domains by name; one domain says nothing more."""
        names = sorted({*self.greedy, *self.sampled}, key=lambda name: (name != OVERALL, name))
        return names[:1] if len(names) == 2 else names


@dataclass(frozen=True)
class Iteration:
    """One line of metrics.jsonl: its number and its metrics."""

    number: int
    values: Mapping[str, Any]

    def get(self, key: str) -> float | None:
        """Returns the number under `key`; None when the line has none."""
        value = self.values.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def below(self, key: str) -> dict[str, float]:
        """Returns the numbers under `key/...` by the rest of their keys."""
        prefix = f"{key}/"
        names = [name for name in self.values if name.startswith(prefix)]
        return {name.removeprefix(prefix): value for name in names if (value := self.get(name)) is not None}


@dataclass(frozen=True)
class RunRecords:
    """All records of a run; those that were not written yet are empty."""

    path: Path
    iterations: Sequence[Iteration]
    evaluations: Sequence[Evaluation]
    summary: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.path.name


@dataclass(frozen=True)
class Change:
    """Change of one accuracy: of a domain, or `overall`, by sampled or greedy answers."""

    domain: str
    kind: str
    before: Interval
    after: Interval

    @property
    def gain(self) -> float:
        """Difference of the means."""
        return self.after.mean - self.before.mean

    @property
    def is_apart(self) -> bool:
        """Whether the two 95% intervals do not overlap."""
        return self.after.is_apart_from(self.before)


def changes(records: RunRecords) -> list[Change]:
    """Returns the changes from the first evaluation to the last, `overall` first, sampled before greedy."""
    if len(records.evaluations) < 2:
        return []
    before, after = records.evaluations[0], records.evaluations[-1]
    found = []
    for domain in after.domains:
        for kind, old, new in (("sampled", before.sampled, after.sampled), ("greedy", before.greedy, after.greedy)):
            if domain in old and domain in new:
                found.append(Change(domain, kind, old[domain], new[domain]))
    return found


def headline_lines(records: RunRecords) -> list[str]:
    """Returns a line per change, for a terminal."""
    lines = [
        f"{change.domain:<10} {change.kind:<8} {change.before} -> {change.after}  {change.gain:+.3f}"
        + ("  intervals apart" if change.is_apart else "")
        for change in changes(records)
    ]
    return lines or ["no accuracy to compare: the run has fewer than two evaluations"]


def read_records(path: Path) -> RunRecords:
    """Reads the records in a run folder.

    Raises DataLossError naming the line that cannot be read, InvalidArgumentError for another file that cannot be read
    or when there is no record at all.
    """
    rows = read_lines(path / "metrics.jsonl")
    evaluations = read_evaluations(path)
    summary = _read_summary(path / "summary.json")
    if not rows and not evaluations and not summary:
        raise InvalidArgumentError.for_field(str(path), "has no metrics.jsonl, evaluations.jsonl or summary.json")
    return RunRecords(
        path=path,
        iterations=[_read_iteration(index, row) for index, row in enumerate(rows, start=1)],
        evaluations=evaluations,
        summary=summary,
        recipe=read_yaml(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else {},
    )


def read_evaluations(path: Path) -> list[Evaluation]:
    """Reads the evaluations in a run folder by iteration; of two at one iteration only the later, the final one.

    Raises DataLossError naming the line that cannot be read.
    """
    found = {e.iteration: e for e in map(_read_evaluation, read_lines(path / "evaluations.jsonl"))}
    return [found[iteration] for iteration in sorted(found)]


def last_recorded(path: Path) -> tuple[int, int]:
    """Returns the number of the last iteration in a run folder, and of the last evaluation; 0 where there is none.

    Evaluations count from 1, two at one iteration are two. Raises DataLossError naming the line that cannot be read.
    """
    rows = enumerate(read_lines(path / "metrics.jsonl"), start=1)
    iteration = max((int(row.get("iteration", index)) for index, row in rows), default=0)
    return iteration, len(read_lines(path / "evaluations.jsonl"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings, keys joined by a slash."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_iteration(index: int, row: dict[str, Any]) -> Iteration:
    trained = row.get("train/trajectories")
    if trained and "train/trajectories_multi_version" in row:
        row["train/multi_version_rate"] = row["train/trajectories_multi_version"] / trained
    return Iteration(int(row.get("iteration", index)), row)


def _read_evaluation(row: Mapping[str, Any]) -> Evaluation:
    greedy, sampled = (
        {domain: Interval(**kinds[kind]) for domain, kinds in row["accuracy"].items() if _has_mean(kinds.get(kind))}
        for kind in ("greedy", "sampled")
    )
    return Evaluation(row["iteration"], greedy, sampled)


def _has_mean(estimate: Mapping[str, Any] | None) -> bool:
    """Returns whether any response counts for an estimate."""
    return estimate is not None and estimate["mean"] is not None


def _read_summary(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError.for_field(str(path), f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.for_field(str(path), "must be a JSON object")
    return values
