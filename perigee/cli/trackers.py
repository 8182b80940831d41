"""Experiment trackers: the records of a run, sent to W&B, TensorBoard, MLflow or Trackio, each point once.

Records are read from the files of the run's folder, and `trackers.json` there says how far each tracker has them: what
was recorded while nobody followed, or could not be sent, is sent with the next record.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import Field

from perigee.config import Model
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.files import read_lines, write_atomically
from perigee.report.samples import SAMPLES_FILE, read_sample, text_lines

STATE_FILE = "trackers.json"
# Trackers get this long at the end of a run for what is left.
CLOSE_S = 60.0
# What MLflow takes in no name of a metric; domains have any text.
_REFUSED = re.compile(r"[^/\w.\- ]")


class WandbConfig(Model):
    """Weights & Biases; its own variables (WANDB_API_KEY, WANDB_BASE_URL) hold."""

    project: str
    """Project, made when missing."""
    entity: str | None = None
    """Team or user; the account's default when unset."""
    mode: str = Field("online", pattern="^(online|offline|disabled)$")
    """online, offline (files in the run's folder, sent by `wandb sync`) or disabled."""


class TensorBoardConfig(Model):
    """TensorBoard files in a folder of several runs, beside those that every run has in its own folder."""

    folder: str
    """Folder, below which each run has one of its name."""


class MlflowConfig(Model):
    """MLflow; its own variables (MLFLOW_TRACKING_USERNAME and so on) hold."""

    experiment: str
    """Experiment, made when missing."""
    uri: str | None = None
    """Tracking server or folder; MLFLOW_TRACKING_URI when unset."""


class TrackioConfig(Model):
    """Trackio, a local dashboard."""

    project: str
    """Project, made when missing."""
    space_id: str | None = None
    """Space that shows the project; this machine when unset."""


class TrackersConfig(Model):
    """Experiment trackers, each off when unset."""

    wandb: WandbConfig | None = None
    """Weights & Biases."""
    tensorboard: TensorBoardConfig | None = None
    """TensorBoard files of several runs in one folder."""
    mlflow: MlflowConfig | None = None
    """MLflow."""
    trackio: TrackioConfig | None = None
    """Trackio."""

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of each tracker that is on."""
        return {name: settings for name in type(self).model_fields if (settings := getattr(self, name)) is not None}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows of a run beside its numbers; `own_id` is what the tracker called it before, if anything."""

    path: Path
    recipe: Mapping[str, Any]
    own_id: str | None


class Tracker(ABC):
    """Connection to one tracker; its methods may block."""

    own_id: str | None = None

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers at an iteration."""

    @abstractmethod
    def log_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        """Sends responses for people to read."""

    @abstractmethod
    def close(self) -> None:
        """Sends what is left and ends the connection."""


class WandbTracker(Tracker):
    """A W&B run of the same id."""

    def __init__(self, settings: WandbConfig, run: TrackedRun) -> None:
        self._wandb = import_package("wandb")
        self._run = self._wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            id=run.path.name,
            name=run.path.name,
            dir=str(run.path),
            config=dict(run.recipe),
            resume="allow",
        )
        # W&B's own steps only rise, and an evaluation may follow the next iteration.
        self._run.define_metric("*", step_metric="iteration")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers at an iteration."""
        self._run.log({**values, "iteration": step})

    def log_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        """Sends a table."""
        table = self._wandb.Table(columns=["sample"], data=[[text] for text in texts])
        self._run.log({name: table, "iteration": step})

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class TensorBoardTracker(Tracker):
    """Event files in a folder of the run's name."""

    def __init__(self, settings: TensorBoardConfig, run: TrackedRun) -> None:
        import_package("tensorboard")
        from services.coordinator.run_log import TensorBoard

        self._files = TensorBoard(Path(settings.folder) / run.path.name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers at an iteration."""
        self._files.add_scalars(values, step)

    def log_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        """Writes texts at an iteration."""
        self._files.add_texts(name, texts, step)

    def close(self) -> None:
        """Closes the file."""
        self._files.close()


class MlflowTracker(Tracker):
    """An MLflow run, taken up again by the id that MLflow gave it."""

    def __init__(self, settings: MlflowConfig, run: TrackedRun) -> None:
        self._client = import_package("mlflow").MlflowClient(tracking_uri=settings.uri)
        self.own_id = run.own_id or self._create(settings.experiment, run)

    def _create(self, experiment: str, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id = self._client.create_run(experiment_id, run_name=run.path.name).info.run_id
        self._client.log_dict(run_id, dict(run.recipe), "recipe.json")
        return str(run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers at an iteration, in one call."""
        entities = importlib.import_module("mlflow.entities")
        now = time.time_ns() // 1_000_000
        metrics = [entities.Metric(_REFUSED.sub("_", key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self.own_id, metrics=metrics)

    def log_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        """Sends a file."""
        self._client.log_text(self.own_id, "\n\n".join(texts), f"{name}/{step}.txt")

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self.own_id)


class TrackioTracker(Tracker):
    """A Trackio run of the same name."""

    def __init__(self, settings: TrackioConfig, run: TrackedRun) -> None:
        self._trackio = import_package("trackio")
        self._run = self._trackio.init(
            project=settings.project,
            name=run.path.name,
            space_id=settings.space_id,
            config=dict(run.recipe),
            resume="allow",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers at an iteration."""
        self._run.log(dict(values), step=step)

    def log_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        """Sends one page."""
        page = "\n\n".join(f"```\n{text}\n```" for text in texts)
        self._run.log({name: self._trackio.Markdown(page)}, step=step)

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Any, TrackedRun], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}


def import_package(name: str) -> Any:
    """Returns a tracker's package; raises FailedPreconditionError that says what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise FailedPreconditionError(
            f"trackers.{name} needs {name}, which is not installed: pip install {name}"
        ) from error


@dataclass
class Progress:
    """How far a tracker has the records of a run."""

    iteration: int = 0
    evaluations: int = 0
    samples: int = 0
    own_id: str | None = None


@dataclass
class Trackers:
    """The trackers of a run; `note` says once for each failure in a row that one does not take its numbers."""

    path: Path
    recipe: Mapping[str, Any]
    note: Callable[[str], None]
    _open: dict[str, Tracker] = field(default_factory=dict)
    _progress: dict[str, Progress] = field(default_factory=dict)
    _failing: set[str] = field(default_factory=set)
    _sending: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, config: TrackersConfig) -> None:
        """Opens each tracker; raises FailedPreconditionError for a package that is missing and InvalidArgumentError for
        a tracker that refuses its settings."""
        if not config.chosen:
            return
        file = self.path / STATE_FILE
        known = json.loads(file.read_text()) if file.is_file() else {}
        self._progress = {name: Progress(**known.get(name, {})) for name in config.chosen}
        for name, settings in config.chosen.items():
            run = TrackedRun(self.path, self.recipe, self._progress[name].own_id)
            try:
                self._open[name] = TRACKERS[name](settings, run)
            except FailedPreconditionError:
                raise
            except Exception as error:  # each package has classes of its own
                raise InvalidArgumentError.for_field(f"trackers.{name}", f"cannot be opened: {error}") from error
            self._progress[name].own_id = self._open[name].own_id
        self._save()

    def update(self) -> None:
        """Begins to send the records that are new, unless some are still being sent: nothing waits for a tracker."""
        if self._open and not (self._sending and self._sending.is_alive()):
            self._sending = threading.Thread(target=self._update, daemon=True)
            self._sending.start()

    async def close(self) -> None:
        """Sends what is left and closes the trackers; gives up after CLOSE_S."""
        if not self._open:
            return
        last = threading.Thread(target=self._finish, daemon=True)
        last.start()
        await asyncio.to_thread(last.join, CLOSE_S)
        if last.is_alive():
            self.note(f"trackers: not all was sent within {CLOSE_S:g} s; the next --resume sends the rest")

    def _finish(self) -> None:
        self._update()
        for name, tracker in self._open.items():
            self._guard(name, tracker.close)

    def _update(self) -> None:
        with self._lock:
            for name, tracker in self._open.items():
                self._guard(name, partial(self._send, tracker, self._progress[name]))

    def _send(self, tracker: Tracker, progress: Progress) -> None:
        from services.coordinator.run_log import numbers

        for line in read_lines(self.path / "evaluations.jsonl")[progress.evaluations :]:
            tracker.log(numbers({"evaluation": line["accuracy"]}), int(line["iteration"]))
            progress.evaluations += 1
            self._save()
        for line in read_lines(self.path / "metrics.jsonl"):
            if (iteration := int(line["iteration"])) > progress.iteration:
                tracker.log(numbers(line), iteration)
                progress.iteration = iteration
                self._save()
        new = read_lines(self.path / SAMPLES_FILE)[progress.samples :]
        for (evaluation, step), lines in groupby(new, key=lambda line: (line["evaluation"], line["iteration"])):
            texts = ["\n".join(text_lines(read_sample(line))) for line in lines]
            tracker.log_samples(f"samples/{evaluation or 'rollout'}", texts, step)
            progress.samples += len(texts)
            self._save()

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        """Does the work; a tracker that fails is no reason to end a run."""
        try:
            work()
            self._failing.discard(name)
        except Exception as error:  # each package has classes of its own
            if name not in self._failing:
                self.note(f"trackers.{name}: {error}; sent again with the next record")
            self._failing.add(name)

    def _save(self) -> None:
        values = {name: vars(progress) for name, progress in self._progress.items()}
        write_atomically(self.path / STATE_FILE, json.dumps(values).encode())
