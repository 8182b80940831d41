"""What a person sees while a run goes on: the interface of the views, and the one for plain lines."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self, TextIO

from perigee.cli.figures import evaluation_line, format_seconds, phase_name, progress_line, result_line
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.report.records import Evaluation


class View(ABC):
    """Shows notes and snapshots of a run; a context manager, so that the terminal is left as it was found."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Shows one line about what the program does."""

    @abstractmethod
    def show(self, snapshot: pb.RunSnapshot) -> None:
        """Shows the state of the run."""

    @abstractmethod
    def show_iteration(self, result: pb.IterationResult) -> None:
        """Shows an iteration that was committed."""

    @abstractmethod
    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Shows a held-out accuracy."""

    def stopping(self) -> None:
        """Tells that the services are being ended."""
        self.note("stopping the services")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainView(View):
    """One line per note, phase outside the iterations, and iteration: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._phase: tuple[int, int, int] | None = None

    def note(self, text: str) -> None:
        """Prints the line."""
        print(text, file=self._stream, flush=True)

    def show(self, snapshot: pb.RunSnapshot) -> None:
        """Prints a line when a phase outside the iterations begins."""
        # Each supervised stage is told: it ends with a new policy version.
        phase = (snapshot.phase, snapshot.iteration, snapshot.policy_version)
        if phase != self._phase:
            self._phase = phase
            if snapshot.phase not in _ITERATION_PHASES:
                elapsed = format_seconds(snapshot.elapsed_seconds)
                self.note(f"{phase_name(snapshot.phase)}: {progress_line(snapshot)}, {elapsed} since the start")

    def show_iteration(self, result: pb.IterationResult) -> None:
        """Prints a line."""
        self.note(result_line(result))

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Prints a line."""
        self.note(evaluation_line(evaluation))


_ITERATION_PHASES = (
    pb.RUN_PHASE_ROLLOUT,
    pb.RUN_PHASE_SCORING,
    pb.RUN_PHASE_TRAINING,
    pb.RUN_PHASE_WEIGHTS,
    pb.RUN_PHASE_COMMIT,
)
