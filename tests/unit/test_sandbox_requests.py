"""Requests become jobs, or a violation for each wrong field."""

from __future__ import annotations

import pytest

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.config import LimitsConfig, SandboxConfig
from services.sandbox.jobs import FunctionTest, StdioTest
from services.sandbox.requests import read_program, read_submission

CONFIG = SandboxConfig(max_source_bytes=100, max_tests=3, default_limits=LimitsConfig(wall_ms=123))
STDIO = pb.TestCase(stdio=pb.StdioTest(stdin=b"1", expected_stdout=b"2"))
FUNCTION = pb.TestCase(function=pb.FunctionTest(arguments_json="[1, null]", expected_json="true"))


def violated(request: pb.JudgeRequest | pb.ExecuteRequest) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as error:
        read_submission(request, CONFIG) if isinstance(request, pb.JudgeRequest) else read_program(request, CONFIG)
    return {violation.field: violation.description for violation in error.value.violations}


def judge_request(*tests: pb.TestCase, function_name: str = "", source: bytes = b"x") -> pb.JudgeRequest:
    return pb.JudgeRequest(language="python", source=source, tests=tests, function_name=function_name)


def test_limits_are_the_request_s_or_the_default() -> None:
    request = pb.ExecuteRequest(language="python", source=b"x", limits=pb.Limits(cpu_ms=7))
    limits = read_program(request, CONFIG).limits
    assert (limits.cpu_ms, limits.wall_ms) == (7, 123)


@pytest.mark.parametrize("name", ["wall_ms", "cpu_ms", "memory_bytes", "processes", "file_bytes", "output_bytes"])
def test_each_limit_has_a_maximum_and_a_minimum(name: str) -> None:
    for value in (getattr(CONFIG.maximum_limits, name) + 1, 0):
        limits = pb.Limits(**{name: value})
        assert set(violated(pb.ExecuteRequest(language="python", source=b"x", limits=limits))) == {f"limits.{name}"}


def test_all_violations_are_told_at_once() -> None:
    fields = violated(pb.JudgeRequest(language="pl/1", source=b"x" * 101))
    assert set(fields) == {"language", "source", "tests"}
    assert "python" in fields["language"]


def test_arguments_without_nul() -> None:
    assert set(violated(pb.ExecuteRequest(language="python", source=b"x", args=["a", "b\0"]))) == {"args[1]"}


def test_tests_of_one_kind() -> None:
    assert set(violated(judge_request(STDIO, FUNCTION, function_name="f"))) == {"tests"}
    assert set(violated(judge_request(pb.TestCase()))) == {"tests"}
    assert set(violated(judge_request(*[STDIO] * 4))) == {"tests"}
    assert set(violated(judge_request(STDIO, function_name="f"))) == {"function_name"}
    assert set(violated(judge_request(FUNCTION))) == {"function_name"}


@pytest.mark.parametrize(
    ("arguments", "expected", "fields"),
    [
        ("{", "1", {"tests[0].function.arguments_json"}),
        ("3", "1", {"tests[0].function.arguments_json"}),
        ("null", "1", {"tests[0].function.arguments_json"}),
        ("[3]", "", {"tests[0].function.expected_json"}),
        ("[" * 100_000, "1", {"tests[0].function.arguments_json"}),
    ],
)
def test_function_tests_are_json(arguments: str, expected: str, fields: set[str]) -> None:
    test = pb.TestCase(function=pb.FunctionTest(arguments_json=arguments, expected_json=expected))
    assert set(violated(judge_request(test, function_name="f"))) == fields


def test_what_a_submission_becomes() -> None:
    submission = read_submission(judge_request(FUNCTION, function_name="f"), CONFIG)
    assert submission.tests == [FunctionTest(b"[1, null]", True)]
    assert read_submission(judge_request(STDIO), CONFIG).tests == [StdioTest(b"1", b"2")]
