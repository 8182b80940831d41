"""The result cache and the scorer, with verifiers whose pace the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, ClassVar

import pytest
from prometheus_client import REGISTRY

from perigee.errors import FieldViolation, ResourceExhaustedError
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.scorer import Scorer, content_key
from services.reward.verifiers.base import (
    ImagePart,
    Item,
    Outcome,
    Verdict,
    Verifier,
    extract_answer,
    graded_whole,
    read_answer,
)


class EchoVerifier(Verifier[pb.ExactVerifier]):
    """Correct when the response is the expected text; "crash" raises, "wait" waits for `gate`."""

    name: ClassVar[str] = "exact"
    version: ClassVar[str] = "1"

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.called = asyncio.Event()
        self.calls = 0
        self.cancelled = 0

    def find_violations(self, parameters: pb.ExactVerifier) -> list[FieldViolation]:
        return []

    async def judge(self, item: Item[pb.ExactVerifier]) -> Outcome:
        self.calls += 1
        self.called.set()
        if item.response == "crash":
            raise RuntimeError("a fault of the verifier")
        if item.response == "fail":
            return Outcome.failed("nobody knows", retryable=True)
        if item.response == "wait":
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                for _ in range(5):  # what it has to put away
                    await asyncio.sleep(0)
                self.cancelled += 1
                raise
        return Outcome.correct(item.response)


class OtherVerifier(EchoVerifier):
    """The same under another name."""

    name: ClassVar[str] = "short_answer"


def make(verifier: EchoVerifier, entries: int = 10, max_queued_items: int = 100) -> Scorer:
    scorer = Scorer(entries, max_queued_items)
    scorer.verifiers[verifier.name] = verifier
    return scorer


def item(item_id: str, response: str, marker: str = "") -> Item[pb.ExactVerifier]:
    return Item(item_id, response, marker, pb.ExactVerifier(reference="x"))


async def verdicts(scorer: Scorer, *items: Item[pb.ExactVerifier]) -> dict[str, Verdict]:
    async with aclosing(scorer.score(items)) as outcomes:
        return {scored.item_id: scored.outcome.verdict async for scored in outcomes}


async def test_one_item_that_crashes_its_verifier_fails_alone() -> None:
    found = await verdicts(make(EchoVerifier()), item("a", "crash"), item("b", "fine"))
    assert found == {"a": Verdict.FAILED, "b": Verdict.CORRECT}


async def test_the_same_content_is_judged_once_and_failures_again() -> None:
    verifier = EchoVerifier()
    scorer = make(verifier)
    await verdicts(scorer, item("a", "fine"), item("b", "fine"))
    await verdicts(scorer, item("c", "fine"))
    assert verifier.calls == 1
    await verdicts(scorer, item("d", "fail"))
    await verdicts(scorer, item("e", "fail"))
    assert verifier.calls == 3


async def test_the_cache_stays_within_its_bound_and_drops_the_oldest() -> None:
    verifier = EchoVerifier()
    scorer = make(verifier, entries=2)
    for response in ("1", "2", "1", "3", "1", "2"):  # "2" is dropped for "3"
        await verdicts(scorer, item("a", response))
    assert verifier.calls == 4


async def test_a_judgement_ends_only_when_all_who_wait_have_gone() -> None:
    verifier = EchoVerifier()
    scorer = make(verifier)
    first = asyncio.create_task(verdicts(scorer, item("a", "wait")))
    second = asyncio.create_task(verdicts(scorer, item("b", "wait")))
    await verifier.called.wait()
    await asyncio.sleep(0)  # the second joins
    first.cancel()
    await asyncio.wait({first})
    assert verifier.cancelled == 0
    verifier.gate.set()
    assert await second == {"b": Verdict.CORRECT}
    verifier.gate.clear()
    verifier.called.clear()
    alone = asyncio.create_task(verdicts(make(verifier), item("c", "wait")))
    await verifier.called.wait()
    alone.cancel()
    await asyncio.wait({alone})
    assert verifier.cancelled == 1


async def test_outcomes_come_as_they_are_known() -> None:
    verifier = EchoVerifier()
    async with aclosing(make(verifier).score([item("slow", "wait"), item("fast", "fine")])) as outcomes:
        assert (await anext(outcomes)).item_id == "fast"
        verifier.gate.set()
        assert (await anext(outcomes)).item_id == "slow"


async def test_a_full_queue_refuses_with_a_hint_and_empties_again() -> None:
    verifier = EchoVerifier()
    scorer = make(verifier, max_queued_items=2)
    async with aclosing(scorer.score([item("a", "wait"), item("b", "fine")])) as outcomes:
        await anext(outcomes)  # one of two is left
        with pytest.raises(ResourceExhaustedError, match="max_queued_items = 2") as full:
            await verdicts(scorer, item("c", "1"), item("d", "2"))
        assert full.value.retry_after_s is not None
    assert len(await verdicts(scorer, item("c", "1"), item("d", "2"))) == 2


async def test_outcomes_are_counted_by_verifier_and_verdict() -> None:
    def sample(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"perigee_reward_{name}", {"verifier": "exact"} | labels) or 0.0

    def read() -> list[float]:
        return [
            sample("outcomes_total", verdict="correct"),
            sample("outcomes_total", verdict="failed"),
            sample("cache_hits_total"),
            sample("judgement_seconds_count"),
            sample("queued_items"),
        ]

    before = read()
    await verdicts(make(EchoVerifier()), item("a", "fine"), item("b", "fine"), item("c", "fail"))
    assert [after - earlier for after, earlier in zip(read(), before, strict=True)] == [2, 1, 1, 3, 0]


async def test_a_verifier_that_is_behind_holds_up_no_other() -> None:
    slow, other = EchoVerifier(), OtherVerifier()
    scorer = make(slow, entries=0, max_queued_items=1)
    scorer.verifiers[other.name] = other
    waiting = asyncio.create_task(verdicts(scorer, item("a", "wait")))
    await slow.called.wait()
    with pytest.raises(ResourceExhaustedError, match="items of the exact verifier are under way"):
        await verdicts(scorer, item("b", "fine"))
    unrelated: Item[Any] = Item("c", "fine", "", pb.ShortAnswerVerifier(references=["x"]))
    assert await verdicts(scorer, unrelated) == {"c": Verdict.CORRECT}
    slow.gate.set()
    assert await waiting == {"a": Verdict.CORRECT}


def test_keys_differ_with_everything_that_matters_and_with_nothing_else() -> None:
    verifier = EchoVerifier()
    key: Callable[[Item[pb.ExactVerifier]], bytes] = lambda it: content_key(verifier, it)  # noqa: E731
    assert key(item("a", "one way #7", "#")) == key(item("b", "another way #8# 7", "#"))
    different = [
        item("a", "#7", "#"),
        item("a", "#8", "#"),
        item("a", "7", "#"),
        item("a", "#", "#"),
        item("a", "#7"),
        item("a", "##7", "##"),
        Item("a", "#7", "#", pb.ExactVerifier(reference="y")),
    ]
    assert len({key(each) for each in different}) == len(different)


def test_the_key_of_what_is_read_whole_holds_prompt_images_and_response() -> None:
    parameters = pb.ExactVerifier(reference="x")
    image, other = ImagePart(b"GIF89a", "image/gif"), ImagePart(url="https://example.org/a.png")
    items = [
        Item("a", "r", "", parameters),
        Item("a", "s", "", parameters),
        Item("a", "r", "", parameters, "p"),
        Item("a", "", "", parameters, "pr"),
        Item("a", "r", "", parameters, "p", (image,)),
        Item("a", "r", "", parameters, "p", (other,)),
        Item("a", "r", "", parameters, "p", (image, other)),
        Item("a", "r", "", parameters, "p", (other, image)),
    ]
    assert len({graded_whole(each) for each in items}) == len(items)
    same = Item("b", "r", "", parameters, "p", (ImagePart(b"GIF89a", "image/gif"),))
    assert graded_whole(same) == graded_whole(items[4])


def test_outcomes_have_a_reward_unless_they_failed() -> None:
    with pytest.raises(ValueError, match="failed outcome with reward 0"):
        Outcome(Verdict.FAILED, 0.0)
    with pytest.raises(ValueError, match="wrong outcome with reward None"):
        Outcome(Verdict.WRONG, None)


def test_a_failure_that_may_pass_says_when_to_ask_again() -> None:
    assert Outcome.failed("away", retryable=True).retry_after_s == 1.0
    assert Outcome.failed("busy", retryable=True, retry_after_s=9.0).retry_after_s == 9.0
    assert Outcome.failed("for good", retryable=False).retry_after_s is None


def test_a_long_answer_is_cut_to_its_beginning() -> None:
    assert Outcome.wrong("x" * 5000).extracted == "x" * 1000


def test_the_answer_is_what_follows_the_last_marker() -> None:
    assert extract_answer("4+5=9;#8#9 ", "#") == "9"
    assert extract_answer("no marker", "#") is None
    assert extract_answer("ends with #", "#") == ""
    assert extract_answer(" whole ", "") == "whole"
    assert read_answer(item("a", "so #9 ", "#")) == "9"
    for response, reason in (("no marker", "the response has no answer marker '#'"), ("ends with #", "is empty")):
        outcome = read_answer(item("a", response, "#"))
        assert isinstance(outcome, Outcome)
        assert (outcome.verdict, outcome.reward) == (Verdict.UNGRADABLE, 0.0)
        assert reason in outcome.reason
