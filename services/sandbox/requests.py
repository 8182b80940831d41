"""Checks requests and turns them into jobs; what is wrong with a request is told field by field, all of it at once."""

from __future__ import annotations

import json
from typing import Any, cast

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.box.limits import BoxLimits
from services.sandbox.config import SandboxConfig
from services.sandbox.jobs import FunctionTest, Program, StdioTest, Submission

LANGUAGES = ("python",)
LIMIT_FIELDS = ("wall_ms", "cpu_ms", "memory_bytes", "processes", "file_bytes", "output_bytes")


def read_program(request: pb.ExecuteRequest, config: SandboxConfig) -> Program:
    """The program of an Execute request; raises InvalidArgumentError."""
    violations = _check_source(request.language, request.source, config)
    violations += [
        FieldViolation(f"args[{index}]", "must not contain NUL")
        for index, argument in enumerate(request.args)
        if "\0" in argument
    ]
    limits = _read_limits(request.limits, config, violations)
    _raise_if_any(violations)
    return Program(request.source, request.stdin, list(request.args), limits)


def read_submission(request: pb.JudgeRequest, config: SandboxConfig) -> Submission:
    """The submission of a Judge request; raises InvalidArgumentError."""
    violations = _check_source(request.language, request.source, config)
    limits = _read_limits(request.limits, config, violations)
    kinds = {test.WhichOneof("kind") for test in request.tests}
    stdio: list[StdioTest] = []
    functions: list[FunctionTest] = []
    if not request.tests:
        violations.append(FieldViolation("tests", "must not be empty"))
    elif len(request.tests) > config.max_tests:
        violations.append(
            FieldViolation("tests", f"has {len(request.tests)} tests, at most {config.max_tests} are judged at once")
        )
    elif None in kinds:
        violations.append(FieldViolation("tests", "each must have stdio or function set"))
    elif len(kinds) > 1:
        violations.append(FieldViolation("tests", "must all be stdio or all be function tests"))
    elif kinds == {"function"}:
        functions = _read_functions(request, violations)
    else:
        stdio = [StdioTest(test.stdio.stdin, test.stdio.expected_stdout) for test in request.tests]
        if request.function_name:
            violations.append(FieldViolation("function_name", "must be empty for stdio tests"))
    _raise_if_any(violations)
    return Submission(request.source, request.function_name, functions or stdio, limits, request.stop_at_first_failure)


def _read_functions(request: pb.JudgeRequest, violations: list[FieldViolation]) -> list[FunctionTest]:
    if not request.function_name.isidentifier():
        violations.append(
            FieldViolation("function_name", f"must be the name of a function, got {request.function_name!r}")
        )
    tests = []
    for index, test in enumerate(request.tests):
        field = f"tests[{index}].function"
        arguments = _read_json(test.function.arguments_json, f"{field}.arguments_json", violations)
        if not isinstance(arguments, list):
            violations.append(FieldViolation(f"{field}.arguments_json", "must be a JSON array of arguments"))
        expected = _read_json(test.function.expected_json, f"{field}.expected_json", violations)
        tests.append(FunctionTest(test.function.arguments_json.encode(), expected))
    return tests


def _read_json(text: str, field: str, violations: list[FieldViolation]) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        violations.append(FieldViolation(field, f"is not JSON: {error}"))
        return []  # keeps the checks that follow from telling the same field twice


def _check_source(language: str, source: bytes, config: SandboxConfig) -> list[FieldViolation]:
    violations = []
    if language not in LANGUAGES:
        violations.append(FieldViolation("language", f"{language!r} is unknown; known: {', '.join(LANGUAGES)}"))
    if not source:
        violations.append(FieldViolation("source", "must not be empty"))
    elif len(source) > config.max_source_bytes:
        violations.append(
            FieldViolation("source", f"has {len(source)} bytes, at most {config.max_source_bytes} are taken")
        )
    return violations


def _read_limits(limits: pb.Limits, config: SandboxConfig, violations: list[FieldViolation]) -> BoxLimits:
    values = {}
    for name in LIMIT_FIELDS:
        value = getattr(limits, name) if limits.HasField(cast(Any, name)) else getattr(config.default_limits, name)
        maximum = getattr(config.maximum_limits, name)
        if value > maximum:
            violations.append(FieldViolation(f"limits.{name}", f"is {value}, at most {maximum} is allowed"))
        elif value < _MINIMUM[name]:
            violations.append(FieldViolation(f"limits.{name}", f"is {value}, at least {_MINIMUM[name]} is needed"))
        values[name] = value
    return BoxLimits(**values)


_MINIMUM = {"wall_ms": 1, "cpu_ms": 1, "memory_bytes": 16 << 20, "processes": 1, "file_bytes": 65536, "output_bytes": 1}


def _raise_if_any(violations: list[FieldViolation]) -> None:
    if violations:
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations[:5])
        raise InvalidArgumentError(message, violations=violations)
