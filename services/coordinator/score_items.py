"""A response with its prompt's ground truth, as the reward service takes it."""

from __future__ import annotations

import json

from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2
from services.coordinator.prompts import CodeLimits, CodeLine, FunctionTest, MathLine, Prompt, StdioTest


def make_score_item(item_id: str, prompt: Prompt, response: str) -> pb.ScoreItem:
    """The item that asks for a verdict on a response."""
    line = prompt.line
    item = pb.ScoreItem(id=item_id, prompt=line.prompt, response=response, answer_marker=line.answer_marker)
    if isinstance(line, MathLine):
        item.math.reference = line.answer
    else:
        _fill_code(item.code, line)
    return item


def _fill_code(verifier: pb.CodeVerifier, line: CodeLine) -> None:
    verifier.language = line.language
    verifier.function_name = line.function
    verifier.partial_credit = line.partial_credit
    _fill_limits(verifier.limits, line.limits)
    for test in line.tests:
        verifier.tests.append(_test_case(test))


def _test_case(test: FunctionTest | StdioTest) -> sandbox_pb2.TestCase:
    if isinstance(test, StdioTest):
        stdio = sandbox_pb2.StdioTest(stdin=test.stdin.encode(), expected_stdout=test.expected_stdout.encode())
        return sandbox_pb2.TestCase(stdio=stdio)
    function = sandbox_pb2.FunctionTest(
        arguments_json=json.dumps(test.arguments), expected_json=json.dumps(test.expected)
    )
    return sandbox_pb2.TestCase(function=function)


def _fill_limits(limits: sandbox_pb2.Limits, line: CodeLimits) -> None:
    for name, value in line.model_dump(exclude_none=True).items():
        setattr(limits, name, value)
