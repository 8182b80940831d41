"""Log of a run in its folder: metrics.jsonl, evaluations.jsonl, samples.jsonl, sft.jsonl, summary.json, TensorBoard.

metrics.jsonl has a line per committed iteration, evaluations.jsonl one per evaluation, sft.jsonl one per supervised
stage. The keys of a line are documented where it is made, in `iteration.py` and `evaluation.py`.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import Histogram
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DataType
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from perigee.files import append_lines, dump_line, read_lines, write_atomically, write_lines
from perigee.report.samples import SAMPLES_FILE, Sample, text_lines, to_line
from services.kit.tracing import span

PHASE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
PHASE_SECONDS = Histogram("perigee_coordinator_phase_seconds", "Seconds per phase.", ["phase"], buckets=PHASE_BUCKETS)


class RunLog:
    """Files of one run; `on_change` is called after each record, in the thread that wrote it."""

    def __init__(self, run_path: Path, on_change: Callable[[], None] = lambda: None) -> None:
        self.path = run_path
        self._on_change = on_change
        # Grows with every new line.
        self.revision = 0
        self._tensor_board = TensorBoard(run_path / "tensorboard")
        # Begin and end in samples.jsonl of each evaluation or iteration, for watchers; None before the file was read.
        self._spans: dict[tuple[str, int], tuple[int, int]] | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        self._tensor_board.close()

    def restore_iterations(self, committed: int, last_line: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Rewrites metrics.jsonl with the committed iterations: none twice, none rolled back, the last one there.

        Returns the line of the last one; None when there is no iteration.
        """
        by_iteration = {int(line["iteration"]): line for line in self.iterations() if line["iteration"] <= committed}
        if last_line is not None and int(last_line["iteration"]) not in by_iteration:
            by_iteration[int(last_line["iteration"])] = dict(last_line)
        write_lines(self.path / "metrics.jsonl", [by_iteration[iteration] for iteration in sorted(by_iteration)])
        self.revision += 1
        return by_iteration[max(by_iteration)] if by_iteration else None

    def iterations(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the lines of evaluations.jsonl."""
        return read_lines(self.path / "evaluations.jsonl")

    def add_iteration(self, line: Mapping[str, Any]) -> None:
        """Appends an iteration."""
        append_lines(self.path / "metrics.jsonl", [line])
        self.revision += 1
        self._tensor_board.add_scalars(numbers(line), int(line["iteration"]))
        self._on_change()

    def add_samples(self, samples: Sequence[Sample]) -> None:
        """Appends the samples of one iteration or evaluation, before it is recorded itself."""
        if not samples:
            return
        lines = [to_line(sample) for sample in samples]
        with self._lock:
            spans = self._read_spans()
            append_lines(self.path / SAMPLES_FILE, lines)
            for line in lines:
                _add_span(spans, line)
        name, texts = samples[0].evaluation or "rollout", ["\n".join(text_lines(sample)) for sample in samples]
        self._tensor_board.add_texts(f"samples/{name}", texts, samples[0].iteration)

    def samples(self, evaluation: str, iteration: int) -> list[str]:
        """Returns the lines of samples.jsonl of an iteration, or of an evaluation of a kind, none twice."""
        with self._lock:
            begin, end = self._read_spans().get((evaluation, iteration), (0, 0))
            if not end:
                return []
            with (self.path / SAMPLES_FILE).open("rb") as file:
                file.seek(begin)
                lines = file.read(end - begin).decode().split("\n")[:-1]
        return list({json.loads(line)["id"]: line for line in lines}.values())

    def _read_spans(self) -> dict[tuple[str, int], tuple[int, int]]:
        if self._spans is None:
            self._spans = {}
            for line in read_lines(self.path / SAMPLES_FILE):
                _add_span(self._spans, line)
        return self._spans

    def add_sft_stage(self, line: Mapping[str, Any]) -> None:
        """Appends a supervised stage."""
        append_lines(self.path / "sft.jsonl", [line])
        self._on_change()

    def add_sft_step(self, step: int, values: Mapping[str, float]) -> None:
        """Adds an optimizer step of a supervised stage to TensorBoard; steps count over all stages."""
        self._tensor_board.add_scalars(values, step)

    def sft_seconds(self) -> float:
        """Returns the seconds of the supervised stages done."""
        return sum(float(line["seconds"]) for line in read_lines(self.path / "sft.jsonl"))

    def add_evaluation(self, line: Mapping[str, Any]) -> None:
        """Appends an evaluation."""
        append_lines(self.path / "evaluations.jsonl", [line])
        self.revision += 1
        self._tensor_board.add_scalars(numbers({"evaluation": line["accuracy"]}), int(line["iteration"]))
        self._on_change()

    def evaluation(self, kind: str, iteration: int) -> dict[str, Any] | None:
        """Returns the evaluation of a kind at an iteration; None when it has not been made."""
        for line in self.evaluations():
            if line["kind"] == kind and line["iteration"] == iteration:
                return line
        return None

    def evaluation_of(self, policy_version: int, problems: int, samples: int) -> dict[str, Any] | None:
        """Returns an evaluation of the version on as many problems with as many samples, greedy decoding included."""
        wanted = (policy_version, problems, samples)
        for line in self.evaluations():
            is_same = (line["policy_version"], line["problems"], line["samples"]) == wanted
            if is_same and "greedy" in line["accuracy"]["overall"]:
                return line
        return None

    def summary(self) -> str:
        """Returns summary.json; empty before the run has finished."""
        path = self.path / "summary.json"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / "summary.json", text.encode())
        self.revision += 1
        self._on_change()


def _add_span(spans: dict[tuple[str, int], tuple[int, int]], line: Mapping[str, Any]) -> None:
    """Adds the line behind the last one; lines of the same iteration or evaluation that are not before it are older."""
    _, last = next(reversed(spans.values()), (0, 0))
    begin, end = spans.pop(key := (line["evaluation"], line["iteration"]), (last, last))
    spans[key] = (begin if end == last else last, last + len(dump_line(line)))


class TensorBoard:
    """TensorBoard event file, written without torch or TensorFlow; it is opened with the first scalar."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: EventFileWriter | None = None

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers at a step and flushes them."""
        self._add([Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()], step)

    def add_texts(self, tag: str, texts: Sequence[str], step: int) -> None:
        """Adds texts under one tag at a step and flushes them."""
        # Four spaces make preformatted text of a line.
        shown = ["".join(f"    {line}\n" for line in text.splitlines()).encode() for text in texts]
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(shown))])
        tensor = TensorProto(dtype=DataType.DT_STRING, string_val=shown, tensor_shape=shape)
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add([Summary.Value(tag=tag, tensor=tensor, metadata=metadata)], step)

    def _add(self, values: Sequence[Summary.Value], step: int) -> None:
        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder))
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


@dataclass
class PhaseTime:
    """Seconds from the iteration's start to the phase's start, and seconds that the phase took."""

    start: float
    seconds: float


@dataclass
class Timeline:
    """Phases of one iteration; they may overlap."""

    started: float = field(default_factory=time.monotonic)
    phases: dict[str, PhaseTime] = field(default_factory=dict)
    # Names of the phases under way, the oldest first.
    under_way: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.monotonic()
        self.under_way.append(name)
        try:
            with span(name):
                yield
        finally:
            self.under_way.remove(name)
            seconds = time.monotonic() - start
            self.phases[name] = PhaseTime(start - self.started, seconds)
            PHASE_SECONDS.labels(name).observe(seconds)

    @property
    def seconds(self) -> float:
        """Seconds since the iteration's start."""
        return time.monotonic() - self.started


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numbers of nested mappings, keys joined by a slash."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = float(value)
    return found


def number_or_none(value: float) -> float | None:
    """Rounds to six digits; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(value, 6)
