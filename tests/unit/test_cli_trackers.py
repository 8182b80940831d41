"""Trackers get each record of a run once, over resumed runs and failures."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perigee.cli import trackers
from perigee.cli.trackers import Tracker, Trackers, TrackersConfig
from perigee.errors import FailedPreconditionError
from perigee.files import append_lines
from perigee.report.samples import SAMPLES_FILE, Sample, to_line

SETTINGS = {
    "wandb": {"project": "p", "mode": "offline"},
    "tensorboard": {"folder": "boards"},
    "mlflow": {"experiment": "e", "uri": "sqlite:///mlflow.db"},
    "trackio": {"project": "p"},
}


def add_iteration(run: Path, iteration: int) -> None:
    append_lines(run / "metrics.jsonl", [{"iteration": iteration, "reward": {"mean": iteration / 10}}])


def add_evaluation(run: Path, iteration: int) -> None:
    append_lines(run / "evaluations.jsonl", [{"iteration": iteration, "accuracy": {"overall": 0.5}}])


def add_sample(run: Path, iteration: int, evaluation: str = "") -> None:
    sample = Sample(iteration, evaluation, "t1", "p1", "d", "2+2=", "it is 4", 4, [0], "stop", "correct", 1.0)
    append_lines(run / SAMPLES_FILE, [to_line(sample)])


async def follow(run: Path, notes: list[str], name: str = "tensorboard") -> None:
    followed = Trackers(run, {"name": "r"}, notes.append)
    followed.open(TrackersConfig.model_validate({name: SETTINGS[name]}))
    followed.update()
    await followed.close()


class HangingTracker(Tracker):
    """A tracker whose service never answers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        threading.Event().wait()

    def log_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        threading.Event().wait()

    def close(self) -> None:
        threading.Event().wait()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Its own process starts in seconds; on a machine under load in many.
    monkeypatch.setattr(trackers, "CLOSE_S", 600.0)
    path = tmp_path / "run-1"
    path.mkdir()
    return path


async def test_a_resumed_run_has_each_point_once(run: Path) -> None:
    notes: list[str] = []
    add_sample(run, 0, "baseline")
    add_evaluation(run, 0)
    add_iteration(run, 1)
    await follow(run, notes)
    add_sample(run, 2)
    add_iteration(run, 2)  # while nobody followed
    await follow(run, notes)
    events = EventAccumulator("boards/run-1").Reload()
    # The two files are read by their names, which the second and a number without leading zeros end.
    assert sorted(point.step for point in events.Scalars("reward/mean")) == [1, 2]
    assert [point.step for point in events.Scalars("evaluation/overall")] == [0]
    for name, step in (("baseline", 0), ("rollout", 2)):
        [samples] = events.Tensors(f"samples/{name}")
        assert samples.step == step
        assert b"> it is 4" in samples.tensor_proto.string_val[0]
    assert notes == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
async def test_a_tracker_takes_a_run_and_its_second_part(run: Path, name: str) -> None:
    pytest.importorskip(name)
    notes: list[str] = []
    add_sample(run, 1)
    add_iteration(run, 1)
    await follow(run, notes, name)
    add_iteration(run, 2)
    await follow(run, notes, name)
    assert notes == []


class FailingTracker(trackers.TensorBoardTracker):
    """Refuses its second point the first time."""

    refused = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step == 2 and not type(self).refused:
            type(self).refused = True
            raise OSError("no network")
        super().log(values, step)


async def test_what_could_not_be_sent_is_sent_later(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", FailingTracker)  # type: ignore[arg-type]
    notes: list[str] = []
    for iteration in (1, 2, 3):
        add_iteration(run, iteration)
    await follow(run, notes)
    assert notes == ["trackers.tensorboard: no network; sent again with the next record"]
    assert [each.step for each in EventAccumulator("boards/run-1").Reload().Scalars("reward/mean")] == [1, 2, 3]


def test_a_package_that_is_missing_is_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FailedPreconditionError, match=r"trackers\.wandb needs wandb, which is not installed"):
        Trackers(run, {}, print).open(TrackersConfig.model_validate({"wandb": SETTINGS["wandb"]}))


async def test_a_tracker_that_hangs_holds_up_no_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda settings, run: HangingTracker())
    monkeypatch.setattr(trackers, "CLOSE_S", 0.1)
    notes: list[str] = []
    add_iteration(run, 1)
    await follow(run, notes)
    assert notes == ["trackers: not all was sent within 0.1 s; the next --resume sends the rest"]
