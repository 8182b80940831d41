"""What becomes of an item when its judge is down, slow, busy, talks malformed or does not know JSON schemas."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from services.reward.config import JudgeConfig
from services.reward.verifiers.base import ImagePart, Outcome, Verdict
from services.reward.verifiers.judge import JudgeVerifier
from tests.fixtures.judge import FakeJudge, Reply, judge_item, running_judge, signed_verdict, text_of, verdict

BUSY = Reply(status=429, body='{"error": {"message": "slow down"}}', headers={"Retry-After": "0.3"})
TRUNCATED = Reply('{"reasoning": "it goes on and on', finish_reason="length")


def assert_failed(outcome: Outcome, reason: str, *, retryable: bool) -> None:
    assert (outcome.verdict, outcome.reward) == (Verdict.FAILED, None)
    assert reason in outcome.reason
    assert outcome.retryable is retryable
    assert (outcome.retry_after_s is not None) is retryable
    assert all(part.verdict is Verdict.FAILED and part.reward is None for part in outcome.parts.values())


@pytest.mark.parametrize(
    ("name", "reward"), [("correct", 1.0), ("wrong", 0.0), ("ungradable", 0.0)], ids=lambda value: str(value)
)
async def test_a_judgement_becomes_the_outcome(fake_judge: FakeJudge, name: str, reward: float) -> None:
    fake_judge.otherwise = verdict(name, "Step by step.")
    async with running_judge(fake_judge.url, temperature=0.5, votes=3) as verifier:
        outcome = await verifier.judge(judge_item("Say #4", marker="#"))
        budget = verifier.endpoints["main"].budget
    assert (outcome.verdict.value, outcome.reward, outcome.extracted) == (name, reward, "4")
    assert outcome.reason == "Step by step."
    assert list(outcome.parts) == ["vote 1", "vote 2", "vote 3"]
    assert (budget.used_calls, budget.used_tokens) == (3, 360)
    [body, *_] = fake_judge.requests
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.5, 500)
    assert body["response_format"]["json_schema"]["strict"] is True


async def test_a_response_without_answer_costs_no_call(fake_judge: FakeJudge) -> None:
    async with running_judge(fake_judge.url) as verifier:
        for item in (judge_item("no marker", marker="#"), judge_item("empty #", marker="#"), judge_item("  ")):
            assert (await verifier.judge(item)).verdict is Verdict.UNGRADABLE
    assert fake_judge.requests == []


async def test_a_judge_that_is_down_is_a_failure() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        async with running_judge(url, timeout_s=1.0, votes=2) as verifier:
            outcome = await verifier.judge(judge_item())
    assert_failed(outcome, "cannot be reached", retryable=True)
    assert len(outcome.parts) == 2


async def test_a_judge_that_comes_back_within_the_deadline_judges(fake_judge: FakeJudge) -> None:
    fake_judge.script = [Reply(status=503, body="restarting"), Reply(status=502, body=""), Reply(delay_s=60)]
    async with running_judge(fake_judge.url, attempt_timeout_s=0.5) as verifier:
        outcome = await verifier.judge(judge_item())
    assert (outcome.verdict, outcome.reward) == (Verdict.CORRECT, 1.0)
    assert len(fake_judge.requests) == 4


async def test_a_slow_judge_is_a_failure(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply(delay_s=60)
    async with running_judge(fake_judge.url, timeout_s=0.5) as verifier:
        outcome = await verifier.judge(judge_item())
        # Nobody knows what a request that broke off took: it counts as what it may have taken.
        budget = verifier.endpoints["main"].budget
        assert budget.used_tokens > 500 * budget.used_calls
    assert_failed(outcome, "did not answer within", retryable=True)


async def test_a_busy_judge_is_asked_again_when_it_says(fake_judge: FakeJudge) -> None:
    fake_judge.script = [BUSY]
    async with running_judge(fake_judge.url) as verifier:
        outcome = await verifier.judge(judge_item())
    assert outcome.verdict is Verdict.CORRECT
    first, second = fake_judge.times
    assert second - first >= 0.3


async def test_a_judge_that_stays_busy_past_the_deadline_is_a_failure_with_its_hint(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply(status=429, body="", headers={"Retry-After": "77"})
    async with running_judge(fake_judge.url) as verifier:
        outcome = await verifier.judge(judge_item())
    assert_failed(outcome, "answered 429", retryable=True)
    assert outcome.retry_after_s == 77.0
    assert len(fake_judge.requests) == 1  # waiting would not have helped


@pytest.mark.parametrize(
    ("malformed", "reason"),
    [
        (Reply("The response is right."), "is not JSON"),
        (Reply('{"reasoning": "r"}'), "verdict"),
        (Reply('{"reasoning": "r", "verdict": "maybe"}'), "verdict"),
        (Reply(""), "empty"),
        (Reply(None), "empty"),
        (TRUNCATED, "cut off at max_tokens"),
        (Reply('{"reasoning": "r", "verdict": "correct"}', finish_reason="length"), "cut off at max_tokens"),
        (Reply("", finish_reason="content_filter"), "declined"),
        (Reply(body="<html>It works!</html>"), "no chat completion"),
        (Reply(body='{"choices": []}'), "no choice"),
    ],
    ids=["prose", "no verdict", "other verdict", "empty", "null", "truncated", "cut", "filtered", "html", "no choice"],
)
async def test_a_malformed_answer_is_asked_again_once_and_then_a_failure(
    fake_judge: FakeJudge, malformed: Reply, reason: str
) -> None:
    async with running_judge(fake_judge.url) as verifier:
        fake_judge.script = [malformed]
        assert (await verifier.judge(judge_item())).verdict is Verdict.CORRECT
        assert len(fake_judge.requests) == 2
        fake_judge.script = [malformed, malformed]
        outcome = await verifier.judge(judge_item())
        assert len(fake_judge.requests) == 4
    assert_failed(outcome, reason, retryable=True)
    assert "main" in outcome.reason


async def test_votes_that_fail_take_no_part_in_the_majority(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply("malformed")
    fake_judge.script = [verdict("correct"), verdict("correct"), Reply("malformed"), Reply("malformed")]
    async with running_judge(fake_judge.url, concurrency=1) as verifier:
        outcome = await verifier.judge(judge_item(votes=3))
        assert (outcome.verdict, outcome.reward) == (Verdict.CORRECT, 1.0)
        assert [part.verdict for part in outcome.parts.values()] == [Verdict.CORRECT, Verdict.CORRECT, Verdict.FAILED]
        fake_judge.script = [verdict("correct"), verdict("wrong")]
        split = await verifier.judge(judge_item(votes=2))
        fake_judge.script = [verdict("correct")]
        lone = await verifier.judge(judge_item(votes=2))
    for tied in (split, lone):
        assert (tied.verdict, tied.reward, tied.retryable) == (Verdict.FAILED, None, True)
        assert "no majority among 2 votes" in tied.reason


async def test_an_endpoint_without_schemas_is_asked_in_words_and_remembered(fake_judge: FakeJudge) -> None:
    fake_judge.refuses_schema = True
    fake_judge.otherwise = signed_verdict("correct")
    async with running_judge(fake_judge.url) as verifier:
        assert (await verifier.judge(judge_item())).verdict is Verdict.CORRECT
        assert (await verifier.judge(judge_item())).verdict is Verdict.CORRECT
        assert ["response_format" in body for body in fake_judge.requests] == [True, False, False]
        # In words, JSON without the request's number is nobody's verdict.
        fake_judge.otherwise = verdict("correct")
        assert_failed(await verifier.judge(judge_item()), "does not end with a judgement", retryable=True)


async def test_a_request_that_is_refused_either_way_is_no_reason_to_ask_in_words(fake_judge: FakeJudge) -> None:
    too_long = Reply(status=400, body='{"error": {"message": "longer than the context"}}')
    fake_judge.script = [too_long, too_long]
    async with running_judge(fake_judge.url) as verifier:
        assert_failed(await verifier.judge(judge_item()), "longer than the context", retryable=False)
        assert (await verifier.judge(judge_item())).verdict is Verdict.CORRECT
    assert "response_format" in fake_judge.requests[-1]


async def test_a_wrong_key_is_a_failure_that_does_not_repeat_it(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply(status=401, body='{"error": {"message": "wrong key sk-secret"}}')
    async with running_judge(fake_judge.url, api_key="sk-secret") as verifier:
        outcome = await verifier.judge(judge_item())
    assert_failed(outcome, "wrong key ***", retryable=False)
    assert fake_judge.headers[0]["authorization"] == "Bearer sk-secret"
    assert len(fake_judge.requests) == 1


async def test_a_spent_budget_is_a_failure(fake_judge: FakeJudge) -> None:
    async with running_judge(fake_judge.url, total_calls=2) as verifier:
        for _ in range(2):
            assert (await verifier.judge(judge_item())).verdict is Verdict.CORRECT
        assert_failed(await verifier.judge(judge_item()), "total_calls = 2 are spent", retryable=False)
    assert len(fake_judge.requests) == 2


async def test_no_more_votes_are_under_way_than_are_set(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply(json.dumps({"reasoning": "", "verdict": "correct"}), delay_s=0.05)
    async with running_judge(fake_judge.url, concurrency=2) as verifier:
        await asyncio.gather(*(verifier.judge(judge_item(votes=3)) for _ in range(2)))
    assert len(fake_judge.requests) == 6
    assert fake_judge.most_at_once == 2


async def test_a_caller_that_goes_away_leaves_no_request_behind(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply(delay_s=60)
    async with running_judge(fake_judge.url, concurrency=1) as verifier:
        judging = asyncio.create_task(verifier.judge(judge_item(votes=3)))
        while not fake_judge.requests:  # noqa: ASYNC110 - the server sets no event
            await asyncio.sleep(0.01)
        judging.cancel()
        await asyncio.wait({judging})
        fake_judge.otherwise = verdict("wrong")
        assert (await verifier.judge(judge_item())).verdict is Verdict.WRONG
    assert len(fake_judge.requests) == 2


async def test_images_and_cuts_reach_the_judge(fake_judge: FakeJudge) -> None:
    image = ImagePart(b"GIF89a", "image/gif")
    async with running_judge(fake_judge.url) as verifier:
        await verifier.judge(judge_item("a" * 2600 + "b" * 2600, images=(image,), rubric="Is long."))
    content = fake_judge.requests[0]["messages"][-1]["content"]
    assert content[1] == {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lGODlh"}}
    assert ": 200 characters are left out here>>>" in text_of(fake_judge.requests[0])


async def test_without_a_judge_the_verifier_says_what_it_lacks() -> None:
    verifier = JudgeVerifier(JudgeConfig())
    assert "reward.judge.judges" in verifier.unavailable
    assert_failed(await verifier.judge(judge_item()), "reward.judge.judges", retryable=False)
