"""Answers, majorities, budgets and hints of judges."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import time
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import JudgeConfig, JudgeEndpointConfig, RewardConfig
from services.reward.judges.endpoint import (
    Budget,
    BudgetSpentError,
    Endpoint,
    MalformedResponseError,
    TransientError,
    VoteError,
    build_body,
    estimate_tokens,
    read_completion,
    read_judgement,
    read_retry_after,
    read_signed_judgement,
)
from services.reward.judges.prompts import Case, Quoted
from services.reward.verifiers.base import Outcome, Verdict
from services.reward.verifiers.judge import JudgeVerifier, failed_vote, tally

GOOD = '{"reasoning": "r", "verdict": "ungradable"}'


def endpoint(**fields: Any) -> JudgeEndpointConfig:
    return JudgeEndpointConfig(**({"base_url": "http://127.0.0.1:9/v1", "model": "m"} | fields))


@pytest.mark.parametrize("answer", [GOOD, f"\n {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}```"])
def test_a_judgement_by_schema_is_the_whole_answer(answer: str) -> None:
    assert read_judgement(answer).verdict == "ungradable"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        "correct",
        '"correct"',
        "[]",
        "null",
        f"Well. {GOOD}",
        f"{GOOD} {GOOD}",
        f"{GOOD} as it says",
        f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```",
        GOOD[:-1],
        '{"verdict": "correct"}',
        '{"reasoning": "r"}',
        '{"reasoning": "r", "verdict": "Correct"}',
        '{"reasoning": "r", "verdict": "failed"}',
        '{"reasoning": "r", "verdict": null}',
        '{"reasoning": 1, "verdict": "correct"}',
        '{"reasoning": "r", "verdict": "correct", "more": 1}',
        '{"reasoning": "r", "verdict": "wrong", "verdict": "correct"}',
        '{"judgement": {"reasoning": "r", "verdict": "correct"}}',
        '{"reasoning":' * 100_000,
    ],
)
def test_anything_else_is_malformed(answer: str) -> None:
    with pytest.raises(MalformedResponseError):
        read_judgement(answer)


def test_a_signed_judgement_ends_the_answer_and_begins_with_the_id() -> None:
    signed = '{"id": "ab", "reasoning": "r {\\"id\\": 1}", "verdict": "wrong"}'
    for answer in (
        signed,
        f"<think>It says {GOOD}</think>\n{signed}",
        f"```json\n{signed}\n```",
        f'I would say {{"id": "ab", "reasoning": "first", "verdict": "correct"}}, but no: {signed}',
    ):
        assert read_signed_judgement(answer, "ab").verdict == "wrong"
    for answer in (
        GOOD,
        f"{signed} and so on",
        f"{signed} {GOOD}",
        signed.replace("ab", "ba"),
        '{"reasoning": "r", "verdict": "wrong", "id": "ab"}',
        '{"id": "ab", "reasoning": "r", "verdict": "wrong", "verdict": "correct"}',
    ):
        with pytest.raises(MalformedResponseError):
            read_signed_judgement(answer, "ab")


VOTES = {
    "c": Outcome(Verdict.CORRECT, 1.0, reason="agrees"),
    "w": Outcome(Verdict.WRONG, 0.0, reason="differs"),
    "u": Outcome(Verdict.UNGRADABLE, 0.0, reason="empty"),
    "r": failed_vote(TransientError("slow", retry_after_s=7)),
    "f": failed_vote(VoteError("no key")),
}


@pytest.mark.parametrize(
    ("cast", "verdict", "reward"),
    [
        ("c", Verdict.CORRECT, 1.0),
        ("w", Verdict.WRONG, 0.0),
        ("u", Verdict.UNGRADABLE, 0.0),
        ("cwc", Verdict.CORRECT, 1.0),
        ("wuw", Verdict.WRONG, 0.0),
        ("crc", Verdict.CORRECT, 1.0),
        ("cccrr", Verdict.CORRECT, 1.0),
    ],
)
def test_more_than_half_decide(cast: str, verdict: Verdict, reward: float) -> None:
    outcome = tally([VOTES[vote] for vote in cast], "4")
    assert (outcome.verdict, outcome.reward, outcome.extracted) == (verdict, reward, "4")
    assert [part.verdict for part in outcome.parts.values()] == [VOTES[vote].verdict for vote in cast]
    assert next(iter(outcome.parts)) == "vote 1"
    assert outcome.reason == next(vote.reason for vote in map(VOTES.get, cast) if vote and vote.verdict is verdict)


@pytest.mark.parametrize(
    ("cast", "retryable", "hint_s"),
    [
        ("cw", True, 1.0),
        ("cwu", True, 1.0),
        ("ccww", True, 1.0),
        ("cr", True, 7.0),
        ("crr", True, 7.0),
        ("r", True, 7.0),
        ("f", False, None),
        ("cff", False, None),
        ("rf", False, None),
        ("ccwwf", False, None),
    ],
)
def test_less_than_a_majority_is_a_failure_and_no_reward(cast: str, retryable: bool, hint_s: float | None) -> None:
    outcome = tally([VOTES[vote] for vote in cast], "")
    assert (outcome.verdict, outcome.reward) == (Verdict.FAILED, None)
    assert (outcome.retryable, outcome.retry_after_s) == (retryable, hint_s)
    assert ("no key" if "f" in cast else "slow" if "r" in cast else "no majority") in outcome.reason
    for part, vote in zip(outcome.parts.values(), cast, strict=True):
        assert (part.reward is None) is (VOTES[vote].verdict is Verdict.FAILED)


@given(st.lists(st.sampled_from(list(VOTES)), min_size=1, max_size=9))
def test_the_order_of_votes_does_not_matter(cast: list[str]) -> None:
    outcomes = [tally([VOTES[vote] for vote in order], "") for order in (cast, cast[::-1], sorted(cast))]
    assert len({(o.verdict, o.reward, o.retryable, o.retry_after_s) for o in outcomes}) == 1


async def test_calls_of_a_minute_wait_and_are_admitted_in_their_order() -> None:
    budget = Budget(endpoint(calls_per_minute=2), period_s=0.2)

    async def call() -> float:
        reservation = await budget.reserve(10)
        budget.finish(reservation, 1)
        return reservation.start

    starts = await asyncio.gather(*(call() for _ in range(5)))
    assert starts == sorted(starts)
    # Never more than two in any period: the third is a period after the first, the fifth after the third.
    for early, late in itertools.pairwise([starts[0], starts[2], starts[4]]):
        assert late - early >= 0.2
    assert (budget.used_calls, budget.used_tokens) == (5, 5)


async def test_tokens_of_a_minute_count_as_reserved_until_they_are_known() -> None:
    budget = Budget(endpoint(tokens_per_minute=100), period_s=30)
    first = await budget.reserve(80)
    with pytest.raises(TransientError, match="tokens_per_minute"):
        await budget.reserve(80, wait_s=0.01)
    waiting = asyncio.create_task(budget.reserve(80))
    await asyncio.sleep(0)
    budget.finish(first, 20)
    budget.finish(await waiting, 80)
    with pytest.raises(TransientError):
        await budget.reserve(1, wait_s=0.01)


async def test_a_call_larger_than_a_minute_goes_alone() -> None:
    budget = Budget(endpoint(tokens_per_minute=100), period_s=30)
    await budget.reserve(1000)
    with pytest.raises(TransientError):
        await budget.reserve(1, wait_s=0.01)


async def test_a_total_of_tokens_is_never_exceeded_and_then_refused() -> None:
    budget = Budget(endpoint(total_tokens=100))
    first = await budget.reserve(60)
    waiting = asyncio.create_task(budget.reserve(60))  # the first may take less than it reserved
    await asyncio.sleep(0.01)
    assert not waiting.done()
    budget.finish(first, 30)
    budget.finish(await waiting, None)  # unknown: as reserved
    assert budget.used_tokens == 90
    with pytest.raises(BudgetSpentError, match="total_tokens = 100 are spent: 90 are used"):
        await budget.reserve(11)
    budget.finish(await budget.reserve(10), 10)


async def test_a_total_of_calls_is_refused_when_it_is_spent() -> None:
    budget = Budget(endpoint(total_calls=1))
    budget.finish(await budget.reserve(1), 1)
    with pytest.raises(BudgetSpentError, match="total_calls = 1 are spent"):
        await budget.reserve(1)


async def test_a_caller_that_goes_away_while_waiting_takes_nothing() -> None:
    budget = Budget(endpoint(total_tokens=100))
    first = await budget.reserve(60)
    waiting = asyncio.create_task(budget.reserve(60))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait({waiting})
    budget.finish(first, 30)
    await budget.reserve(70)
    assert budget.used_calls == 2


@pytest.mark.parametrize(("text", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("", None), ("soon", None)])
def test_retry_after_in_seconds(text: str, seconds: float | None) -> None:
    assert read_retry_after(httpx.Headers({"Retry-After": text})) == seconds


def test_retry_after_as_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    date = email.utils.formatdate(1_000_000_030, usegmt=True)
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.5)
    assert read_retry_after(httpx.Headers({"Retry-After": date})) == pytest.approx(29.5)


@pytest.mark.parametrize(
    ("status", "body", "error", "reason"),
    [
        (429, '{"error": {"message": "slow down"}}', TransientError, "answered 429: slow down"),
        (503, "<html>\nbad  gateway</html>", TransientError, "answered 503: <html> bad gateway</html>"),
        (400, '{"message": "too long"}', VoteError, "refused the request with 400: too long"),
        (401, "", VoteError, "answered 401"),
        (301, "", VoteError, "answered 301"),
        (200, "<html>", MalformedResponseError, "no chat completion"),
        (200, '{"choices": 3}', MalformedResponseError, "no chat completion"),
    ],
)
def test_statuses_are_told_apart(status: int, body: str, error: type[VoteError], reason: str) -> None:
    with pytest.raises(error, match=reason) as raised:
        read_completion(httpx.Response(status, text=body))
    assert type(raised.value).retryable is error.retryable


def test_extra_fields_are_laid_over_a_request_and_take_fields_out() -> None:
    config = endpoint(extra_body={"max_tokens": None, "max_completion_tokens": 7, "top_p": 0.9}, temperature=None)
    body = build_body(config, [{"role": "user", "content": "x" * 10}], by_schema=False)
    assert set(body) == {"model", "messages", "max_completion_tokens", "top_p"}
    assert estimate_tokens(body, config.max_tokens) == 10 // 2 + 7


def test_parameters_are_checked() -> None:
    verifier = JudgeVerifier(JudgeConfig(judges={"main": endpoint()}))
    assert verifier.find_violations(pb.JudgeVerifier(reference="4", judge="main", votes=3)) == []
    assert verifier.find_violations(pb.JudgeVerifier(rubric="Is polite.")) == []
    wrong = pb.JudgeVerifier(reference=" ", judge="mian", votes=0)
    assert [violation.field for violation in verifier.find_violations(wrong)] == [
        "judge.reference",
        "judge.judge",
        "judge.votes",
    ]


def test_judges_come_from_the_configuration_and_their_keys_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from perigee.config import merge, validate
    from services.kit.config import environment_values

    monkeypatch.setenv("PERIGEE_REWARD__JUDGE__JUDGES__MAIN__API_KEY", "sk-secret")
    values: dict[str, Any] = {"judge": {"judges": {"main": {"base_url": "http://h/v1", "model": "m"}}}}
    merge(values, environment_values(RewardConfig))
    config = validate(RewardConfig, values, "recipe", "reward")
    key = config.judge.judges["main"].api_key
    assert key is not None
    assert key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in config.model_dump_json()
    with pytest.raises(ValueError, match="none of the judges"):
        JudgeConfig(judges={"main": endpoint()}, default="other")


async def test_a_retry_whose_time_has_gone_by_tells_of_the_failure_before_it() -> None:
    asked = 0

    def refuse(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        # The event loop is held up, as by a machine under load, past the pause (at most 0.5 s) and the vote's time.
        asyncio.get_running_loop().call_soon(time.sleep, 0.6)
        raise httpx.ConnectError("refused", request=request)

    judge = Endpoint("judge", endpoint(timeout_s=0.55), 1000)
    await judge.close()
    judge._client = httpx.AsyncClient(transport=httpx.MockTransport(refuse))
    with pytest.raises(VoteError, match="cannot be reached: refused"):
        await judge.vote(Quoted.from_case(Case("2 + 2?", "4", "", "4")))
    await judge.close()
    assert asked == 1
