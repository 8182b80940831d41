"""Items to score from JSON objects: both forms, and every wrong field named."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from perigee.reward.items import read_item
from perigee.reward.json_messages import fill_message
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2


def read(**values: Any) -> pb.ScoreItem:
    return read_item({"response": "#4", **values}, "line-1", ignored=("label",))


def refused(**values: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        read(**values)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_both_forms_are_the_same_item() -> None:
    expected = pb.ScoreItem(
        id="a", prompt="2+2", response="#4", answer_marker="#", math=pb.MathVerifier(reference="4", alternatives=["IV"])
    )
    common = {"id": "a", "prompt": "2+2", "answer_marker": "#"}
    assert read(**common, verifier={"math": {"reference": "4", "alternatives": ["IV"]}}) == expected
    assert read(**common, verifier="math", reference="4", alternatives=["IV"]) == expected
    assert read(**common, verifier="math", answer="4", alternatives=["IV"]) == expected


def test_an_item_without_an_id_is_named_after_its_place() -> None:
    assert read(verifier="exact", reference="x").id == "line-1"


def test_answer_stands_for_the_only_reference() -> None:
    assert read(verifier="short_answer", answer="Paris").short_answer.references == ["Paris"]


def test_a_line_of_a_recipe_needs_only_its_response() -> None:
    item = read(
        verifier="code",
        language="python",
        function="f",
        tests=[{"arguments": [1, "x"], "expected": {"a": None}}, {"stdin": "1 2\n", "expected_stdout": "ü\n"}],
        limits={"wall_ms": 500, "cpu_ms": None},
        partial_credit=True,
    )
    assert item.code == pb.CodeVerifier(
        language="python",
        function_name="f",
        tests=[
            sandbox_pb2.TestCase(
                function=sandbox_pb2.FunctionTest(arguments_json='[1, "x"]', expected_json='{"a": null}')
            ),
            sandbox_pb2.TestCase(stdio=sandbox_pb2.StdioTest(stdin=b"1 2\n", expected_stdout="ü\n".encode())),
        ],
        limits=sandbox_pb2.Limits(wall_ms=500),
        partial_credit=True,
    )


def test_images_are_urls_or_data() -> None:
    data = base64.b64encode(b"\x89PNG").decode()
    item = read(verifier="judge", reference="a cat", images=["https://example.org/a.png", {"data_base64": data}])
    assert list(item.images) == [pb.Image(url="https://example.org/a.png"), pb.Image(data=b"\x89PNG")]


def test_every_wrong_field_is_named() -> None:
    composite = {
        "parts": [
            {"name": "a", "weight": "heavy", "verifier": {"math": {"reference": 4}}},
            {"verifier": {"math": {}, "exact": {}}, "gate": 1, "wieght": 1},
        ]
    }
    assert refused(id=7, verifier={"composite": composite}) == {
        "id": "must be a string, got 7",
        "verifier.composite.parts[0].weight": "must be a number, got 'heavy'",
        "verifier.composite.parts[0].verifier.math.reference": "must be a string, got 4",
        "verifier.composite.parts[1].verifier.exact": "cannot stand beside math",
        "verifier.composite.parts[1].gate": "must be true or false, got 1",
        "verifier.composite.parts[1].wieght": "unknown field; did you mean weight?",
    }


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({}, "verifier", "is required"),
        ({"verifier": "maths"}, "verifier", "must be one of math, code"),
        ({"verifier": {"maths": {}}}, "verifier.maths", "is no verifier"),
        ({"verifier": {"math": {}, "exact": {}}}, "verifier", "one key"),
        ({"verifier": "math", "refrence": "4"}, "refrence", "did you mean reference?"),
        ({"verifier": {"math": {"reference": "4"}}, "answer_maker": "#"}, "answer_maker", "did you mean answer_marker"),
        ({"verifier": {"math": "4"}}, "verifier.math", "must be an object"),
        ({"verifier": {"math": {"alternatives": "4"}}}, "verifier.math.alternatives", "must be a list"),
        ({"verifier": {"judge": {"votes": 1.5}}}, "verifier.judge.votes", "whole number"),
        ({"verifier": {"judge": {"votes": -1}}}, "verifier.judge.votes", "from 0 to 4294967295"),
        (
            {"verifier": {"code": {"tests": [{"stdio": {"stdin_base64": "1 2\n"}}]}}},
            "verifier.code.tests[0].stdio.stdin_base64",
            "must be base64",
        ),
        (
            {"verifier": {"code": {"tests": [{"stdio": {"stdin": "", "stdin_base64": ""}}]}}},
            "verifier.code.tests[0].stdio.stdin_base64",
            "cannot stand beside stdin",
        ),
        (
            {"verifier": {"math": {"reference_base64": ""}}},
            "verifier.math.reference_base64",
            "unknown field; did you mean reference?",
        ),
        (
            {"verifier": {"code": {"checker": {"comparison": "SAME"}}}},
            "verifier.code.checker.comparison",
            "must be one of unspecified, exact, tokens",
        ),
        ({"verifier": "exact", "images": "a.png"}, "images", "must be a list"),
    ],
)
def test_a_wrong_field_is_named(values: dict[str, Any], field: str, part: str) -> None:
    assert part in refused(**values)[field]


def test_a_missing_response_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="response: is required"):
        read_item({"verifier": "exact", "reference": "x"}, "1")


def test_a_verifier_in_full_is_as_over_http() -> None:
    tests = [
        {"stdio": {"stdin": "1 2\n", "expected_stdout_base64": "/w=="}, "points": 2},
        {"function": {"arguments_json": "[1]", "expected_json": "1"}, "name": None},
    ]
    for comparison in ("unordered_lines", "UNORDERED_LINES", "COMPARISON_UNORDERED_LINES"):
        item = read(verifier={"code": {"language": "python", "tests": tests, "checker": {"comparison": comparison}}})
        assert item.code == pb.CodeVerifier(
            language="python",
            tests=[
                sandbox_pb2.TestCase(stdio=sandbox_pb2.StdioTest(stdin=b"1 2\n", expected_stdout=b"\xff"), points=2.0),
                sandbox_pb2.TestCase(function=sandbox_pb2.FunctionTest(arguments_json="[1]", expected_json="1")),
            ],
            checker=sandbox_pb2.Checker(comparison=sandbox_pb2.COMPARISON_UNORDERED_LINES),
        )


texts = st.text(max_size=8)
codes = st.builds(
    lambda stdin, args, points, wall, memory: pb.CodeVerifier(
        tests=[sandbox_pb2.TestCase(stdio=sandbox_pb2.StdioTest(stdin=stdin, args=args), points=points)],
        limits=sandbox_pb2.Limits(wall_ms=wall, memory_bytes=memory),
        checker=sandbox_pb2.Checker(comparison=sandbox_pb2.COMPARISON_TOKENS),
    ),
    st.binary(max_size=8), st.lists(texts, max_size=2), st.floats(allow_nan=False, allow_infinity=False),
    st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(codes, st.lists(texts, max_size=3), st.floats(0, 1))
def test_values_read_back(code: pb.CodeVerifier, references: list[str], threshold: float) -> None:
    for verifier in (
        {"code": code},
        {"short_answer": pb.ShortAnswerVerifier(references=references)},
        {"value_head": pb.ValueHeadVerifier(threshold=threshold)},
    ):
        item = pb.ScoreItem(id="a", response="r", **verifier)  # type: ignore[arg-type]
        found = pb.ScoreItem()
        assert fill_message(found, as_over_http(item)) == []
        assert found == item


def as_over_http(message: Message) -> dict[str, Any]:
    """The message as JSON values, with all bytes in base64."""
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        elements = list(value) if field.is_repeated else [value]
        name = field.name
        if field.message_type is not None:
            elements = [as_over_http(element) for element in elements]
        elif field.enum_type is not None:
            elements = [field.enum_type.values_by_number[element].name for element in elements]
        elif field.type == field.TYPE_BYTES:
            name, elements = f"{name}_base64", [base64.b64encode(element).decode() for element in elements]
        values[name] = elements if field.is_repeated else elements[0]
    return values
