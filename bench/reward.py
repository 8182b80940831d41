"""Math checks per second through the reward service, against math-verify called in a loop in one process.

    python bench/reward.py [--turns 5] [--items 400] [--algebra-share 0.5]

Both get the same items of the labelled set in turn; a share of them needs algebra, the others are plain numbers, words
and the like. Outcomes are not cached. A second run has an expression that hangs among every hundred items: nothing may
be lost, and no other item may wait longer than one check's deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from math_verify import parse, verify

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from services.kit.server import serving
from services.reward.__main__ import lifespan
from services.reward.config import MathConfig, RewardConfig
from services.reward.verifiers.base import Item
from services.reward.verifiers.math import compare_plainly, extract
from tests.fixtures.labelled import Labelled, read_labelled

WORKERS = 2
CALL_ITEMS = 100
CALLS = 4
TARGET = 1.6
BOMBS = (
    "9^{9^{9^{9}}}",
    "123456789!",
    "\\sqrt{2+" * 400 + "7" + "}" * 400,
    "1+" * 50_000 + "1",
)


@dataclass(frozen=True)
class Turn:
    """Checks per second of one turn, how often the verdict was right, and how long each item took."""

    rate: float
    accuracy: float
    latencies_ms: dict[str, float]
    failed: frozenset[str]


def needs_algebra(labelled: Labelled) -> bool:
    """Whether the service hands the item to a worker."""
    message = labelled.item
    math = pb.MathVerifier(reference=message.math.reference, extraction=pb.ANSWER_EXTRACTION_PROSE)
    found = extract(Item(message.id, message.response, message.answer_marker, math))
    return any(compare_plainly(math.reference, answer) is None for answer in found.answers)


def choose(count: int, algebra_share: float) -> list[Labelled]:
    """Items without markers, which math-verify knows nothing of, in random order."""
    items = [each for each in read_labelled() if each.verifier == "math" and not each.item.answer_marker]
    algebra = [each for each in items if needs_algebra(each)]
    plain = [each for each in items if not needs_algebra(each)]
    generator = random.Random(7)
    share = round(count * algebra_share)
    chosen = generator.choices(algebra, k=share) + generator.choices(plain, k=count - share)
    generator.shuffle(chosen)
    return chosen


def number(items: Sequence[Labelled], bombs: bool) -> list[pb.ScoreItem]:
    """The items under ids of their own, with an expression that hangs after every hundred."""
    messages = []
    for index, labelled in enumerate(items):
        message = pb.ScoreItem(id=f"item-{index}")
        message.MergeFrom(pb.ScoreItem(response=labelled.item.response, math=labelled.item.math))
        message.math.extraction = pb.ANSWER_EXTRACTION_PROSE
        messages.append(message)
        if bombs and index % 100 == 50:
            text = BOMBS[index // 100 % len(BOMBS)]
            math = pb.MathVerifier(reference="7")
            messages.append(pb.ScoreItem(id=f"bomb-{index}", response=f"\\boxed{{{text}}}", math=math))
    return messages


async def run_service(client: RewardClient, messages: Sequence[pb.ScoreItem], labels: Sequence[bool]) -> Turn:
    """All items in calls of a hundred, four calls at a time."""
    calls = [messages[start : start + CALL_ITEMS] for start in range(0, len(messages), CALL_ITEMS)]
    gate = asyncio.Semaphore(CALLS)
    outcomes: dict[str, pb.ScoreResponse] = {}

    async def call(items: Sequence[pb.ScoreItem]) -> None:
        async with gate:
            async for outcome in client.score(pb.ScoreRequest(items=items)):
                outcomes[outcome.id] = outcome

    begin = time.perf_counter()
    await asyncio.gather(*map(call, calls))
    seconds = time.perf_counter() - begin
    if len(outcomes) != len(messages):
        raise SystemExit(f"{len(messages) - len(outcomes)} items were lost")
    right = [(outcomes[f"item-{i}"].verdict == VERDICT_CORRECT) == label for i, label in enumerate(labels)]
    return Turn(
        len(messages) / seconds,
        statistics.mean(right),
        {name: outcome.latency_ms for name, outcome in outcomes.items()},
        frozenset(name for name, outcome in outcomes.items() if outcome.verdict == VERDICT_FAILED),
    )


def run_loop(messages: Sequence[pb.ScoreItem], labels: Sequence[bool]) -> Turn:
    """math-verify as its documentation calls it, with its own timeouts."""
    begin = time.perf_counter()
    verdicts = {}
    for message in messages:
        reference = message.math.reference
        gold = parse(reference if "$" in reference else f"${reference}$")
        verdicts[message.id] = verify(gold, parse(message.response))
    seconds = time.perf_counter() - begin
    right = [verdicts[f"item-{i}"] == label for i, label in enumerate(labels)]
    return Turn(len(messages) / seconds, statistics.mean(right), {}, frozenset())


async def main() -> None:
    """Prints rates, their ratio, latencies, and what hung."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--algebra-share", type=float, default=0.5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    items = choose(arguments.items, arguments.algebra_share)
    labels = [labelled.is_correct for labelled in items]
    share = statistics.mean(needs_algebra(labelled) for labelled in items)
    print(f"{len(items)} items, {share:.0%} need algebra, {WORKERS} workers, {CALLS} calls of {CALL_ITEMS} at a time")
    config = RewardConfig(math=MathConfig(workers=WORKERS), cache_entries=0)
    async with serving(config, lifespan) as app, RewardClient.connect(app.address) as client:
        await compare(client, number(items, bombs=False), labels, arguments.turns)
        await hang(client, number(items, bombs=True), labels, config.math.check_timeout_s)


async def compare(client: RewardClient, messages: list[pb.ScoreItem], labels: list[bool], turns: int) -> None:
    """Service and loop in turn; an untimed turn of both comes first."""
    service, loop = [], []
    for _ in range(turns + 1):
        service.append(await run_service(client, messages, labels))
        loop.append(run_loop(messages, labels))
    for name, measured in (("service", service), ("loop", loop)):
        rates = [turn.rate for turn in measured[1:]]
        print(
            f"{name:8} {statistics.median(rates):7.0f} checks/s (from {min(rates):.0f} to {max(rates):.0f}), "
            f"verdicts right {measured[-1].accuracy:.1%}"
        )
    ratio = statistics.median(turn.rate for turn in service[1:]) / statistics.median(turn.rate for turn in loop[1:])
    print(f"ratio of medians {ratio:.2f}, target {TARGET}")
    print(f"latency in a full queue: {describe_latencies(service[-1].latencies_ms.values())}")


async def hang(client: RewardClient, messages: list[pb.ScoreItem], labels: list[bool], deadline_s: float) -> None:
    """One turn of the service with expressions that hang."""
    turn = await run_service(client, messages, labels)
    innocent = {name: ms for name, ms in turn.latencies_ms.items() if name.startswith("item-")}
    bombs = {name: ms for name, ms in turn.latencies_ms.items() if name.startswith("bomb-")}
    print(f"\nwith one of {len(BOMBS)} expressions that hang among every hundred, deadline {deadline_s:g} s:")
    print(f"service  {turn.rate:7.0f} checks/s, verdicts right {turn.accuracy:.1%}, nothing lost")
    print(f"latency of the others: {describe_latencies(innocent.values())}")
    print(f"latency of those that hang: {describe_latencies(bombs.values())}")
    failed = len(turn.failed & bombs.keys())
    print(f"FAILED: {failed} of {len(bombs)} that hang, {len(turn.failed) - failed} others")
    late = [name for name, ms in innocent.items() if ms > deadline_s * 1000]
    print(f"others that waited longer than the deadline: {len(late)}")


def describe_latencies(latencies: Iterable[float]) -> str:
    """Median, 99th percentile and maximum."""
    ordered = sorted(latencies)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"median {statistics.median(ordered):.0f} ms, p99 {p99:.0f} ms, maximum {ordered[-1]:.0f} ms"


if __name__ == "__main__":
    asyncio.run(main())
