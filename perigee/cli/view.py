"""Views of a run and of long commands: plain lines for logs and pipes, a panel or a bar on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from perigee.cli.metrics import (
    evaluation_line,
    format_seconds,
    new_warnings,
    phase_name,
    phase_seconds,
    progress_line,
    remaining_seconds,
    result_line,
    shown_metrics,
    worker_state,
)
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.report.records import Evaluation
from perigee.report.samples import Sample, read_sample, text_lines

REFRESH_PER_SECOND = 4
NOTES_SHOWN = 4
SAMPLE_LINES = 4
SAMPLE_COLUMNS = 160
TREND_LENGTH = 40
PHASE_BAR_WIDTH = 20
_BLOCKS = "▁▂▃▄▅▆▇█"
_PHASE_COLORS = {
    "rollout": "blue",
    "scoring": "cyan",
    "training": "magenta",
    "checkpoint": "red",
    "weights": "yellow",
    "commit": "green",
    "leave": "bright_black",
    "onload": "bright_magenta",
    "convert": "bright_red",
    "offload": "bright_yellow",
    "ahead": "bright_blue",
}
_ITERATION_PHASES = (
    pb.RUN_PHASE_ROLLOUT,
    pb.RUN_PHASE_SCORING,
    pb.RUN_PHASE_TRAINING,
    pb.RUN_PHASE_WEIGHTS,
    pb.RUN_PHASE_COMMIT,
)
PLAIN_EVERY_S = 5.0


class PlainView:
    """One line per note, phase outside the iterations, and iteration: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._phase: tuple[int, int, int] | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves nothing to undo."""

    def note(self, text: str) -> None:
        """Prints the line."""
        print(text, file=self._stream, flush=True)

    def show(self, snapshot: pb.RunSnapshot) -> None:
        """Prints a line when a phase outside the iterations begins."""
        # Each supervised stage gets a line: it ends with a new policy version.
        phase = (snapshot.phase, snapshot.iteration, snapshot.policy_version)
        if phase != self._phase:
            self._phase = phase
            if snapshot.phase not in _ITERATION_PHASES:
                elapsed = format_seconds(snapshot.elapsed_seconds)
                self.note(f"{phase_name(snapshot.phase)}: {progress_line(snapshot)}, {elapsed} since the start")

    def show_iteration(self, result: pb.IterationResult) -> None:
        """Prints a line, and one for each metric that has left its range."""
        self.note(result_line(result))
        for warning in new_warnings(result.metrics, self._warned):
            self.note(warning)

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Prints a line."""
        self.note(evaluation_line(evaluation))


class LiveView:
    """Redraws one panel in place; a context manager, so that the terminal is left as it was found."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._notes: deque[str] = deque(maxlen=NOTES_SHOWN)
        self._snapshot: pb.RunSnapshot | None = None
        self._received_at = time.monotonic()
        self._trends: dict[str, deque[float]] = {}
        self._evaluation: Evaluation | None = None
        self._sample: Sample | None = None
        self._warned: set[str] = set()
        # Draws at once, so it comes last.
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_SECOND, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Adds the line to the latest notes."""
        self._notes.append(text)

    def show(self, snapshot: pb.RunSnapshot) -> None:
        """Keeps the snapshot for the next drawing."""
        self._snapshot, self._received_at = snapshot, time.monotonic()

    def show_iteration(self, result: pb.IterationResult) -> None:
        """Adds the metrics to their trends."""
        for key, value in result.metrics.items():
            self._trends.setdefault(key, deque(maxlen=TREND_LENGTH)).append(value)
        if result.samples:
            self._sample = read_sample(json.loads(result.samples[0]))
        self._notes.extend(new_warnings(result.metrics, self._warned))

    def show_evaluation(self, evaluation: Evaluation) -> None:
        """Keeps the accuracy for the next drawing."""
        self._evaluation = evaluation

    def _render(self) -> RenderableType:
        notes = Text("\n".join(self._notes), style="dim", overflow="ellipsis", no_wrap=True)
        snapshot = self._snapshot
        if snapshot is None:
            return Panel(notes, title="perigee", title_align="left", border_style="blue")
        parts: list[RenderableType] = [self._phase_row(snapshot), Text()]
        if snapshot.metrics:
            parts += [self._metric_table(snapshot), Text()]
        if self._evaluation is not None:
            parts += [_evaluation_table(self._evaluation), Text()]
        if self._sample is not None:
            parts += [_sample_text(self._sample), Text()]
        parts += [_worker_table(snapshot), Text(), notes]
        title = f"perigee · {snapshot.run_id} · {format_seconds(self._since(snapshot.elapsed_seconds))}"
        if (left := remaining_seconds(snapshot)) is not None and snapshot.phase < pb.RUN_PHASE_FINISHED:
            title += f" · about {format_seconds(left)} left"
        return Panel(Group(*parts), title=title, title_align="left", border_style="blue")

    def _since(self, seconds: float) -> float:
        """Seconds of the snapshot, counted on since it came."""
        ended = self._snapshot is not None and self._snapshot.phase >= pb.RUN_PHASE_FINISHED
        return seconds if ended else seconds + time.monotonic() - self._received_at

    def _phase_row(self, snapshot: pb.RunSnapshot) -> RenderableType:
        row = Table.grid(padding=(0, 2))
        name = phase_name(snapshot.phase)
        cells: list[RenderableType] = [Text(name, style=f"bold {_PHASE_COLORS.get(name, 'white')}")]
        if snapshot.phase_total:
            cells.append(ProgressBar(total=snapshot.phase_total, completed=snapshot.phase_done, width=24))
        cells += [Text(progress_line(snapshot)), Text(format_seconds(self._since(snapshot.phase_seconds)), style="dim")]
        row.add_row(*cells)
        return row

    def _metric_table(self, snapshot: pb.RunSnapshot) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for metric in shown_metrics(snapshot.metrics):
            trend = self._trends.get(metric.key, deque())
            table.add_row(
                Text(metric.label, style="dim"),
                Text(metric.text, style="bold"),
                Text(sparkline(list(trend)), style="blue"),
            )
        phases = phase_seconds(snapshot.metrics)
        if phases:
            table.add_row(
                Text("phases", style="dim"),
                Text(format_seconds(sum(phases.values())), style="bold"),
                _phase_bar(phases),
            )
        return table


View = PlainView | LiveView


def open_view(plain: bool) -> View:
    """Returns the live view on a terminal, plain lines elsewhere or when they are asked for."""
    console = Console()
    return LiveView(console) if console.is_terminal and not plain else PlainView(sys.stdout)


def sparkline(values: list[float]) -> str:
    """Returns the values as block characters, lowest to highest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def _phase_bar(phases: dict[str, float]) -> Text:
    bar = Text()
    total = sum(phases.values()) or 1.0
    for name, seconds in phases.items():
        bar.append("━" * max(1, round(PHASE_BAR_WIDTH * seconds / total)), style=_PHASE_COLORS.get(name, "white"))
        bar.append(f" {name} {seconds:.1f}  ", style="dim")
    return bar


def _evaluation_table(evaluation: Evaluation) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(name, style="dim") for name in (f"held out at {evaluation.iteration}", "sampled", "greedy")))
    for domain in evaluation.domains:
        estimates = (evaluation.sampled.get(domain), evaluation.greedy.get(domain))
        table.add_row(Text(domain), *(Text(str(e) if e else "", style="bold") for e in estimates))
    return table


def _sample_text(sample: Sample) -> RenderableType:
    """A sample's facts, and the first lines of its response."""
    facts, *lines = text_lines(sample)
    shown = [line[:SAMPLE_COLUMNS] for line in lines if line.startswith(">")][:SAMPLE_LINES]
    return Text("\n".join([facts, *shown]), style="dim", overflow="ellipsis", no_wrap=True)


def _worker_table(snapshot: pb.RunSnapshot) -> RenderableType:
    if not snapshot.workers:
        return Text("no rollout worker is registered: one registers when its engine has loaded", style="yellow")
    table = Table.grid(padding=(0, 2))
    for worker in snapshot.workers:
        state = Text(worker_state(worker), style="green" if worker.ready else "yellow")
        table.add_row(
            Text(worker.worker_id),
            Text(worker.address, style="dim"),
            state,
            Text(f"{worker.running} running"),
            Text(f"version {worker.policy_version}"),
        )
    return table


class ProgressView:
    """Counts what is done of `total` and shows it with a note; a context manager."""

    def __init__(self, console: Console, label: str, total: int, *, plain: bool = False) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._done = 0
        self._shown_at = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not plain:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._shown_at >= PLAIN_EVERY_S or self._done == self._total:
            self._shown_at = now
            self._console.print(
                f"{self._label}: {self._done:,} of {self._total:,}" + (f", {note}" if note else ""),
                highlight=False,
                markup=False,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
