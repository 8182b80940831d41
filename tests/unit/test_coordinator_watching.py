"""What a watcher is told of a run: snapshots, and each iteration and evaluation once, whatever was missed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.rollout.client import RolloutClient
from services.coordinator.records import Records
from services.coordinator.snapshot import WATCH_QUEUE, StatusBoard
from services.coordinator.watching import Told, read_results, watch_run
from services.coordinator.workers import WorkerRegistry

ACCURACY = {
    "overall": {
        "greedy": {"mean": 0.5, "low": 0.25, "high": 0.75},
        "sampled": {"mean": 0.25, "low": None, "high": None},
    },
    "math": {"sampled": {"mean": None, "low": None, "high": None}},
}


@pytest.fixture
def board() -> StatusBoard:
    # The client dials nobody: no worker registers.
    return StatusBoard("run", 4, WorkerRegistry(RolloutClient.connect, lease_seconds=10.0))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path)


def add_iteration(records: Records, number: int) -> None:
    records.add_iteration({"iteration": number, "reward": {"mean": number / 10}})


def add_evaluation(records: Records, moment: str, iteration: int) -> None:
    line = {"moment": moment, "iteration": iteration, "policy_version": iteration + 1, "accuracy": ACCURACY}
    records.add_evaluation(line)


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


def write_four_iterations(records: Records) -> None:
    add_evaluation(records, "before", 0)
    add_iteration(records, 1)
    add_iteration(records, 2)
    add_evaluation(records, "during", 2)
    add_iteration(records, 3)
    add_iteration(records, 4)
    add_evaluation(records, "after", 4)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (Told(0, 0), ["e1@0", "i1", "i2", "e2@2", "i3", "i4", "e3@4"]),
        (Told(2, 1), ["e2@2", "i3", "i4", "e3@4"]),
        (Told(3, None), ["i4"]),
        (Told(None, 2), ["e3@4"]),
        (Told(4, 3), []),
        (Told(), []),
    ],
)
def test_what_a_watcher_knows_is_not_told_again(told: Told, expected: list[str], records: Records) -> None:
    write_four_iterations(records)
    assert names(read_results(records, told, 4)) == expected
    assert read_results(records, told, 4) == []


def test_a_result_holds_the_figures_of_its_line(records: Records) -> None:
    add_evaluation(records, "before", 0)
    add_iteration(records, 1)
    evaluation, iteration = read_results(records, Told(0, 0), 4)
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


async def test_results_come_before_the_snapshot_that_ends_the_run(board: StatusBoard, records: Records) -> None:
    responses = watch_run(board, records, Told(0, 0))
    assert await until_snapshot(responses) == ["WAITING"]
    add_evaluation(records, "before", 0)
    board.enter(pb.RUN_PHASE_ROLLOUT)
    assert await until_snapshot(responses) == ["e1@0", "ROLLOUT"]
    add_iteration(records, 1)
    add_evaluation(records, "after", 1)
    board.enter(pb.RUN_PHASE_FINISHED)
    assert await until_snapshot(responses) == ["i1", "e2@1", "FINISHED"]
    with pytest.raises(StopAsyncIteration):
        await anext(responses)


async def test_a_watcher_that_reads_slowly_loses_snapshots_but_no_results(board: StatusBoard, records: Records) -> None:
    responses = watch_run(board, records, Told(0, 0))
    assert await until_snapshot(responses) == ["WAITING"]
    for number in range(1, WATCH_QUEUE + 2):
        board.enter(pb.RUN_PHASE_ROLLOUT)
        add_iteration(records, number)
    board.enter(pb.RUN_PHASE_FINISHED)
    found = names([response async for response in responses])
    assert [name for name in found if name.startswith("i")] == [f"i{number}" for number in range(1, WATCH_QUEUE + 2)]
    assert found.count("ROLLOUT") < WATCH_QUEUE + 1
    assert found[-1] == "FINISHED"


async def test_a_line_that_a_crash_lost_is_told_when_it_is_restored(board: StatusBoard, records: Records) -> None:
    add_iteration(records, 1)
    responses = watch_run(board, records, Told(1, 0))
    assert await until_snapshot(responses) == ["WAITING"]
    last: dict[str, Any] = {"iteration": 2, "reward": {"mean": 0.2}}
    assert records.restore_iterations(2, last) == last
    assert await until_snapshot(responses) == ["i2", "WAITING"]
    assert [json.loads(line)["iteration"] for line in (records.path / "metrics.jsonl").open()] == [1, 2]
    await responses.aclose()
