"""What the code verifier makes of a sandbox that fails, with one that fails on cue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from structlog.testing import CapturingLogger

from perigee.errors import (
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    PerigeeError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from perigee.reward.v1 import reward_pb2
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.reward.config import CodeConfig
from services.reward.verifiers import code
from services.reward.verifiers.base import Item, Outcome, Verdict
from services.reward.verifiers.code import CodeVerifier
from services.reward.verifiers.patch import find_patch

TESTS = tuple(pb.TestCase(stdio=pb.StdioTest(stdin=b"%d" % i)) for i in range(2))


def judged(*verdicts: str, whole: str | None = None, reason: str = "", **fields: object) -> pb.JudgeResponse:
    """A judgement of a program by the verdicts on its tests; the first that is not accepted is the whole's."""
    named = [pb.TestVerdict.Value(f"TEST_VERDICT_{name}") for name in verdicts]
    results = [pb.TestResult(verdict=verdict, reason=reason) for verdict in named]
    bad = [verdict for verdict in named if verdict != pb.TEST_VERDICT_ACCEPTED]
    found = pb.TestVerdict.Value(f"TEST_VERDICT_{whole}") if whole else (bad or [pb.TEST_VERDICT_ACCEPTED])[0]
    return pb.JudgeResponse(verdict=found, results=results, **fields)  # type: ignore[arg-type]


ACCEPTED = judged("ACCEPTED", "ACCEPTED", points=2, max_points=2)
INFRA_ERROR = judged("INFRA_ERROR", "SKIPPED", reason="the box broke")


class FakeSandbox(SandboxClient):
    """Gives the replies of `script` in turn, then `otherwise`: a real one cannot be told when to fail."""

    def __init__(
        self, *script: pb.JudgeResponse | PerigeeError, otherwise: pb.JudgeResponse | PerigeeError = ACCEPTED
    ) -> None:
        self.script = list(script)
        self.otherwise = otherwise
        self.timeouts_s: list[float] = []
        self.at_once = self.most_at_once = 0

    async def judge(self, request: pb.JudgeRequest, *, timeout_s: float = 60.0) -> pb.JudgeResponse:
        """The next reply."""
        self.timeouts_s.append(timeout_s)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        reply = self.script.pop(0) if self.script else self.otherwise
        if isinstance(reply, PerigeeError):
            raise reply
        return reply


async def judge(sandbox: FakeSandbox, partial_credit: bool = False, timeout_s: float = 60.0) -> Outcome:
    verifier = CodeVerifier(CodeConfig(timeout_s=timeout_s), sandbox)
    return await verifier.judge(
        Item(
            "a", "print(1)", "", reward_pb2.CodeVerifier(language="python", tests=TESTS, partial_credit=partial_credit)
        )
    )


@pytest.mark.parametrize(
    "failure",
    [
        INFRA_ERROR,
        UnavailableError("the sandbox is away"),
        InternalError("the sandbox broke"),
        ResourceExhaustedError("the queue is full", retry_after_s=0.02),
    ],
    ids=["infra error", "away", "broken", "busy"],
)
async def test_what_is_the_sandboxs_fault_is_tried_again(failure: pb.JudgeResponse | PerigeeError) -> None:
    sandbox = FakeSandbox(failure, failure)
    outcome = await judge(sandbox)
    assert (outcome.verdict, outcome.reward) == (Verdict.CORRECT, 1.0)
    # All attempts share one deadline.
    assert len(sandbox.timeouts_s) == 3
    assert 60 >= sandbox.timeouts_s[0] > sandbox.timeouts_s[1] > sandbox.timeouts_s[2] > 0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (INFRA_ERROR, "the sandbox could not judge: the box broke"),
        (UnavailableError("the sandbox is away"), "the sandbox is away"),
        (ResourceExhaustedError("the queue is full", retry_after_s=30), "the queue is full"),
        (DeadlineExceededError("late"), "did not answer within 0.3 s"),
    ],
    ids=["infra error", "away", "busy", "late"],
)
async def test_past_the_deadline_it_is_a_failure_with_a_hint(
    failure: pb.JudgeResponse | PerigeeError, reason: str
) -> None:
    outcome = await judge(FakeSandbox(otherwise=failure), timeout_s=0.3)
    assert (outcome.verdict, outcome.reward, outcome.retryable) == (Verdict.FAILED, None, True)
    assert reason in outcome.reason
    assert outcome.retry_after_s is not None
    assert outcome.retry_after_s >= (30 if "queue" in reason else 0.1)


@pytest.mark.parametrize("verdicts", [("UNJUDGEABLE", "SKIPPED"), ("ACCEPTED", "UNJUDGEABLE")])
async def test_tests_that_cannot_be_judged_give_no_reward_and_are_logged_once_by_their_prompt(
    verdicts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CapturingLogger()
    monkeypatch.setattr(code, "log", log)
    sandbox = FakeSandbox(otherwise=judged(*verdicts, reason="the checker is broken"))
    verifier = CodeVerifier(CodeConfig(), sandbox)
    parameters = reward_pb2.CodeVerifier(language="python", tests=TESTS)
    for number in range(2):
        outcome = await verifier.judge(Item(str(number), f"print({number})", "", parameters, "Print it."))
        assert (outcome.verdict, outcome.reward, outcome.retryable) == (Verdict.FAILED, None, False)
        assert outcome.is_unjudgeable
        assert outcome.reason == "the prompt's tests cannot be judged: the checker is broken"
    assert len(sandbox.timeouts_s) == 2
    [call] = log.calls
    assert (call.args, call.kwargs["item"], call.kwargs["prompt"]) == (("tests cannot be judged",), "0", "Print it.")


async def test_a_program_that_the_clock_ended_is_told_apart() -> None:
    late = judged("TIME_LIMIT", reason="wall-clock limit of 500 ms")
    late.results[0].MergeFrom(pb.TestResult(wall_limited=True, cpu_ms=372))
    outcome = await judge(FakeSandbox(otherwise=late))
    assert outcome.reason == "time limit: wall-clock limit of 500 ms, 372 ms of CPU time used"


async def test_a_share_needs_every_test_to_be_judged() -> None:
    half = judged("ACCEPTED", "WRONG_ANSWER", points=1, max_points=2)
    unknown = judged("WRONG_ANSWER", "INFRA_ERROR", points=0, max_points=2)
    outcome = await judge(FakeSandbox(unknown, half), partial_credit=True)
    assert (outcome.verdict, outcome.reward) == (Verdict.WRONG, 0.5)
    # Without shares one test that failed is enough.
    outcome = await judge(FakeSandbox(unknown, half))
    assert (outcome.verdict, outcome.reward) == (Verdict.WRONG, 0.0)


async def test_what_does_not_compile_is_wrong_in_the_compilers_words() -> None:
    compiled = pb.CompileResult(exit_code=1, stderr=b"In file:\n  x.c:1: error: expected ';'\n")
    response = judged("SKIPPED", "SKIPPED", whole="COMPILE_ERROR", compile=compiled, max_points=2)
    for partial_credit in (False, True):
        outcome = await judge(FakeSandbox(response), partial_credit)
        assert (outcome.verdict, outcome.reward) == (Verdict.WRONG, 0.0)
        assert outcome.reason == "compile error: x.c:1: error: expected ';'"


@pytest.mark.parametrize(
    ("make", "verdict", "reward"),
    [
        # The program is what the sandbox does not take.
        (lambda: InvalidArgumentError.for_field("source", "is too large"), Verdict.UNGRADABLE, 0.0),
        (lambda: InvalidArgumentError.for_field("tests", "has no test"), Verdict.FAILED, None),
        (
            lambda: InvalidArgumentError("wrong", violations=[FieldViolation(n, "is wrong") for n in ("source", "x")]),
            Verdict.FAILED,
            None,
        ),
        (lambda: UnauthenticatedError("no token"), Verdict.FAILED, None),
    ],
    ids=["program", "tests", "both", "token"],
)
async def test_what_is_refused_is_asked_once(
    make: Callable[[], PerigeeError], verdict: Verdict, reward: float | None
) -> None:
    sandbox = FakeSandbox(otherwise=make())
    outcome = await judge(sandbox)
    assert (outcome.verdict, outcome.reward, outcome.retryable) == (verdict, reward, False)
    assert len(sandbox.timeouts_s) == 1


async def test_no_more_programs_are_at_the_sandbox_than_are_set() -> None:
    sandbox = FakeSandbox()
    verifier = CodeVerifier(CodeConfig(concurrency=3), sandbox)
    item = Item("a", "print(1)", "", reward_pb2.CodeVerifier(language="python", tests=TESTS))
    await asyncio.gather(*(verifier.judge(item) for _ in range(10)))
    assert sandbox.most_at_once == 3


async def test_a_verifier_says_that_its_sandbox_is_away_until_it_is_back() -> None:
    sandbox = FakeSandbox(otherwise=UnavailableError("nobody listens"))
    verifier = CodeVerifier(CodeConfig(timeout_s=0.05), sandbox)
    item = Item("a", "print(1)", "", reward_pb2.CodeVerifier(language="python", tests=TESTS))
    assert verifier.unavailable == ""
    await verifier.judge(item)
    assert verifier.unavailable == "nobody listens"
    sandbox.otherwise = ACCEPTED
    await verifier.judge(item)
    assert verifier.unavailable == ""


def test_a_diff_of_a_page_with_fences_is_taken_whole() -> None:
    diff = "--- a/README.md\n+++ b/README.md\n@@ -1,3 +1,3 @@\n ```\n-old\n+new\n ```\n"
    assert find_patch(f"First:\n```python\nx\n```\nThen\n```diff\n{diff}```\nDone.") == diff
    assert find_patch(diff) == diff
    assert find_patch(f"```diff\n{diff}\n```") == f"{diff}\n"
