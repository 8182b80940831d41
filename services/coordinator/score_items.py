"""A response with its prompt's ground truth, as the reward service takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2
from services.coordinator.prompts import Prompt
from services.coordinator.verifier_specs import (
    ChoiceSpec,
    CodeLimits,
    CodeSpec,
    CodeTest,
    CompositeSpec,
    ExactSpec,
    FunctionTest,
    JsonSpec,
    JudgeSpec,
    MathSpec,
    RegexSpec,
    ShortAnswerSpec,
    StdioTest,
    ValueHeadSpec,
)


def make_score_item(item_id: str, prompt: Prompt, response: str) -> pb.ScoreItem:
    """The item that asks for a verdict on a response."""
    line = prompt.line
    item = pb.ScoreItem(id=item_id, prompt=line.prompt, response=response, answer_marker=line.answer_marker)
    _fill(item, line)
    return item


def _fill(message: pb.ScoreItem | pb.VerifierSpec, spec: Any) -> None:
    """Sets the verifier that the spec names."""
    for spec_class, make in _MAKERS.items():
        if isinstance(spec, spec_class):
            getattr(message, spec.verifier).CopyFrom(make(spec))
            return
    raise TypeError(f"{type(spec).__name__} names no verifier")


def _make_code(spec: CodeSpec) -> pb.CodeVerifier:
    verifier = pb.CodeVerifier(
        language=spec.language,
        function_name=spec.function,
        partial_credit=spec.partial_credit,
        setup_code=spec.setup_code,
        tests=map(_test_case, spec.tests),
    )
    _fill_limits(verifier.limits, spec.limits)
    return verifier


def _test_case(test: FunctionTest | StdioTest | CodeTest) -> sandbox_pb2.TestCase:
    if isinstance(test, StdioTest):
        stdio = sandbox_pb2.StdioTest(stdin=test.stdin.encode(), expected_stdout=test.expected_stdout.encode())
        return sandbox_pb2.TestCase(stdio=stdio)
    if isinstance(test, CodeTest):
        return sandbox_pb2.TestCase(code=sandbox_pb2.CodeTest(code=test.code))
    function = sandbox_pb2.FunctionTest(
        arguments_json=json.dumps(test.arguments), expected_json=json.dumps(test.expected)
    )
    return sandbox_pb2.TestCase(function=function)


def _fill_limits(limits: sandbox_pb2.Limits, line: CodeLimits) -> None:
    for name, value in line.model_dump(exclude_none=True).items():
        setattr(limits, name, value)


def _make_json(spec: JsonSpec) -> pb.JsonVerifier:
    expects = "expected" in spec.model_fields_set
    return pb.JsonVerifier(
        schema_json="" if spec.json_schema is None else json.dumps(spec.json_schema),
        expected_json=json.dumps(spec.expected) if expects else None,
    )


def _make_composite(spec: CompositeSpec) -> pb.CompositeVerifier:
    composite = pb.CompositeVerifier()
    for part in spec.parts:
        message = composite.parts.add(name=part.name, weight=part.weight, gate=part.gate)
        _fill(message.verifier, part.judged_by)
    return composite


_MAKERS: dict[type[Any], Callable[[Any], Any]] = {
    MathSpec: lambda spec: pb.MathVerifier(reference=spec.answer, alternatives=spec.alternatives),
    CodeSpec: _make_code,
    ChoiceSpec: lambda spec: pb.ChoiceVerifier(reference=spec.answer, options=spec.options),
    ShortAnswerSpec: lambda spec: pb.ShortAnswerVerifier(references=spec.answers),
    ExactSpec: lambda spec: pb.ExactVerifier(reference=spec.answer),
    RegexSpec: lambda spec: pb.RegexVerifier(
        pattern=spec.pattern, ignore_case=spec.ignore_case, search_response=spec.search_response
    ),
    JsonSpec: _make_json,
    JudgeSpec: lambda spec: pb.JudgeVerifier(
        reference=spec.answer, judge=spec.judge, votes=spec.votes, rubric=spec.rubric
    ),
    ValueHeadSpec: lambda spec: pb.ValueHeadVerifier(reference=spec.answer, threshold=spec.threshold),
    CompositeSpec: _make_composite,
}
