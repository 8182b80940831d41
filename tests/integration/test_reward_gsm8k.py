"""GSM8K's own answers: each is right for itself, and wrong for its neighbour."""

from __future__ import annotations

import json

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_WRONG
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from tests.fixtures.data import find_data
from tests.fixtures.reward import score

MARKER = "#### "


def read_solutions() -> list[str]:
    lines = find_data("gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def make_item(name: str, response: str, reference: str, marker: str = "") -> pb.ScoreItem:
    prose = pb.ANSWER_EXTRACTION_PROSE if "bare" in name or "neighbour" in name else pb.ANSWER_EXTRACTION_UNSPECIFIED
    math = pb.MathVerifier(reference=reference, extraction=prose)
    return pb.ScoreItem(id=name, response=response, answer_marker=marker, math=math)


async def test_every_answer_is_right_for_itself_and_wrong_for_its_neighbour(reward: RewardClient) -> None:
    solutions = read_solutions()
    answers = [solution.rpartition(MARKER)[2] for solution in solutions]
    items: list[pb.ScoreItem] = []
    expected: dict[str, int] = {}
    for number, (solution, answer) in enumerate(zip(solutions, answers, strict=True)):
        neighbour = answers[number - 1]
        is_same = neighbour.replace(",", "") == answer.replace(",", "")
        forms = {
            "bare": make_item(f"bare-{number}", answer, answer),
            "solution": make_item(f"solution-{number}", solution, answer, MARKER),
            "unmarked": make_item(f"unmarked-{number}", solution, answer),
            "neighbour": make_item(f"neighbour-{number}", neighbour, answer),
        }
        items += forms.values()
        expected |= {item.id: VERDICT_CORRECT for form, item in forms.items() if form != "neighbour" or is_same}
        expected |= {item.id: VERDICT_WRONG for form, item in forms.items() if form == "neighbour" and not is_same}
    assert len(solutions) == 1319
    outcomes = {outcome.id: outcome.verdict for outcome in await score(reward, items)}
    assert {name: verdict for name, verdict in outcomes.items() if verdict != expected[name]} == {}
    assert outcomes.keys() == expected.keys()
