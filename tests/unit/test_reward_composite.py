"""Weights, gates and failures of composites, with parts whose outcomes the test sets."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from prometheus_client import REGISTRY

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.scorer import Scorer
from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier
from services.reward.verifiers.composite import CompositeVerifier
from services.reward.verifiers.text import ExactVerifier

FAILED = Outcome.failed("nobody knows", retryable=True, retry_after_s=3.0)
WRONG = Outcome.wrong("w", "not it")
CORRECT = Outcome.correct("c")
PARTIAL = Outcome.wrong("p", "half of it", reward=0.5)
UNGRADABLE = Outcome.ungradable("nothing there")


OUTCOMES: list[Outcome] = []


class SetVerifier(Verifier[pb.RegexVerifier]):
    """Gives the outcome of OUTCOMES that the pattern counts, and counts its calls."""

    name: ClassVar[str] = "regex"
    version: ClassVar[str] = "1"

    def __init__(self) -> None:
        self.calls = 0

    def find_violations(self, parameters: pb.RegexVerifier) -> list[FieldViolation]:
        is_wrong = OUTCOMES[int(parameters.pattern)] is UNGRADABLE
        return [FieldViolation("regex.pattern", "is wrong")] if is_wrong else []

    async def judge(self, item: Item[pb.RegexVerifier]) -> Outcome:
        self.calls += 1
        return OUTCOMES[int(item.parameters.pattern)]


def make() -> tuple[CompositeVerifier, SetVerifier]:
    inner = SetVerifier()
    scorer = Scorer(0, 100)
    scorer.verifiers[inner.name] = inner
    scorer.verifiers["exact"] = ExactVerifier()
    return CompositeVerifier(scorer), inner


def item(*parts: pb.CompositePart, response: str = "r") -> Item[pb.CompositeVerifier]:
    return Item("i", response, "", pb.CompositeVerifier(parts=parts))


def part(name: str, outcome: Outcome, weight: float = 1.0, gate: bool = False) -> pb.CompositePart:
    OUTCOMES.append(outcome)
    spec = pb.VerifierSpec(regex=pb.RegexVerifier(pattern=str(len(OUTCOMES) - 1)))
    return pb.CompositePart(name=name, verifier=spec, weight=weight, gate=gate)


def exact_part(name: str, reference: str) -> pb.CompositePart:
    spec = pb.VerifierSpec(exact=pb.ExactVerifier(reference=reference))
    return pb.CompositePart(name=name, verifier=spec, weight=1.0)


@pytest.mark.parametrize(
    ("parts", "verdict", "reward"),
    [
        ([part("a", CORRECT), part("b", CORRECT)], Verdict.CORRECT, 1.0),
        ([part("a", CORRECT, 3), part("b", WRONG, 1)], Verdict.WRONG, 0.75),
        ([part("a", PARTIAL, 1), part("b", CORRECT, 3)], Verdict.WRONG, 0.875),
        ([part("a", CORRECT, 1), part("b", WRONG, 0)], Verdict.CORRECT, 1.0),
        ([part("a", WRONG, 0, True), part("b", CORRECT)], Verdict.WRONG, 0.0),
        ([part("a", CORRECT, 0, True), part("b", CORRECT)], Verdict.CORRECT, 1.0),
        ([part("a", UNGRADABLE, 1, True), part("b", CORRECT)], Verdict.WRONG, 0.0),
        ([part("a", UNGRADABLE), part("b", UNGRADABLE)], Verdict.UNGRADABLE, 0.0),
        ([part("a", UNGRADABLE), part("b", CORRECT)], Verdict.WRONG, 0.5),
        ([part("a", FAILED), part("b", CORRECT)], Verdict.FAILED, None),
        ([part("a", FAILED, 0, True), part("b", CORRECT)], Verdict.FAILED, None),
        # Without a share in the reward it is only reported, whatever becomes of it.
        ([part("a", FAILED, 0), part("b", CORRECT)], Verdict.CORRECT, 1.0),
        ([part("a", FAILED, 0), part("b", WRONG)], Verdict.WRONG, 0.0),
        ([part("a", FAILED, 0), part("b", UNGRADABLE)], Verdict.UNGRADABLE, 0.0),
        ([part("a", FAILED), part("b", FAILED, 0)], Verdict.FAILED, None),
        ([part("a", FAILED), part("b", WRONG, 0, True)], Verdict.WRONG, 0.0),
        ([part("a", FAILED, 1, True), part("b", WRONG, 1, True)], Verdict.WRONG, 0.0),
        ([part("a", FAILED, 1, True), part("b", WRONG)], Verdict.FAILED, None),
    ],
)
async def test_the_whole_follows_from_its_parts(
    parts: list[pb.CompositePart], verdict: Verdict, reward: float | None
) -> None:
    composite, _ = make()
    outcome = await composite.judge(item(*parts))
    assert (outcome.verdict, outcome.reward) == (verdict, reward)
    if verdict is Verdict.FAILED:
        assert (outcome.retryable, outcome.retry_after_s) == (True, 3.0)
        assert "part a: nobody knows" in outcome.reason


async def test_parts_are_reported_and_those_behind_a_closed_gate_are_not_judged() -> None:
    composite, inner = make()
    outcome = await composite.judge(item(part("a", PARTIAL), part("b", CORRECT)))
    assert [(name, p.verdict, p.reward, p.reason) for name, p in outcome.parts.items()] == [
        ("a", Verdict.WRONG, 0.5, "half of it"),
        ("b", Verdict.CORRECT, 1.0, ""),
    ]
    assert "part a: half of it" in outcome.reason
    inner.calls = 0
    outcome = await composite.judge(item(part("a", CORRECT), part("gate", WRONG, 0, True)))
    assert list(outcome.parts) == ["gate"]
    assert outcome.reason == "gate gate: not it"
    assert inner.calls == 1


async def test_a_part_that_failed_and_is_only_reported_has_no_say_and_is_reported_without_a_reward() -> None:
    composite, _ = make()
    outcome = await composite.judge(item(part("a", CORRECT), part("b", FAILED, 0)))
    assert [(name, p.verdict, p.reward, p.reason) for name, p in outcome.parts.items()] == [
        ("a", Verdict.CORRECT, 1.0, ""),
        ("b", Verdict.FAILED, None, "nobody knows"),
    ]
    assert outcome.reason == ""
    whole = await composite.judge(item(part("a", FAILED), part("b", FAILED, 0)))
    assert whole.reason == "part a: nobody knows"


async def test_asking_again_helps_when_every_failure_may_pass() -> None:
    composite, _ = make()
    hint = Outcome.failed("busy", retryable=True, retry_after_s=7.0)
    outcome = await composite.judge(item(part("a", FAILED), part("b", hint)))
    assert (outcome.retryable, outcome.retry_after_s) == (True, 7.0)
    for_good = Outcome.failed("never", retryable=False)
    outcome = await composite.judge(item(part("a", FAILED), part("b", for_good)))
    assert (outcome.retryable, outcome.retry_after_s) == (False, None)
    assert outcome.reason == "part a: nobody knows; part b: never"
    # What is only reported asks for nothing.
    outcome = await composite.judge(item(part("a", FAILED), part("b", for_good, 0)))
    assert (outcome.retryable, outcome.retry_after_s) == (True, 3.0)


async def test_a_part_that_crashes_makes_the_whole_failed() -> None:
    composite, _ = make()
    spec = pb.VerifierSpec(regex=pb.RegexVerifier(pattern="no number"))
    broken = pb.CompositePart(name="a", verifier=spec, weight=1.0)
    outcome = await composite.judge(item(broken))
    assert (outcome.verdict, outcome.reward, outcome.retryable) == (Verdict.FAILED, None, False)


async def test_agreement_is_counted_by_pair() -> None:
    def count(result: str) -> float:
        labels = {"verifier": "exact", "other": "regex", "result": result}
        return REGISTRY.get_sample_value("perigee_reward_agreements_total", labels) or 0.0

    composite, _ = make()
    before = count("agree"), count("disagree")
    exact = exact_part("e", "r")
    await composite.judge(item(exact, part("s", CORRECT)))
    await composite.judge(item(exact, part("s", WRONG)))
    await composite.judge(item(exact, part("s", FAILED)))
    assert (count("agree"), count("disagree")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        ([], ["composite.parts"]),
        ([part("a", CORRECT)] * 2, ["composite.parts[1].name"]),
        ([part("", CORRECT)], ["composite.parts[0].name"]),
        ([part("a", CORRECT, -1)], ["composite.parts[0].weight"]),
        ([part("a", CORRECT, float("nan"))], ["composite.parts[0].weight"]),
        ([part("a", CORRECT, 0)], ["composite.parts"]),
        ([pb.CompositePart(name="a", weight=1)], ["composite.parts[0].verifier"]),
        ([part("a", UNGRADABLE)], ["composite.parts[0].verifier.regex.pattern"]),
        ([exact_part("a", "")], ["composite.parts[0].verifier.exact.reference"]),
        ([part(str(i), CORRECT) for i in range(17)], ["composite.parts"]),
    ],
)
def test_wrong_parts_are_named(parts: list[Any], fields: list[str]) -> None:
    composite, _ = make()
    assert [violation.field for violation in composite.find_violations(pb.CompositeVerifier(parts=parts))] == fields
