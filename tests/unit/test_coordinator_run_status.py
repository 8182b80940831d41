"""Event stream of a run: snapshots, and each iteration and evaluation once, whatever the watcher missed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.rollout.client import RolloutClient
from services.coordinator.iteration import unrecorded_events
from services.coordinator.run_log import RunLog
from services.coordinator.run_status import WATCH_QUEUE, Cursor, RunStatus, read_results, stream_events
from services.coordinator.workers import WorkerRegistry

ACCURACY = {
    "overall": {
        "greedy": {"mean": 0.5, "low": 0.25, "high": 0.75},
        "sampled": {"mean": 0.25, "low": None, "high": None},
    },
    "math": {"sampled": {"mean": None, "low": None, "high": None}},
}


@pytest.fixture
def status() -> RunStatus:
    # The client dials nobody: no worker registers.
    return RunStatus("run", 4, WorkerRegistry(RolloutClient.connect, lease_seconds=10.0))


@pytest.fixture
def run_log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path)


def add_iteration(run_log: RunLog, number: int) -> None:
    run_log.add_iteration({"iteration": number, "reward/mean": number / 10})


def add_evaluation(run_log: RunLog, kind: str, iteration: int) -> None:
    line = {"kind": kind, "iteration": iteration, "policy_version": iteration + 1, "accuracy": ACCURACY}
    run_log.add_evaluation(line)


def names(responses: list[pb.WatchRunResponse]) -> list[str]:
    """An iteration as i1, an evaluation as its number and iteration, e1@0, a snapshot as its phase."""
    found = []
    for response in responses:
        if response.HasField("iteration"):
            found.append(f"i{response.iteration.iteration}")
        elif response.HasField("evaluation"):
            found.append(f"e{response.evaluation.number}@{response.evaluation.iteration}")
        else:
            found.append(pb.RunPhase.Name(response.run.phase).removeprefix("RUN_PHASE_"))
    return found


async def until_snapshot(responses: AsyncGenerator[pb.WatchRunResponse, None]) -> list[str]:
    found: list[pb.WatchRunResponse] = []
    while not found or not found[-1].HasField("run"):
        found.append(await anext(responses))
    return names(found)


def write_four_iterations(run_log: RunLog) -> None:
    add_evaluation(run_log, "baseline", 0)
    add_iteration(run_log, 1)
    add_iteration(run_log, 2)
    add_evaluation(run_log, "periodic", 2)
    add_iteration(run_log, 3)
    add_iteration(run_log, 4)
    add_evaluation(run_log, "final", 4)


@pytest.mark.parametrize(
    ("cursor", "expected"),
    [
        (Cursor(0, 0), ["e1@0", "i1", "i2", "e2@2", "i3", "i4", "e3@4"]),
        (Cursor(2, 1), ["e2@2", "i3", "i4", "e3@4"]),
        (Cursor(3, None), ["i4"]),
        (Cursor(None, 2), ["e3@4"]),
        (Cursor(4, 3), []),
        (Cursor(), []),
    ],
)
def test_results_before_the_cursor_are_not_sent_again(cursor: Cursor, expected: list[str], run_log: RunLog) -> None:
    write_four_iterations(run_log)
    assert names(read_results(run_log, cursor, 4)) == expected
    assert read_results(run_log, cursor, 4) == []


def test_a_result_holds_the_metrics_of_its_line(run_log: RunLog) -> None:
    add_evaluation(run_log, "baseline", 0)
    add_iteration(run_log, 1)
    evaluation, iteration = read_results(run_log, Cursor(0, 0), 4)
    assert json.loads(iteration.iteration.record) == run_log.iterations()[0]
    assert json.loads(evaluation.evaluation.record) == run_log.evaluations()[0]
    iteration.iteration.ClearField("record")
    evaluation.evaluation.ClearField("record")
    assert iteration.iteration == pb.IterationResult(
        iteration=1, iterations=4, metrics={"iteration": 1.0, "reward/mean": 0.1}
    )
    # An unknown bound is absent, and so is an accuracy that no response counts for.
    overall = pb.DomainAccuracy(
        domain="overall",
        greedy=pb.AccuracyEstimate(mean=0.5, low=0.25, high=0.75),
        sampled=pb.AccuracyEstimate(mean=0.25),
    )
    assert evaluation.evaluation == pb.EvaluationResult(
        number=1, iteration=0, policy_version=1, accuracies=[overall, pb.DomainAccuracy(domain="math")]
    )


async def test_results_come_before_the_snapshot_that_ends_the_run(status: RunStatus, run_log: RunLog) -> None:
    responses = stream_events(status, run_log, Cursor(0, 0))
    assert await until_snapshot(responses) == ["WAITING"]
    add_evaluation(run_log, "baseline", 0)
    status.enter(pb.RUN_PHASE_ROLLOUT)
    assert await until_snapshot(responses) == ["e1@0", "ROLLOUT"]
    add_iteration(run_log, 1)
    add_evaluation(run_log, "final", 1)
    status.enter(pb.RUN_PHASE_FINISHED)
    assert await until_snapshot(responses) == ["i1", "e2@1", "FINISHED"]
    with pytest.raises(StopAsyncIteration):
        await anext(responses)


async def test_a_watcher_that_reads_slowly_loses_snapshots_but_no_results(status: RunStatus, run_log: RunLog) -> None:
    responses = stream_events(status, run_log, Cursor(0, 0))
    assert await until_snapshot(responses) == ["WAITING"]
    for number in range(1, WATCH_QUEUE + 2):
        status.enter(pb.RUN_PHASE_ROLLOUT)
        add_iteration(run_log, number)
    status.enter(pb.RUN_PHASE_FINISHED)
    found = names([response async for response in responses])
    assert [name for name in found if name.startswith("i")] == [f"i{number}" for number in range(1, WATCH_QUEUE + 2)]
    assert found.count("ROLLOUT") < WATCH_QUEUE + 1
    assert found[-1] == "FINISHED"


async def test_events_are_sent_once_to_watchers_that_ask(status: RunStatus, run_log: RunLog) -> None:
    status.report("before the watch")
    asked, other = (stream_events(status, run_log, Cursor(), events) for events in (True, False))
    assert await until_snapshot(asked) == await until_snapshot(other) == ["WAITING"]
    status.report("rollout-1 left: silent for 10 s")
    for restarts in (1, 1, 2, 0):
        status.count_store_restarts(restarts)
    status.enter(pb.RUN_PHASE_FINISHED)
    assert [response.event.text async for response in asked if response.HasField("event")] == [
        "rollout-1 left: silent for 10 s",
        "the buffer's Valkey server died and was started again",
    ]
    assert [response async for response in other if response.HasField("event")] == []


def test_an_event_is_in_one_line_where_an_iteration_fails_once_it_is_committed(status: RunStatus) -> None:
    status.report("rollout-1 left: silent for 10 s")
    events = unrecorded_events(status, None)
    assert [event["event"] for event in events] == ["rollout-1 left: silent for 10 s"]
    status.report("rollout-1 joined, at host:1")
    found = unrecorded_events(status, {"iteration": 1, "events": events})
    assert [event["event"] for event in found] == ["rollout-1 joined, at host:1"]


async def test_a_line_that_a_crash_lost_is_sent_when_it_is_restored(status: RunStatus, run_log: RunLog) -> None:
    add_iteration(run_log, 1)
    responses = stream_events(status, run_log, Cursor(1, 0))
    assert await until_snapshot(responses) == ["WAITING"]
    last: dict[str, Any] = {"iteration": 2, "reward/mean": 0.2}
    assert run_log.restore_iterations(2, last) == last
    assert await until_snapshot(responses) == ["i2", "WAITING"]
    assert [json.loads(line)["iteration"] for line in (run_log.path / "metrics.jsonl").open()] == [1, 2]
    await responses.aclose()


def test_a_phase_that_is_under_way_twice_is_named_once(status: RunStatus) -> None:
    with status.timeline.phase("rollout"), status.timeline.phase("weights"), status.timeline.phase("weights"):
        assert status.snapshot().phases == ["rollout", "weights"]
    assert not status.snapshot().phases
