"""The views: plain lines for logs and pipes, one panel on a terminal."""

import io
import json

import pytest
from rich.console import Console

from perigee.cli.metrics import (
    format_seconds,
    phase_seconds,
    progress_line,
    read_evaluation,
    status_lines,
    worker_state,
)
from perigee.cli.view import LiveView, PlainView, open_view, sparkline
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.report.records import Evaluation
from perigee.report.samples import Sample, to_line
from perigee.rollout.v1 import rollout_pb2
from perigee.statistics import Interval

METRICS = {
    "iteration": 4.0,
    "reward/mean": 0.4125,
    "reward/accuracy/overall": 0.5,
    "rollout/response_tokens/mean": 28.31,
    "rollout/response_tokens/p95": 66.0,
    "rollout/tokens_per_second": 8123.4,
    "rollout/partial_rate": 0.125,
    "rollout/repetition_rate": 0.01,
    "time/training/start": 2.0,
    "time/training/seconds": 1.5,
    "time/rollout/start": 0.0,
    "time/rollout/seconds": 2.0,
}
EVALUATION = Evaluation(4, {"overall": Interval(0.5, 0.44, 0.56)}, {"overall": Interval(0.4, 0.35, 0.45)})


def snapshot(phase: pb.RunPhase.ValueType = pb.RUN_PHASE_ROLLOUT, **fields: object) -> pb.RunSnapshot:
    found = pb.RunSnapshot(run_id="small-1", phase=phase, iteration=5, iterations=10, policy_version=6)
    for name, value in fields.items():
        setattr(found, name, value)
    found.metrics.update(METRICS)
    found.workers.add(worker_id="rollout-0", address="127.0.0.1:9", ready=True, running=7, policy_version=6)
    return found


def result(iteration: int = 4) -> pb.IterationResult:
    return pb.IterationResult(iteration=iteration, iterations=10, metrics=METRICS)


def plain_lines(*snapshots: pb.RunSnapshot) -> list[str]:
    stream = io.StringIO()
    with PlainView(stream) as view:
        for one in snapshots:
            view.show(one)
    return stream.getvalue().splitlines()


def test_an_iteration_is_one_plain_line() -> None:
    stream = io.StringIO()
    PlainView(stream).show_iteration(result())
    assert stream.getvalue().splitlines() == [
        "iteration 4 of 10  reward 0.412  accuracy 0.500  length 28.3  length p95 66  tokens/s 8,123  partial 12.5%  "
        "repeated 1.0%  rollout 2.0s training 1.5s"
    ]


def test_phases_outside_the_iterations_are_shown_once() -> None:
    evaluating = snapshot(pb.RUN_PHASE_EVALUATION, phase_done=3, phase_total=500, elapsed_seconds=62.0)
    lines = plain_lines(evaluating, evaluating, snapshot(pb.RUN_PHASE_ROLLOUT), snapshot(pb.RUN_PHASE_TRAINING))
    assert lines == ["evaluation: iteration 5 of 10, policy version 6, 3 of 500 responses, 1 m 02 s since the start"]


def test_what_is_under_way_within_a_phase_is_shown() -> None:
    training = snapshot(pb.RUN_PHASE_TRAINING)
    training.phases.extend(["training"])
    assert progress_line(training) == "iteration 5 of 10, policy version 6"
    training.phases[:] = ["leave"]
    assert progress_line(training).endswith(", now leave")


def test_a_worker_that_takes_no_work_says_why() -> None:
    away = pb.WorkerSnapshot(worker_id="w", address="h:1", status=rollout_pb2.WORKER_STATUS_AWAY)
    [line, _] = status_lines(pb.GetStatusResponse(workers=[away]))
    assert "w at h:1: away: the trainer has its devices, " in line
    # One that failed a call, or whose coordinator is of an earlier release.
    assert worker_state(pb.WorkerSnapshot(status=rollout_pb2.WORKER_STATUS_READY)) == "not ready"
    assert worker_state(pb.WorkerSnapshot()) == "not ready"


def test_each_supervised_stage_is_shown() -> None:
    stages = [snapshot(pb.RUN_PHASE_SFT, policy_version=version, iteration=0) for version in (0, 0, 1)]
    assert sum(line.startswith("sft:") for line in plain_lines(*stages)) == 2


def test_a_held_out_accuracy_is_shown_with_its_interval() -> None:
    stream = io.StringIO()
    PlainView(stream).show_evaluation(EVALUATION)
    expected = "held-out accuracy at iteration 4: overall sampled 0.400 [0.350, 0.450] greedy 0.500 [0.440, 0.560]"
    assert stream.getvalue() == f"{expected}\n"


def test_the_live_view_shows_run_figures_workers_and_notes() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140)
    with LiveView(console) as view:
        view.note("trainer ready")
        view.show(snapshot(phase_done=50, phase_total=200))
        view.show_iteration(result())
        view.show_evaluation(EVALUATION)
    text = stream.getvalue()
    for expected in ("small-1", "50 of 200 trajectories", "0.412", "12.5%", "rollout-0", "trainer ready", "0.350", "▁"):
        assert expected in text


def test_the_live_view_shows_a_sample_warnings_and_the_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    view = LiveView(console)
    shown = result()
    shown.metrics.update({"train/kl_k3": 0.3, "time/iteration_seconds": 20.0})
    sample = Sample(4, "", "t1", "p", "math", "1+1=", "I think it is [b]3[/b]", 3, [0], "stop", "wrong", 0.0)
    shown.samples.append(json.dumps(to_line(sample)))
    view.show_iteration(shown)
    now = snapshot()
    now.metrics.update(shown.metrics)
    view.show(now)
    with console.capture() as capture:
        console.print(view._render())
    for expected in ("> I think it is [b]3[/b]", "lower run.optimizer.learning_rate", "about 2 m 00 s left"):
        assert expected in capture.get()


def test_a_warning_is_printed_when_a_metric_leaves_its_range_and_what_a_run_waits_for() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    bad = result()
    bad.metrics["train/kl_k3"] = 0.3
    for one in (bad, bad, result(), bad):
        view.show_iteration(one)
    assert sum(line.startswith("warning: policy KL") for line in stream.getvalue().splitlines()) == 2
    [line] = plain_lines(snapshot(pb.RUN_PHASE_WAITING, waiting_for="the trainer"))
    assert "waiting for the trainer" in line


def test_an_evaluation_is_read_from_the_coordinators_message() -> None:
    overall = pb.DomainAccuracy(domain="overall", sampled=pb.AccuracyEstimate(mean=0.4, low=0.35, high=0.45))
    overall.greedy.CopyFrom(pb.AccuracyEstimate(mean=0.5, low=0.44, high=0.56))
    shown = pb.EvaluationResult(number=2, iteration=4, accuracies=[overall, pb.DomainAccuracy(domain="math")])
    assert read_evaluation(shown) == EVALUATION


def test_the_live_view_draws_before_anything_is_known() -> None:
    stream = io.StringIO()
    with LiveView(Console(file=stream, force_terminal=True, width=80)):
        pass
    assert "perigee" in stream.getvalue()


def test_a_clock_stands_still_when_the_run_has_ended() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    view = LiveView(console)
    view.show(snapshot(pb.RUN_PHASE_FINISHED, elapsed_seconds=10.0))
    with console.capture() as capture:
        console.print(view._render())
    assert "small-1 · 10.0 s" in capture.get()


def test_without_a_terminal_the_lines_are_plain() -> None:
    assert isinstance(open_view(plain=False), PlainView)


def test_phases_are_in_the_order_in_which_they_began() -> None:
    assert list(phase_seconds(METRICS)) == ["rollout", "training"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2 s"), (59.97, "1 m 00 s"), (3599.9, "1 h 00 m"), (185.0, "3 m 05 s"), (7620.0, "2 h 07 m")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("values", "text"), [([], ""), ([1.0], "▁"), ([0.0, 1.0, 0.5], "▁█▅"), ([2.0, 2.0], "▁▁")])
def test_a_sparkline_spans_its_values(values: list[float], text: str) -> None:
    assert sparkline(values) == text
