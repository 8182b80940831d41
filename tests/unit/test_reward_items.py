"""Items to score from JSON objects: both forms, and every wrong field named."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from perigee.json_codec import write_message
from perigee.reward.items import read_item, read_prompt_line
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2
from tests.fixtures.messages import messages_of


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
            {"name": "a", "weight": "heavy", "verifier": {"math": {"reference": [4]}}},
            {"verifier": {"math": {}, "exact": {}}, "gate": 1, "wieght": 1},
        ]
    }
    assert refused(id=7, verifier={"composite": composite}) == {
        "id": "must be a string, got a number",
        "verifier.composite.parts[0].weight": "must be a number, got a string",
        "verifier.composite.parts[0].verifier.math.reference": "must be a string, got an array",
        "verifier.composite.parts[1].verifier.exact": "must not be given beside math: only one of them may be set",
        "verifier.composite.parts[1].gate": "must be true or false, got a number",
        "verifier.composite.parts[1].wieght": "unknown key; did you mean weight?",
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
        ({"verifier": {"math": {"alternatives": "4"}}}, "verifier.math.alternatives", "must be an array"),
        ({"verifier": {"judge": {"votes": 1.5}}}, "verifier.judge.votes", "must be an integer, got a number"),
        ({"verifier": {"judge": {"votes": -1}}}, "verifier.judge.votes", "from 0 to 4294967295"),
        (
            {"verifier": {"code": {"tests": [{"stdio": {"stdin_base64": "1 2\n"}}]}}},
            "verifier.code.tests[0].stdio.stdin_base64",
            "is not base64",
        ),
        (
            {"verifier": {"code": {"tests": [{"stdio": {"stdin": "", "stdin_base64": ""}}]}}},
            "verifier.code.tests[0].stdio.stdin_base64",
            "must not be given beside stdin",
        ),
        (
            {"verifier": {"math": {"reference_base64": ""}}},
            "verifier.math.reference_base64",
            "unknown key; did you mean reference?",
        ),
        (
            {"verifier": {"code": {"checker": {"comparison": "SAME"}}}},
            "verifier.code.checker.comparison",
            "'SAME' is unknown; known: unspecified, exact, tokens",
        ),
        ({"verifier": "exact", "images": "a.png"}, "images", "must be an array"),
        ({"verifier": "exact", "images": [{"uri": "a"}]}, "images[0].uri", "unknown key; did you mean url?"),
        ({"verifier": "exact", "response": "\ud800"}, "response", "lone surrogate"),
        ({"verifier": "exact", "response": None}, "response", "is required"),
        ({"verifier": {"math": None}}, "verifier.math", "must be an object, got null"),
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


VERIFIERS = pb.ScoreItem.DESCRIPTOR.oneofs_by_name["verifier"].fields


@pytest.mark.parametrize("verifier", [field.name for field in VERIFIERS])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_what_is_written_as_json_reads_back(data: st.DataObject, verifier: str) -> None:
    message_type = pb.ScoreItem.DESCRIPTOR.fields_by_name[verifier].message_type
    assert message_type is not None
    item = pb.ScoreItem(id="a", response="r", **{verifier: data.draw(messages_of(message_type))})
    written = write_message(item)
    parameters = written.pop(verifier)
    assert read_item(written | {"verifier": {verifier: parameters}}, "line-1") == item


LINES = [
    {"verifier": "math", "answer": "4", "alternatives": ["IV"]},
    {
        "verifier": "code",
        "function": "f",
        "tests": [{"arguments": [1, None], "expected": "ü"}],
        "limits": {"cpu_ms": 9},
    },
    {"verifier": "code", "tests": [{"stdin": "1\n", "expected_stdout": "2\n"}], "partial_credit": True},
    {"verifier": "code", "function": "f", "tests": [{"code": "assert f(1) == 2"}], "setup_code": "import math"},
    {"verifier": "choice", "answer": "A,C", "options": ["x", "y", "z"]},
    {"verifier": "short_answer", "answers": ["Paris", "Lutetia"]},
    {"verifier": "exact", "answer": "4"},
    {"verifier": "regex", "pattern": "[0-9]+", "ignore_case": True, "search_response": True},
    {"verifier": "json", "json_schema": {"type": "object"}, "expected": {"a": [1, None]}},
    {"verifier": "json", "expected": None},
    {"verifier": "judge", "answer": "4", "judge": "large", "votes": 3, "rubric": "short"},
    {"verifier": "value_head", "answer": "4", "threshold": 0.25},
    {
        "verifier": "composite",
        "parts": [
            {"name": "form", "gate": True, "weight": 0, "judged_by": {"verifier": "regex", "pattern": "4"}},
            {"name": "value", "judged_by": {"verifier": "math", "answer": "4"}},
            {"name": "words", "judged_by": {"verifier": "short_answer", "answers": ["four"]}},
            {"name": "json", "judged_by": {"verifier": "json", "json_schema": {"type": "number"}}},
        ],
    },
]


# The same ground truths with the messages' own names.
IN_FULL = [
    {"math": {"reference": "4", "alternatives": ["IV"]}},
    {
        "code": {
            "language": "python",
            "function_name": "f",
            "tests": [{"function": {"arguments_json": "[1, null]", "expected_json": '"\\u00fc"'}}],
            "limits": {"cpu_ms": 9},
        }
    },
    {
        "code": {
            "language": "python",
            "tests": [{"stdio": {"stdin": "1\n", "expected_stdout": "2\n"}}],
            "partial_credit": True,
        }
    },
    {
        "code": {
            "language": "python",
            "function_name": "f",
            "tests": [{"code": {"code": "assert f(1) == 2"}}],
            "setup_code": "import math",
        }
    },
    {"choice": {"reference": "A,C", "options": ["x", "y", "z"]}},
    {"short_answer": {"references": ["Paris", "Lutetia"]}},
    {"exact": {"reference": "4"}},
    {"regex": {"pattern": "[0-9]+", "ignore_case": True, "search_response": True}},
    {"json": {"schema_json": '{"type": "object"}', "expected_json": '{"a": [1, null]}'}},
    {"json": {"expected_json": "null"}},
    {"judge": {"reference": "4", "judge": "large", "votes": 3, "rubric": "short"}},
    {"value_head": {"reference": "4", "threshold": 0.25}},
    {
        "composite": {
            "parts": [
                {"name": "form", "gate": True, "weight": 0, "verifier": {"regex": {"pattern": "4"}}},
                {"name": "value", "weight": 1, "verifier": {"math": {"reference": "4"}}},
                {"name": "words", "weight": 1, "verifier": {"short_answer": {"references": ["four"]}}},
                {"name": "json", "weight": 1, "verifier": {"json": {"schema_json": '{"type": "number"}'}}},
            ]
        }
    },
]


@pytest.mark.parametrize(
    ("line", "full"), zip(LINES, IN_FULL, strict=True), ids=[str(line["verifier"]) for line in LINES]
)
def test_short_names_and_the_message_in_full_are_the_same_item(line: dict[str, Any], full: dict[str, Any]) -> None:
    common = {"id": "a", "prompt": "2+2=", "answer_marker": "#"}
    item = read(**common, **line)
    assert item == read(**common, verifier=full)
    assert item == read(**common, verifier={line["verifier"]: {k: v for k, v in line.items() if k != "verifier"}})


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["verifier"])
def test_a_line_of_a_prompt_file_is_the_item_of_its_responses(line: dict[str, Any]) -> None:
    whole = {"id": "a", "prompt": "2+2=", "answer_marker": "#", **line}
    prompt = read_prompt_line({**whole, "domain": "sums", "difficulty": 2}, "prompts.jsonl:1")
    assert (prompt.id, prompt.domain, prompt.difficulty) == ("a", "sums", 2.0)
    item = pb.ScoreItem()
    item.CopyFrom(prompt.item)
    item.id, item.response = "a", "#4"
    assert item == read(**whole)


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({"verifier": "math", "answer": "4", "reference": "5"}, "answer", "unknown key"),
        ({"verifier": "short_answer", "answer": "4", "answers": ["5"]}, "answers", "unknown key"),
        ({"verifier": "code", "tests": [{"stdin": "", "arguments": []}]}, "tests[0].stdin", "unknown key"),
    ],
)
def test_a_field_under_two_names_is_refused(values: dict[str, Any], field: str, part: str) -> None:
    assert part in refused(**values)[field]


def test_a_test_may_have_points_beside_its_short_form() -> None:
    item = read(verifier="code", tests=[{"stdin": "1", "expected_stdout": "2", "points": 3, "name": "first"}])
    stdio = sandbox_pb2.StdioTest(stdin=b"1", expected_stdout=b"2")
    assert list(item.code.tests) == [sandbox_pb2.TestCase(stdio=stdio, points=3, name="first")]
