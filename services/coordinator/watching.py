"""What the watchers of a run are told: snapshots, and each iteration and evaluation once, as the files tell them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from perigee.coordinator.v1 import coordinator_pb2 as pb
from services.coordinator.records import Records, flatten
from services.coordinator.snapshot import StatusBoard


@dataclass
class Told:
    """The last iteration and evaluation that a watcher knows of; None for what it does not want to be told."""

    iteration: int | None = None
    evaluation: int | None = None


async def watch_run(board: StatusBoard, records: Records, told: Told) -> AsyncGenerator[pb.WatchRunResponse, None]:
    """Snapshots until the run has ended, each after the results that were recorded before it was made."""
    revision = -1
    async with aclosing(board.watch()) as snapshots:
        async for snapshot in snapshots:
            if records.revision != revision:
                revision = records.revision
                for result in await asyncio.to_thread(read_results, records, told, snapshot.iterations):
                    yield result
            yield pb.WatchRunResponse(run=snapshot)


def read_results(records: Records, told: Told, iterations: int) -> list[pb.WatchRunResponse]:
    """What was recorded after what was told, by iteration; takes it as told.

    Raises DataLossError when a file cannot be read.
    """
    found: list[tuple[int, pb.WatchRunResponse]] = []
    if told.iteration is not None:
        for line in records.iterations():
            if (number := int(line["iteration"])) > told.iteration:
                result = pb.IterationResult(iteration=number, iterations=iterations, metrics=flatten(line))
                found.append((number, pb.WatchRunResponse(iteration=result)))
                told.iteration = number
    if told.evaluation is not None:
        for number, line in enumerate(records.evaluations(), start=1):
            if number > told.evaluation:
                found.append((int(line["iteration"]), pb.WatchRunResponse(evaluation=evaluation_result(number, line))))
                told.evaluation = number
    # An evaluation comes after the iteration whose weights it is of: the sort keeps the order of equals.
    return [response for _, response in sorted(found, key=lambda item: item[0])]


def evaluation_result(number: int, line: Mapping[str, Any]) -> pb.EvaluationResult:
    """A line of evaluations.jsonl as a message."""
    result = pb.EvaluationResult(number=number, iteration=line["iteration"], policy_version=line["policy_version"])
    for domain, estimates in line["accuracy"].items():
        greedy, sampled = (_estimate(estimates.get(kind)) for kind in ("greedy", "sampled"))
        result.accuracies.add(domain=domain, greedy=greedy, sampled=sampled)
    return result


def _estimate(values: Mapping[str, float | None] | None) -> pb.AccuracyEstimate | None:
    if values is None or values["mean"] is None:
        return None
    return pb.AccuracyEstimate(mean=values["mean"], low=values["low"], high=values["high"])
