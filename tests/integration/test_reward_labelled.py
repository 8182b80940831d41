"""How often each verifier says what a fair reader says, on responses that were written for these tests."""

from __future__ import annotations

import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from tests.fixtures.labelled import Labelled, read_labelled
from tests.fixtures.reward import score

# How much the math verifier must get right is asserted on other people's responses, see test_reward_answers.
LEAST_ACCURACY = {
    "math": 0.94,
    "prose": 0.75,
    "choice": 1.0,
    "short_answer": 1.0,
    "exact": 1.0,
    "regex": 1.0,
    "json": 1.0,
    "code": 1.0,
}
# The share of wrong responses that may be called correct.
MOST_UNDESERVED = {"math": 0.01, "prose": 0.05}
LEAST_ITEMS = {"math": 700, "prose": 300} | dict.fromkeys(
    ("choice", "short_answer", "exact", "regex", "json", "code"), 24
)
SET = read_labelled()


def name_of(labelled: Labelled) -> str:
    return "prose" if labelled.is_prose else labelled.verifier


def test_the_set_is_large_and_its_items_are_told_apart() -> None:
    assert len({labelled.item.id for labelled in SET}) == len(SET)
    for name, least in LEAST_ITEMS.items():
        labels = [labelled.is_correct for labelled in SET if name_of(labelled) == name]
        assert len(labels) >= least, name
        # A verifier that always says the same is found out.
        assert 0.25 <= sum(labels) / len(labels) <= 0.75, name


@pytest.mark.parametrize("name", [name for name in LEAST_ACCURACY if name != "code"])
async def test_verdicts_are_those_of_a_fair_reader(reward: RewardClient, name: str) -> None:
    await check_accuracy(reward, name)


async def test_programs_get_the_verdicts_of_a_fair_reader(coding_reward: RewardClient) -> None:
    await check_accuracy(coding_reward, "code")


async def check_accuracy(client: RewardClient, name: str) -> None:
    labelled = [each for each in SET if name_of(each) == name]
    outcomes = {outcome.id: outcome for outcome in await score(client, [each.item for each in labelled], 100)}
    assert len(outcomes) == len(labelled)
    assert [o.reason for o in outcomes.values() if o.verdict == VERDICT_FAILED] == []
    missed = [each for each in labelled if (outcomes[each.item.id].verdict == VERDICT_CORRECT) != each.is_correct]
    accuracy = 1 - len(missed) / len(labelled)
    print(f"\n{name}: {accuracy:.4f} of {len(labelled)} items")
    for each in missed:
        print(f"  {describe(each, outcomes[each.item.id])}")
    assert accuracy >= LEAST_ACCURACY[name]
    wrong = [each for each in labelled if not each.is_correct]
    undeserved = [each for each in missed if not each.is_correct]
    assert len(undeserved) <= MOST_UNDESERVED.get(name, 0.0) * len(wrong)


def describe(labelled: Labelled, outcome: pb.ScoreResponse) -> str:
    """What was missed, on one line."""
    label = "correct" if labelled.is_correct else "wrong"
    return f"{labelled.item.id} is {label}: {labelled.item.response!r}, read as {outcome.extracted_answer!r}"
