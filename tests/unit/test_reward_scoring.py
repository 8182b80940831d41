"""Scoring against a scripted service: sizes, retries, refusals, calls that break, outages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest

from perigee.buffer.v1 import buffer_pb2
from perigee.errors import (
    AbortedError,
    DataLossError,
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from perigee.reward.scoring import MAX_BATCH_BYTES, ScoreJob, ScoringOptions, score_items, scoring
from perigee.reward.v1 import reward_pb2 as pb

FAILED, CORRECT = buffer_pb2.VERDICT_FAILED, buffer_pb2.VERDICT_CORRECT
QUICK = ScoringOptions(batch=4, concurrency=2, attempts=3, first_pause_s=0.001, last_pause_s=0.002, unavailable_s=30.0)


@dataclass
class FakeScores:
    """Answers as `behave` tells for a request: errors to raise come last."""

    behave: Callable[[list[str], int], Iterable[pb.ScoreResponse | Exception]]
    calls: list[list[str]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]:
        ids = [item.id for item in request.items]
        self.calls.append(ids)
        number = len(self.calls)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0.001)
            for answer in self.behave(ids, number):
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            self.running -= 1


def correct(item_id: str) -> pb.ScoreResponse:
    return pb.ScoreResponse(id=item_id, verdict=CORRECT, reward=1.0)


def failure(item_id: str, *, retryable: bool) -> pb.ScoreResponse:
    return pb.ScoreResponse(id=item_id, verdict=FAILED, retryable=retryable, reason="told to fail")


def make_items(count: int) -> list[pb.ScoreItem]:
    return [pb.ScoreItem(id=str(i), response="4", math=pb.MathVerifier(reference="4")) for i in range(count)]


async def outcomes(scores: FakeScores, items: list[pb.ScoreItem]) -> dict[str, pb.ScoreResponse]:
    found = [response async for response in score_items(scores, items, QUICK)]
    assert len(found) == len({response.id for response in found})
    return {response.id: response for response in found}


async def test_every_item_has_one_outcome_in_bounded_calls() -> None:
    scores = FakeScores(lambda ids, _: map(correct, ids))
    found = await outcomes(scores, make_items(30))
    assert len(found) == 30
    assert sorted(map(len, scores.calls)) == [2, *[4] * 7]
    assert scores.most_running == 2


async def test_only_passing_failures_are_tried_again() -> None:
    def behave(ids: list[str], _call: int) -> Iterable[pb.ScoreResponse]:
        for item_id in ids:
            asked = sum(item_id in call for call in scores.calls)
            if item_id == "0" and asked < 3:
                yield failure("0", retryable=True)
            elif item_id == "1":
                yield failure("1", retryable=True)
            elif item_id == "2":
                yield failure("2", retryable=False)
            else:
                yield correct(item_id)

    scores = FakeScores(behave)
    found = await outcomes(scores, make_items(5))
    assert {item_id: response.verdict for item_id, response in found.items()} == {
        "0": CORRECT, "1": FAILED, "2": FAILED, "3": CORRECT, "4": CORRECT
    }  # fmt: skip
    asked = [item_id for call in scores.calls for item_id in call]
    assert {item_id: asked.count(item_id) for item_id in found} == {"0": 3, "1": 3, "2": 1, "3": 1, "4": 1}
    assert not found["1"].HasField("reward")


async def test_a_refused_item_does_not_take_its_batch_along() -> None:
    def behave(ids: list[str], _call: int) -> Iterable[pb.ScoreResponse | Exception]:
        if "2" in ids:
            violation = FieldViolation(f"items[{ids.index('2')}].math.reference", "is required")
            yield InvalidArgumentError("items: one is wrong", violations=[violation])
        yield from map(correct, ids)

    scores = FakeScores(behave)
    found = await outcomes(scores, make_items(4))
    assert found["2"].reason == "refused: math.reference: is required"
    assert (found["2"].verdict, found["2"].retryable, found["2"].verifier) == (FAILED, False, "math")
    assert all(found[item_id].verdict == CORRECT for item_id in "013")
    assert scores.calls == [["0", "1", "2", "3"], ["0", "1", "3"]]


async def test_a_refusal_that_names_no_item_is_found_out_one_by_one() -> None:
    def behave(ids: list[str], _call: int) -> Iterable[pb.ScoreResponse | Exception]:
        if "2" in ids:
            yield InvalidArgumentError("something is wrong")
        yield from map(correct, ids)

    found = await outcomes(FakeScores(behave), make_items(4))
    assert [item_id for item_id, response in found.items() if response.verdict == FAILED] == ["2"]


async def test_what_a_broken_call_left_out_is_tried_again() -> None:
    def behave(ids: list[str], call: int) -> Iterable[pb.ScoreResponse | Exception]:
        yield correct(ids[0])
        if call == 1:
            yield DeadlineExceededError("too slow")
        yield from map(correct, ids[1:])

    scores = FakeScores(behave)
    found = await outcomes(scores, make_items(3))
    assert scores.calls == [["0", "1", "2"], ["1"], ["2"]]
    assert all(response.verdict == CORRECT for response in found.values())


async def test_a_call_that_always_breaks_fails_its_items() -> None:
    scores = FakeScores(lambda ids, _: [DeadlineExceededError("too slow")])
    found = await outcomes(scores, make_items(2))
    assert [(response.verdict, response.reason, response.retryable) for response in found.values()] == [
        (FAILED, "too slow", True)
    ] * 2
    # Both together, then each alone as often as it may be tried.
    assert len(scores.calls) == 1 + 2 * 3


async def test_an_item_that_was_left_out_is_tried_again_and_then_failed() -> None:
    scores = FakeScores(lambda ids, _: [correct(item_id) for item_id in ids if item_id != "1"])
    found = await outcomes(scores, make_items(3))
    assert found["1"].reason == "the reward service gave no outcome"
    assert scores.calls == [["0", "1", "2"], ["1"], ["1"]]


@pytest.mark.parametrize("error", [UnavailableError("away"), ResourceExhaustedError("full", retry_after_s=0.001)])
async def test_a_service_that_comes_back_loses_nothing(error: Exception) -> None:
    scores = FakeScores(lambda ids, call: [error] if call <= 4 else map(correct, ids))
    found = await outcomes(scores, make_items(8))
    assert len(found) == 8
    assert all(response.verdict == CORRECT for response in found.values())


async def test_a_service_that_stays_away_is_an_error_after_what_was_scored() -> None:
    scores = FakeScores(lambda ids, call: [UnavailableError("away")] if call > 2 else map(correct, ids))
    found = []

    async def collect() -> None:
        async for response in score_items(scores, make_items(12), replace(QUICK, unavailable_s=0.05)):
            found.append(response.id)

    with pytest.raises(UnavailableError, match="away"):
        await collect()
    assert sorted(found, key=int) == [str(i) for i in range(8)]


async def test_what_no_attempt_can_change_is_raised_at_once() -> None:
    scores = FakeScores(lambda ids, _: [PermissionDeniedError("no")])
    with pytest.raises(PermissionDeniedError):
        await outcomes(scores, make_items(1))
    assert len(scores.calls) == 1


async def test_leaving_early_ends_the_calls() -> None:
    scores = FakeScores(lambda ids, _: map(correct, ids))
    stream = score_items(scores, make_items(100), QUICK)
    await anext(stream)
    await stream.aclose()
    assert scores.running == 0
    assert len(scores.calls) < 25


async def test_an_item_past_the_message_limit_is_failed_unsent() -> None:
    scores = FakeScores(lambda ids, _: map(correct, ids))
    items = [*make_items(1), pb.ScoreItem(id="big", response="x" * (MAX_BATCH_BYTES + 1))]
    found = await outcomes(scores, items)
    assert found["big"].verdict == FAILED
    assert "more than" in found["big"].reason
    assert [item_id for call in scores.calls for item_id in call] == ["0"]


async def test_batches_are_bounded_in_bytes() -> None:
    scores = FakeScores(lambda ids, _: map(correct, ids))
    await outcomes(scores, [pb.ScoreItem(id=str(i), response="x" * (MAX_BATCH_BYTES // 3 - 40)) for i in range(8)])
    assert sorted(map(len, scores.calls)) == [2, 3, 3]


POISON = [
    InternalError("boom"),
    DeadlineExceededError("too slow"),
    AbortedError("lost a race"),
    DataLossError("garbled"),
    PerigeeError("unknown"),
    UnavailableError("the process died"),
    InvalidArgumentError("something is wrong"),
]


@pytest.mark.parametrize("error", POISON, ids=lambda error: type(error).__name__)
async def test_a_response_that_breaks_its_call_fails_alone(error: PerigeeError) -> None:
    def behave(ids: list[str], _call: int) -> Iterable[pb.ScoreResponse | Exception]:
        for item_id in ids:
            yield error if item_id in ("7", "13") else correct(item_id)

    scores = FakeScores(behave)
    items = make_items(40)
    options = replace(QUICK, batch=16, concurrency=1)
    found = [response async for response in score_items(scores, items, options)]
    assert sorted(int(response.id) for response in found) == list(range(40))
    assert {response.id for response in found if response.verdict == FAILED} == {"7", "13"}
    assert all(error.message in response.reason for response in found if response.verdict == FAILED)
    alone = [ids for ids in scores.calls if ids == ["7"]]
    # A service that dies is waited for between two attempts.
    most = {InvalidArgumentError: 1, UnavailableError: 6}.get(type(error), 3)
    assert min(most, 3) <= len(alone) <= most


async def test_nothing_is_asked_without_end_when_a_response_kills_the_service() -> None:
    """The service answers others between its deaths, so it never counts as out of reach."""

    def behave(ids: list[str], _call: int) -> Iterable[pb.ScoreResponse | Exception]:
        if "poison" in ids:
            yield UnavailableError("connection reset")
        yield from map(correct, ids)

    verdicts = {}

    async def take(some: list[pb.ScoreResponse]) -> None:
        verdicts.update({response.id: response.verdict for response in some})

    item = make_items(1)[0]
    async with scoring(FakeScores(behave), QUICK, take) as pipeline:
        await pipeline.submit(ScoreJob("poison", "4", item))
        number = 0
        while "poison" not in verdicts:
            await pipeline.submit(ScoreJob(str(number := number + 1), "4", item))
            await asyncio.sleep(0.001)
    assert verdicts.pop("poison") == FAILED
    assert set(verdicts.values()) == {CORRECT}


async def test_the_pipeline_takes_no_more_than_may_be_pending() -> None:
    held = asyncio.Event()

    class Held:
        async def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]:
            await held.wait()
            for item in request.items:
                yield correct(item.id)

    found: list[str] = []

    async def take(some: list[pb.ScoreResponse]) -> None:
        found.extend(response.id for response in some)

    item = make_items(1)[0]
    async with scoring(Held(), replace(QUICK, max_pending=3), take) as pipeline:
        for number in range(3):
            await pipeline.submit(ScoreJob(str(number), "4", item))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pipeline.submit(ScoreJob("3", "4", item)), 0.01)
        held.set()
        await pipeline.submit(ScoreJob("4", "4", item))
    assert sorted(found) == ["0", "1", "2", "4"]


async def test_an_id_in_use_is_refused() -> None:
    scores = FakeScores(lambda ids, _: map(correct, ids))
    with pytest.raises(InvalidArgumentError, match="must differ from item to item"):
        await outcomes(scores, [*make_items(2), *make_items(1)])


@pytest.mark.parametrize(
    "fault", [ValueError("the disk is full"), UnavailableError("the buffer is away"), InternalError("a bug")]
)
async def test_a_fault_of_the_sink_cancels_the_block_and_no_call_is_made_again(fault: Exception) -> None:
    async def take(some: list[pb.ScoreResponse]) -> None:
        raise fault

    scores = FakeScores(lambda ids, _: map(correct, ids))

    async def score() -> None:
        async with scoring(scores, QUICK, take) as pipeline:
            await pipeline.submit(ScoreJob("0", "4", make_items(1)[0]))
            await asyncio.Event().wait()

    with pytest.raises(type(fault)) as caught:
        await score()
    assert caught.value is fault
    assert scores.calls == [["0"]]


async def test_texts_without_an_outcome_are_bounded_in_bytes() -> None:
    held = most = 0

    async def drop(found: list[pb.ScoreResponse]) -> None:
        nonlocal held
        held -= len(found)

    options = replace(QUICK, max_pending_bytes=3000, batch=1)
    item = pb.ScoreItem(math=pb.MathVerifier(reference="4"))
    async with scoring(FakeScores(lambda ids, _: map(correct, ids)), options, drop) as pipeline:
        for number in range(20):
            # One that is larger than the bound goes alone.
            await pipeline.submit(ScoreJob(str(number), "é" * (2000 if number == 7 else 500), item))
            held += 1
            most = max(most, held)
            assert number != 7 or held == 1
    assert held == 0
    assert most == 3


async def test_a_response_that_no_message_holds_fails_alone_and_the_others_get_time_by_their_size() -> None:
    deadlines = []

    class Scores(FakeScores):
        def score(self, request: pb.ScoreRequest, *, timeout_s: float) -> AsyncIterator[pb.ScoreResponse]:
            deadlines.append(timeout_s)
            return super().score(request, timeout_s=timeout_s)

    found: dict[str, pb.ScoreResponse] = {}

    async def keep(some: list[pb.ScoreResponse]) -> None:
        found.update((each.id, each) for each in some)

    options = replace(QUICK, call_timeout_s=100, mib_timeout_s=10)
    item = pb.ScoreItem(math=pb.MathVerifier(reference="4"))
    async with scoring(Scores(lambda ids, _: map(correct, ids)), options, keep) as pipeline:
        await pipeline.submit(ScoreJob("left out", "", item, left_out_bytes=MAX_BATCH_BYTES + 1))
        await pipeline.submit(ScoreJob("long", "4" * (2 << 20), item))
    assert found["long"].verdict == CORRECT
    assert found["left out"].verdict == FAILED
    assert "the item has 3145" in found["left out"].reason
    assert deadlines == [pytest.approx(120, abs=0.01)]
