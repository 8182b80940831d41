"""HumanEval through the service: its references are accepted, and the same with a wrong result are not."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.data import find_data

PROBLEMS = 164
ANOTHER_VALUE = """
{source}
_original = {name}
def {name}(*arguments, **keywords):
    return (_original(*arguments, **keywords), 'broken')
"""


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    with gzip.open(find_data("HumanEval.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file]


def make_request(problem: dict[str, str], template: str) -> pb.JudgeRequest:
    """A submission of the reference; the problem's own text, with its helpers, comes before the test."""
    name = problem["entry_point"]
    source = template.format(source=problem["prompt"] + problem["canonical_solution"], name=name)
    return pb.JudgeRequest(
        language="python",
        source=source.encode(),
        function_name=name,
        tests=[pb.TestCase(code=pb.CodeTest(code=problem["test"]), name=problem["task_id"])],
        setup_code=problem["prompt"],
    )


async def judge_all(client: SandboxClient, problems: list[dict[str, str]], template: str) -> Counter[str]:
    """How often each verdict was given."""
    batch = pb.JudgeBatchRequest(requests=[make_request(problem, template) for problem in problems])
    answers = [answer async for answer in client.judge_batch(batch, timeout_s=110)]
    assert sorted(answer.index for answer in answers) == list(range(PROBLEMS))
    return Counter(pb.TestVerdict.Name(answer.response.verdict) for answer in answers)


async def test_references_are_accepted(sandbox_address: str, problems: list[dict[str, str]]) -> None:
    async with SandboxClient.connect(sandbox_address) as client:
        assert await judge_all(client, problems, "{source}") == {"TEST_VERDICT_ACCEPTED": PROBLEMS}


async def test_references_with_another_result_are_not(sandbox_address: str, problems: list[dict[str, str]]) -> None:
    async with SandboxClient.connect(sandbox_address) as client:
        counts = await judge_all(client, problems, ANOTHER_VALUE)
    assert counts["TEST_VERDICT_WRONG_ANSWER"] + counts["TEST_VERDICT_RUNTIME_ERROR"] == PROBLEMS, counts
