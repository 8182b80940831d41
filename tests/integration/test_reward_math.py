"""The math verifier behind the real service, with real math-verify processes."""

from __future__ import annotations

import pytest

from perigee.buffer.v1.buffer_pb2 import (
    VERDICT_CORRECT,
    VERDICT_FAILED,
    VERDICT_UNGRADABLE,
    VERDICT_WRONG,
)
from perigee.errors import InvalidArgumentError
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import MathConfig
from tests.fixtures.reward import math_item, running_reward, score, score_one

JUDGED = [
    ("16", "4+5=9;9+7=16#16", VERDICT_CORRECT),
    ("16", "#17", VERDICT_WRONG),
    ("16", "16", VERDICT_UNGRADABLE),
    ("16", "#", VERDICT_UNGRADABLE),
    ("16", "#(((", VERDICT_UNGRADABLE),
    ("16", "#16 apples", VERDICT_CORRECT),
    ("16", "#4+12", VERDICT_WRONG),
    ("1/2", "#0.5", VERDICT_CORRECT),
    ("1/2", "#\\frac{2}{4}", VERDICT_CORRECT),
    ("1/2", "#1/3", VERDICT_WRONG),
    ("0.333333", "#1/3", VERDICT_CORRECT),
    ("1/3", "#0.33", VERDICT_WRONG),
    ("x^2", "#x*x", VERDICT_CORRECT),
    ("2x+1", "#2", VERDICT_WRONG),
    ("2x+1", "#1+2x", VERDICT_CORRECT),
    ("10^5", "#100000", VERDICT_CORRECT),
    ("10^5", "#10", VERDICT_WRONG),
    ("100000", "#1e5", VERDICT_CORRECT),
    ("3.5", "#3 1/2", VERDICT_CORRECT),
    ("\\sqrt{2}", "#√2", VERDICT_CORRECT),
    ("3\\pi", "#3", VERDICT_WRONG),
    ("\\{1,2\\}", "#{2,1}", VERDICT_CORRECT),
    ("(1,2]", "#(1,2)", VERDICT_WRONG),
    ("3", "#x=3", VERDICT_CORRECT),
    ("1234", "#1,234", VERDICT_CORRECT),
    ("50\\%", "#0.5", VERDICT_CORRECT),
]


@pytest.mark.parametrize(("reference", "response", "verdict"), JUDGED)
async def test_answers_get_their_verdicts(reward: RewardClient, reference: str, response: str, verdict: int) -> None:
    outcome = await score_one(reward, math_item("a", reference, response))
    assert outcome.verdict == verdict, outcome
    assert outcome.HasField("reward")
    assert outcome.reward == (1.0 if verdict == VERDICT_CORRECT else 0.0)
    assert outcome.verifier == "math"


async def test_without_a_marker_the_box_counts_and_prose_where_it_is_asked_for(reward: RewardClient) -> None:
    boxed = "We add 3 and 4.\nThe sum is $\\boxed{7}$."
    assert (await score_one(reward, math_item("a", "7", boxed, marker=""))).verdict == VERDICT_CORRECT
    assert (await score_one(reward, math_item("a", "3", boxed, marker=""))).verdict == VERDICT_WRONG
    bare = math_item("a", "2x+1", "2x+1", marker="")
    assert (await score_one(reward, bare)).verdict == VERDICT_UNGRADABLE
    bare.math.extraction = pb.ANSWER_EXTRACTION_PROSE
    assert (await score_one(reward, bare)).verdict == VERDICT_CORRECT


async def test_two_answers_are_none_and_the_question_again_is_wrong(reward: RewardClient) -> None:
    two = math_item("a", "5", "\\boxed{5}. The answer is: 6.", marker="")
    outcome = await score_one(reward, two)
    assert (outcome.verdict, outcome.reason) == (VERDICT_UNGRADABLE, "the response gives different answers")
    same = math_item("a", "(10,2)", "\\boxed{(10,2)}. The answer is: (10,2).", marker="")
    assert (await score_one(reward, same)).verdict == VERDICT_CORRECT
    again = math_item("a", "6\\sqrt{2}", "\\boxed{\\sqrt{72}}", marker="")
    assert (await score_one(reward, again)).verdict == VERDICT_WRONG
    again.math.form = pb.ANSWER_FORM_VALUE
    assert (await score_one(reward, again)).verdict == VERDICT_CORRECT


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "123456789!"])
async def test_a_hanging_expression_fails_by_its_deadline_and_harms_no_other(bomb: str) -> None:
    async with running_reward(math=MathConfig(workers=1, check_timeout_s=1)) as client:
        items = [
            math_item("bomb", "7", f"#{bomb}"),
            *(math_item(str(i), f"\\sqrt{{{4 * i}}}", f"#2\\sqrt{{{i}}}") for i in range(1, 6)),
        ]
        outcomes = {outcome.id: outcome for outcome in await score(client, items)}
        assert outcomes["bomb"].verdict == VERDICT_FAILED
        assert not outcomes["bomb"].HasField("reward")
        assert "did not end within 1 s of CPU time" in outcomes["bomb"].reason
        assert {outcomes[str(i)].verdict for i in range(1, 6)} == {VERDICT_CORRECT}


async def test_a_check_that_eats_memory_fails_by_its_limit() -> None:
    config = MathConfig(workers=1, check_timeout_s=20, memory_bytes=150 << 20)
    async with running_reward(math=config) as client:
        outcome = await score_one(client, math_item("a", "7", "#2^{10000000000}"))
        assert (outcome.verdict, outcome.HasField("reward")) == (VERDICT_FAILED, False)
        assert "more than 150 MiB of memory" in outcome.reason
        assert (await score_one(client, math_item("b", "\\sqrt{8}", "#2\\sqrt{2}"))).verdict == VERDICT_CORRECT


async def test_every_item_has_one_outcome_under_its_id(reward: RewardClient) -> None:
    items = [math_item(f"item-{i}", str(i), f"#{i if i % 3 else i + 1}") for i in range(500)]
    outcomes = await score(reward, items)
    assert sorted(outcome.id for outcome in outcomes) == sorted(item.id for item in items)
    assert all((o.verdict == VERDICT_CORRECT) == bool(int(o.id[5:]) % 3) for o in outcomes)


async def test_bad_requests_name_their_fields(reward: RewardClient) -> None:
    items = [
        math_item("", "1", "#1"),
        math_item("a", " ", "#1"),
        math_item("a", "1", "x" * (1 << 20) + "#1"),
        math_item("d", "\\frac{}{2}", "#1"),
        pb.ScoreItem(id="b", response="#1"),
        pb.ScoreItem(id="c", response="#1", code=pb.CodeVerifier()),
    ]
    with pytest.raises(InvalidArgumentError) as error:
        await score(reward, items)
    assert {v.field for v in error.value.violations} == {
        "items[0].id",
        "items[1].math.reference",
        "items[2].id",
        "items[2].response",
        "items[3].math.reference",
        "items[4].verifier",
        "items[5].code.language",
        "items[5].code.tests",
    }


async def test_thousands_of_bad_items_still_make_a_readable_error(reward: RewardClient) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        await score(reward, [pb.ScoreItem() for _ in range(5000)])
    assert len(error.value.violations) == 20


async def test_the_verifiers_are_listed(reward: RewardClient) -> None:
    response = await reward.list_verifiers(pb.ListVerifiersRequest())
    assert [(v.name, bool(v.version)) for v in response.verifiers] == [
        (name, True)
        for name in (
            "math",
            "code",
            "patch",
            "choice",
            "short_answer",
            "exact",
            "regex",
            "json",
            "judge",
            "value_head",
            "composite",
        )
    ]


async def test_an_empty_batch_is_an_empty_stream(reward: RewardClient) -> None:
    assert await score(reward, []) == []
