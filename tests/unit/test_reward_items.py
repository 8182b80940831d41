"""Items to score from JSON objects: both forms, and every wrong field named."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from google.protobuf import json_format
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
    item = read(verifier="judge", reference="a cat", images=["https://example.org/a.png", {"data": data}])
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
            {"verifier": {"code": {"tests": [{"stdio": {"stdin": "1 2\n"}}]}}},
            "verifier.code.tests[0].stdio.stdin",
            "base64",
        ),
        (
            {"verifier": {"code": {"checker": {"comparison": "SAME"}}}},
            "verifier.code.checker.comparison",
            "COMPARISON_EXACT",
        ),
        ({"verifier": "exact", "images": "a.png"}, "images", "must be a list"),
    ],
)
def test_a_wrong_field_is_named(values: dict[str, Any], field: str, part: str) -> None:
    assert part in refused(**values)[field]


def test_a_missing_response_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="response: is required"):
        read_item({"verifier": "exact", "reference": "x"}, "1")


texts = st.text(max_size=8)
tests = st.one_of(
    st.builds(
        lambda stdin, out, args: sandbox_pb2.TestCase(
            stdio=sandbox_pb2.StdioTest(stdin=stdin, expected_stdout=out, args=args)
        ),
        st.binary(max_size=8),
        st.binary(max_size=8),
        st.lists(texts, max_size=2),
    ),
    st.builds(lambda points: sandbox_pb2.TestCase(points=points), st.floats(allow_nan=False, allow_infinity=False)),
)
verifiers = st.one_of(
    st.builds(lambda tests, wall: {"code": pb.CodeVerifier(tests=tests, limits=sandbox_pb2.Limits(wall_ms=wall))},
              st.lists(tests, max_size=3), st.integers(0, (1 << 32) - 1)),
    st.builds(lambda memory: {"code": pb.CodeVerifier(limits=sandbox_pb2.Limits(memory_bytes=memory))},
              st.integers(0, (1 << 64) - 1)),
    st.builds(lambda values: {"short_answer": pb.ShortAnswerVerifier(references=values)}, st.lists(texts, max_size=3)),
    st.builds(lambda threshold: {"value_head": pb.ValueHeadVerifier(threshold=threshold)}, st.floats(0, 1)),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(verifiers)
def test_proto_json_reads_back(verifier: dict[str, Any]) -> None:
    [(name, parameters)] = verifier.items()
    item = pb.ScoreItem(id="a", response="r", **{name: parameters})
    values = json.loads(json_format.MessageToJson(item, preserving_proto_field_name=True))
    found = pb.ScoreItem()
    assert fill_message(found, values) == []
    assert found == item
