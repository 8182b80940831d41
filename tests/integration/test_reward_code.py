"""The code verifier with a real sandbox."""

from __future__ import annotations

import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED, VERDICT_UNGRADABLE, VERDICT_WRONG
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2 as sandbox_pb
from tests.fixtures.reward import score, score_one
from tests.fixtures.sandbox import function_tests, stdio_tests

DOUBLE = function_tests([([3], 6), ([0], 0), ([-2], -4)])


def code_item(item_id: str, response: str, **fields: object) -> pb.ScoreItem:
    parameters = {"language": "python", "function_name": "f", "tests": DOUBLE} | fields
    return pb.ScoreItem(id=item_id, response=response, answer_marker="#", code=pb.CodeVerifier(**parameters))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("program", "verdict", "reason"),
    [
        ("double it #def f(x):return 2*x", VERDICT_CORRECT, ""),
        ("#def f(x):return x", VERDICT_WRONG, "wrong answer"),
        ("#def f(x):return", VERDICT_WRONG, "wrong answer"),
        ("#def f(x) return 2*x", VERDICT_WRONG, "compile error"),
        ("#def g(x):return 2*x", VERDICT_WRONG, ""),
        ("#def f(x):return 1/0", VERDICT_WRONG, "runtime error"),
        ("def f(x):return 2*x", VERDICT_UNGRADABLE, "no answer marker"),
        ("#", VERDICT_UNGRADABLE, "empty"),
        ("#\0", VERDICT_WRONG, ""),
    ],
)
async def test_programs_get_their_verdicts(
    coding_reward: RewardClient, program: str, verdict: int, reason: str
) -> None:
    outcome = await score_one(coding_reward, code_item("a", program))
    assert outcome.verdict == verdict, outcome
    assert outcome.reward == (1.0 if verdict == VERDICT_CORRECT else 0.0)
    assert reason in outcome.reason
    assert outcome.verifier == "code"


async def test_an_endless_program_is_wrong_by_its_limit(coding_reward: RewardClient) -> None:
    limits = sandbox_pb.Limits(wall_ms=500, cpu_ms=500)
    outcome = await score_one(coding_reward, code_item("a", "#def f(x):\n while True: pass", limits=limits))
    assert (outcome.verdict, outcome.reward) == (VERDICT_WRONG, 0.0)
    assert "time limit" in outcome.reason


async def test_partial_credit_is_the_share_of_passed_tests(coding_reward: RewardClient) -> None:
    items = [
        code_item("all", "#def f(x):return 2*x", partial_credit=True),
        code_item("third", "#def f(x):return x", partial_credit=True),
        code_item("compile", "#def f(", partial_credit=True),
        code_item("none", "#def f(x):return 'no'", partial_credit=True),
    ]
    outcomes = {outcome.id: outcome for outcome in await score(coding_reward, items)}
    assert outcomes["all"].verdict == VERDICT_CORRECT
    assert {name: round(outcome.reward, 6) for name, outcome in outcomes.items()} == {
        "all": 1.0,
        "third": 0.333333,
        "compile": 0.0,
        "none": 0.0,
    }


async def test_standard_input_programs(coding_reward: RewardClient) -> None:
    fields = {"function_name": "", "tests": stdio_tests([(b"3\n", b"6\n"), (b"4\n", b"8\n")])}
    item = code_item("a", "#print(2*int(input()))", **fields)
    assert (await score_one(coding_reward, item)).verdict == VERDICT_CORRECT


async def test_a_prompt_that_the_sandbox_refuses_has_failed_for_good(coding_reward: RewardClient) -> None:
    tests = [sandbox_pb.TestCase(function=sandbox_pb.FunctionTest(arguments_json="[3", expected_json="6"))]
    outcome = await score_one(coding_reward, code_item("a", "#def f(x):return 2*x", tests=tests))
    assert (outcome.verdict, outcome.HasField("reward"), outcome.retryable) == (VERDICT_FAILED, False, False)
    assert "arguments_json" in outcome.reason
