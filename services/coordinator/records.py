"""What a run leaves in its folder: metrics.jsonl, evaluations.jsonl, sft.jsonl, summary.json, TensorBoard files.

metrics.jsonl has a line per committed iteration, evaluations.jsonl one per evaluation, sft.jsonl one per stage of
supervised fine-tuning. `iteration_metrics.py` and `evaluation.py` say what is in a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from services.coordinator.files import append_line, read_lines, write_atomically, write_lines
from services.coordinator.run_state import Totals
from services.coordinator.tensor_board import TensorBoard


class Records:
    """The files of one run."""

    def __init__(self, run_path: Path) -> None:
        self.path = run_path
        # Grows whenever there is something new to be read.
        self.revision = 0
        self._board = TensorBoard(run_path / "tensorboard")

    def close(self) -> None:
        """Ends the TensorBoard file."""
        self._board.close()

    def restore_iterations(self, committed: int, last_line: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Brings metrics.jsonl to the committed iterations: none twice, none rolled back, the last one there.

        Returns the line of the last one; None when there is no iteration.
        """
        path = self.path / "metrics.jsonl"
        by_iteration = {int(line["iteration"]): line for line in read_lines(path) if line["iteration"] <= committed}
        if last_line is not None and int(last_line["iteration"]) not in by_iteration:
            by_iteration[int(last_line["iteration"])] = dict(last_line)
        write_lines(path, [by_iteration[iteration] for iteration in sorted(by_iteration)])
        self.revision += 1
        return by_iteration[max(by_iteration)] if by_iteration else None

    def has_iterations(self) -> bool:
        """Whether metrics.jsonl holds an iteration."""
        return bool(self.iterations())

    def iterations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl."""
        return read_lines(self.path / "evaluations.jsonl")

    def add_iteration(self, line: Mapping[str, Any]) -> None:
        """Appends an iteration."""
        append_line(self.path / "metrics.jsonl", line)
        self.revision += 1
        self._board.add_scalars(flatten(line), int(line["iteration"]))

    def add_sft_stage(self, line: Mapping[str, Any]) -> None:
        """Appends a stage of supervised fine-tuning."""
        append_line(self.path / "sft.jsonl", line)

    def add_sft_step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a step of supervised fine-tuning in TensorBoard; steps count over all stages."""
        self._board.add_scalars({f"sft/{name}": value for name, value in values.items()}, step)

    def sft_seconds(self) -> float:
        """Seconds of the stages done."""
        return sum(float(line["seconds"]) for line in read_lines(self.path / "sft.jsonl"))

    def add_evaluation(self, line: Mapping[str, Any]) -> None:
        """Appends an evaluation."""
        append_line(self.path / "evaluations.jsonl", line)
        self.revision += 1
        scalars = {f"evaluation/{name}": value for name, value in flatten(line["accuracy"]).items()}
        self._board.add_scalars(scalars, int(line["iteration"]))

    def evaluation(self, moment: str, iteration: int) -> dict[str, Any] | None:
        """An evaluation that was made already."""
        for line in self.evaluations():
            if line["moment"] == moment and line["iteration"] == iteration:
                return line
        return None

    def write_summary(
        self, before: Mapping[str, Any], after: Mapping[str, Any], totals: Totals, facts: Mapping[str, Any]
    ) -> None:
        """Writes summary.json: accuracies, seconds per phase and sums of the run."""
        summary = {
            **facts,
            "accuracy_before": before["accuracy"],
            "accuracy_after": after["accuracy"],
            "seconds": {phase: round(seconds, 3) for phase, seconds in totals.seconds.items()},
            "trajectories_trained": totals.trajectories_trained,
            "trajectories_multi_version": totals.trajectories_multi_version,
            "tokens_generated": totals.tokens_generated,
            "max_logprob_difference": totals.max_logprob_difference,
        }
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, keys joined by a slash."""
    return dict(_flat_items(values, prefix))


def number_or_none(value: float) -> float | None:
    """JSON knows no NaN: an unknown number is null."""
    return None if math.isnan(value) else round(value, 6)


def _flat_items(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat_items(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, float(value)
