"""The records of a run as they lie in its folder: metrics.jsonl, evaluations.jsonl, summary.json, recipe.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perigee.errors import InvalidArgumentError

OVERALL = "overall"


@dataclass(frozen=True)
class Estimate:
    """A share with its 95% interval; the bounds are None where the records hold none."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy of one policy version, by domain and for all of them under `overall`."""

    iteration: int
    greedy: Mapping[str, Estimate]
    sampled: Mapping[str, Estimate]

    @property
    def domains(self) -> list[str]:
        """`overall` first, then the domains by name."""
        names = {*self.greedy, *self.sampled}
        return [name for name in (OVERALL, *sorted(names - {OVERALL})) if name in names]


@dataclass(frozen=True)
class Iteration:
    """One line of metrics.jsonl: its number and its figures, nested keys joined by a slash."""

    number: int
    values: Mapping[str, Any]

    def get(self, key: str) -> float | None:
        """The number under `key`; None when the line has none."""
        value = self.values.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def below(self, key: str) -> dict[str, float]:
        """The numbers under `key/...` by the rest of their keys."""
        prefix = f"{key}/"
        names = [name for name in self.values if name.startswith(prefix)]
        return {name.removeprefix(prefix): value for name in names if (value := self.get(name)) is not None}


@dataclass(frozen=True)
class RunRecords:
    """All records of a run; what was not written yet is empty."""

    path: Path
    iterations: Sequence[Iteration]
    evaluations: Sequence[Evaluation]
    summary: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.path.name

    @property
    def before(self) -> Evaluation | None:
        """Accuracy of the model that the reinforcement learning began with."""
        return _read_accuracy(0, self.summary.get("accuracy_before"))

    @property
    def after(self) -> Evaluation | None:
        """Accuracy of the final model."""
        return _read_accuracy(len(self.iterations), self.summary.get("accuracy_after"))


def read_records(path: Path) -> RunRecords:
    """The records in a run folder.

    Raises InvalidArgumentError naming the file and line that cannot be read, or when there is no record at all.
    """
    rows = [flatten(row) for row in _read_lines(path / "metrics.jsonl")]
    evaluations = read_evaluations(path)
    summary = _read_json(path / "summary.json")
    if not rows and not evaluations and not summary:
        raise InvalidArgumentError.of(str(path), "holds no metrics.jsonl, evaluations.jsonl or summary.json")
    return RunRecords(
        path=path,
        iterations=[_read_iteration(index, row) for index, row in enumerate(rows, start=1)],
        evaluations=evaluations,
        summary=summary,
        recipe=_read_recipe(path / "recipe.yaml"),
    )


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluations in a run folder by iteration; of two at one iteration the later, which is the final one, stands.

    Raises InvalidArgumentError naming the line that cannot be read.
    """
    found = {e.iteration: e for e in map(_read_evaluation, _read_lines(path / "evaluations.jsonl"))}
    return [found[iteration] for iteration in sorted(found)]


def last_recorded(path: Path) -> tuple[int, int]:
    """The number of the last iteration in a run folder, and of the last evaluation; 0 where there is none.

    Evaluations count from 1, two at one iteration are two. Raises InvalidArgumentError naming the line that cannot be
    read.
    """
    rows = enumerate(_read_lines(path / "metrics.jsonl"), start=1)
    iteration = max((int(row.get("iteration", index)) for index, row in rows), default=0)
    return iteration, sum(1 for _ in _read_lines(path / "evaluations.jsonl"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by a slash."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_iteration(index: int, row: dict[str, Any]) -> Iteration:
    trained = row.get("trajectories_trained")
    if trained and "trajectories_multi_version" in row:
        row["share_multi_version"] = row["trajectories_multi_version"] / trained
    return Iteration(int(row.get("iteration", index)), row)


def _read_evaluation(row: Mapping[str, Any]) -> Evaluation:
    evaluation = _read_accuracy(int(row.get("iteration", 0)), row.get("accuracy", row))
    assert evaluation is not None
    return evaluation


def _read_accuracy(iteration: int, accuracy: Mapping[str, Any] | None) -> Evaluation | None:
    if not accuracy:
        return None
    found: dict[str, dict[str, Estimate]] = {"greedy": {}, "sampled": {}}
    for domain, kinds in accuracy.items():
        for kind, estimates in found.items():
            if isinstance(kinds, Mapping) and (estimate := _read_estimate(kinds.get(kind))) is not None:
                estimates[domain] = estimate
    return Evaluation(iteration, found["greedy"], found["sampled"])


def _read_estimate(value: Any) -> Estimate | None:
    if isinstance(value, Mapping) and value.get("mean") is not None:
        return Estimate(value["mean"], value.get("low"), value.get("high"))
    return Estimate(value) if isinstance(value, int | float) else None


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        return
    # A last line without an end was cut by a crash, or is being written.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgumentError.of(f"{path}, line {number}", f"is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidArgumentError.of(f"{path}, line {number}", "must be a JSON object")
        yield row


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError.of(str(path), f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.of(str(path), "must be a JSON object")
    return values


def _read_recipe(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidArgumentError.of(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}
