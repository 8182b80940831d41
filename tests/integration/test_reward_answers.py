"""Answers of other people's models and solutions, which no rule was made for: bars by source.

The files are no part of the project; each bar is what a source's own wrong labels leave.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from tests.fixtures.data import find_data
from tests.fixtures.reward import score


@dataclass(frozen=True)
class Case:
    """A response, its label and its source."""

    item: pb.ScoreItem
    is_correct: bool
    source: str


@dataclass(frozen=True)
class Bar:
    """How many of a source's right responses may be missed, and how many wrong ones may pass."""

    missed: float = 0.0
    passed: int = 0


# Right answers that are missed by their label: mr-math has two, of 80; wrong ones that pass: qwen2.5 has a time of day
# that is labelled wrong three times, for its place in a \text.
MARKED = {
    "abel-gsm8k": Bar(0.001),
    "qwen2.5-math-cot": Bar(0.001, 3),
    "math-solutions-boxed": Bar(0.0012),
    "mr-math": Bar(0.025),
    "box-then-said": Bar(0.001),
    "college-math-self": Bar(0.003),
    "bigmath-self": Bar(0.003),
    "math-negative": Bar(),
}


def read_cases(name: str, extraction: pb.AnswerExtraction.ValueType = pb.ANSWER_EXTRACTION_UNSPECIFIED) -> list[Case]:
    """Returns the cases of a file, each under an id of its own."""
    cases = []
    for number, line in enumerate(find_data(f"answers/{name}.jsonl").read_text(encoding="utf-8").splitlines()):
        fields = json.loads(line)
        reference = fields["verifier"]["math"]["reference"] if "verifier" in fields else fields["reference"]
        math = pb.MathVerifier(reference=reference, extraction=extraction)
        prompt = fields.get("prompt", fields.get("question", ""))
        item = pb.ScoreItem(id=str(number), prompt=prompt, response=fields["response"], math=math)
        label = fields["label"] if "label" in fields else fields["expected"] == "correct"
        cases.append(Case(item, label, fields.get("source", name)))
    return cases


async def count(client: RewardClient, cases: Sequence[Case]) -> Counter[str]:
    """Returns how many are right, missed, passed, and failed."""
    outcomes = {outcome.id: outcome for outcome in await score(client, [case.item for case in cases], 300)}
    counts: Counter[str] = Counter()
    for case in cases:
        outcome = outcomes[case.item.id]
        is_right = (outcome.verdict == VERDICT_CORRECT) == case.is_correct
        kind = "right" if is_right else "missed" if case.is_correct else "passed"
        counts["failed" if outcome.verdict == VERDICT_FAILED else kind] += 1
        if not is_right:
            print(f"{case.source} {kind}: {case.item.math.reference!r}, read as {outcome.extracted_answer!r}")
    return counts


@pytest.mark.parametrize("source", MARKED)
async def test_marked_answers_get_their_verdicts(reward: RewardClient, source: str) -> None:
    cases = [case for case in read_cases("dev") if case.source == source]
    counts = await count(reward, cases)
    assert counts["failed"] == 0
    assert counts["missed"] <= MARKED[source].missed * len(cases)
    assert counts["passed"] <= MARKED[source].passed


async def test_prose_is_read_where_it_is_asked_for_and_only_there(reward: RewardClient) -> None:
    cases = [case for case in read_cases("dev") if case.source == "math-solutions-unboxed"]
    strict = await count(reward, cases)
    assert strict["right"] <= 0.1 * len(cases)
    cases = [case for case in read_cases("dev", pb.ANSWER_EXTRACTION_PROSE) if case.source == "math-solutions-unboxed"]
    assert (await count(reward, cases))["right"] >= 0.85 * len(cases)


async def test_bugs_that_others_reported_are_none_here(reward: RewardClient) -> None:
    cases = read_cases("reports", pb.ANSWER_EXTRACTION_PROSE)
    counts = await count(reward, cases)
    assert counts["right"] >= len(cases) - 6


@pytest.mark.parametrize("extraction", [pb.ANSWER_EXTRACTION_UNSPECIFIED, pb.ANSWER_EXTRACTION_PROSE])
async def test_rewards_are_not_given_for_tricks(
    reward: RewardClient, extraction: pb.AnswerExtraction.ValueType
) -> None:
    counts = await count(reward, read_cases("adversarial", extraction))
    assert counts["passed"] <= 8
    assert counts["failed"] == 0
