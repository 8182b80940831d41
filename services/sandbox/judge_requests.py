"""Reads Judge requests: tests of one kind, how they are checked, and what each is worth."""

from __future__ import annotations

import dataclasses
import math

from perigee.sandbox.compare import Comparison, Tolerance
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.config import SandboxConfig
from services.sandbox.jobs import (
    CodeTest,
    FunctionTest,
    How,
    InteractiveTest,
    Program,
    StdioTest,
    Submission,
    Test,
    Worth,
)
from services.sandbox.requests import Reader, read_json
from services.sandbox.runtimes import Catalog

_PATIENCE_MS = 5000
"""How much longer than the submission an interactor may take."""
_COMPARISONS = {
    pb.COMPARISON_UNSPECIFIED: Comparison.TOKENS,
    pb.COMPARISON_EXACT: Comparison.EXACT,
    pb.COMPARISON_TOKENS: Comparison.TOKENS,
    pb.COMPARISON_LINES: Comparison.LINES,
    pb.COMPARISON_UNORDERED_LINES: Comparison.UNORDERED_LINES,
    pb.COMPARISON_UNORDERED_TOKENS: Comparison.UNORDERED_TOKENS,
}


def read_submission(request: pb.JudgeRequest, config: SandboxConfig, catalog: Catalog) -> Submission:
    """The submission of a Judge request; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    program = reader.read_program(request, request.compile_limits, request.env)
    tests = read_tests(reader, request)
    how, checker = read_checker(reader, request.checker)
    interactor = None
    if request.HasField("interactor"):
        interactor = reader.read_program(request.interactor, pb.Limits(), {}, "interactor.")
    kind = find_kind(reader, request)
    if kind == "interactive" and not request.HasField("interactor"):
        reader.refuse("interactor", "is required by interactive tests")
    if kind != "interactive" and request.HasField("interactor"):
        reader.refuse("interactor", "must be empty where no test is interactive")
    if program is not None and kind in ("function", "code") and program.runtime.python is None:
        reader.refuse("language", f"{program.runtime.name} has no {kind} tests; give stdio tests")
    reader.check_key(request.idempotency_key)
    worths = [Worth(test.name, read_points(reader, index, test)) for index, test in enumerate(request.tests)]
    reader.finish()
    assert program is not None
    return Submission(
        program=program,
        tests=tests,
        worths=worths,
        how=how,
        function_name=request.function_name,
        checker=checker,
        interactor=None if interactor is None else give_patience(interactor, program.limits.wall_ms),
        setup_code=request.setup_code.encode(),
        stop_at_first_failure=request.stop_at_first_failure,
    )


def find_kind(reader: Reader, request: pb.JudgeRequest) -> str | None:
    """The kind that all tests have; None when that is wrong, which is told elsewhere."""
    kinds = {test.WhichOneof("kind") for test in request.tests}
    return next(iter(kinds)) if len(kinds) == 1 else None


def read_tests(reader: Reader, request: pb.JudgeRequest) -> list[Test]:
    """The tests, all of one kind."""
    kinds = {test.WhichOneof("kind") for test in request.tests}
    if not request.tests:
        reader.refuse("tests", "must not be empty")
    elif len(request.tests) > reader.config.max_tests:
        most = reader.config.max_tests
        reader.refuse("tests", f"has {len(request.tests)} tests, at most {most} are judged at once")
    elif None in kinds:
        reader.refuse("tests", "each must have stdio, function, code or interactive set")
    elif len(kinds) > 1:
        reader.refuse("tests", f"must all be of one kind, got {' and '.join(sorted(map(str, kinds)))} tests")
    elif kinds & {"function", "code"} and not request.function_name.isidentifier():
        reader.refuse("function_name", f"must be the name of a function, got {request.function_name!r}")
    elif not kinds & {"function", "code"} and request.function_name:
        reader.refuse("function_name", f"must be empty for {next(iter(kinds))} tests")
    else:
        return [read_test(reader, f"tests[{index}]", test) for index, test in enumerate(request.tests)]
    if kinds == {"function"}:  # what is wrong with the tests themselves is told, too
        return [read_test(reader, f"tests[{index}]", test) for index, test in enumerate(request.tests)]
    return []


def read_test(reader: Reader, field: str, test: pb.TestCase) -> Test:
    """One test."""
    match test.WhichOneof("kind"):
        case "function":
            return read_function_test(reader, f"{field}.function", test.function)
        case "code":
            code = test.code.code.encode()
            reader.check_source(f"{field}.code.code", code)
            return CodeTest(code)
        case "interactive":
            reader.check_size(f"{field}.interactive.input", test.interactive.input)
            reader.check_size(f"{field}.interactive.answer", test.interactive.answer)
            return InteractiveTest(test.interactive.input, test.interactive.answer)
    reader.check_size(f"{field}.stdio.stdin", test.stdio.stdin)
    reader.check_size(f"{field}.stdio.expected_stdout", test.stdio.expected_stdout)
    reader.check_arguments(f"{field}.stdio.args", test.stdio.args)
    return StdioTest(test.stdio.stdin, test.stdio.expected_stdout, list(test.stdio.args))


def read_function_test(reader: Reader, field: str, test: pb.FunctionTest) -> FunctionTest:
    """One call and its result."""
    arguments = read_json(reader, test.arguments_json, f"{field}.arguments_json")
    if not isinstance(arguments, list):
        reader.refuse(f"{field}.arguments_json", "must be a JSON array of arguments")
    expected = read_json(reader, test.expected_json, f"{field}.expected_json")
    return FunctionTest(test.arguments_json.encode(), expected, test.expected_json.encode())


def read_checker(reader: Reader, checker: pb.Checker) -> tuple[How, Program | None]:
    """How outputs are compared, and the caller's own checker."""
    match checker.WhichOneof("kind"):
        case "comparison":
            if checker.comparison not in _COMPARISONS:
                reader.refuse("checker.comparison", f"{checker.comparison} is unknown")
            return _COMPARISONS.get(checker.comparison, Comparison.TOKENS), None
        case "floats":
            values = {name: getattr(checker.floats, name) for name in ("absolute", "relative")}
            wrong = {name: value for name, value in values.items() if not 0 <= value < math.inf}
            for name, value in wrong.items():
                reader.refuse(f"checker.floats.{name}", f"must be a number of at least 0, got {value}")
            return Tolerance() if wrong else Tolerance(**values), None
        case "program":
            program = reader.read_program(checker.program, pb.Limits(), {}, "checker.program.")
            return Comparison.TOKENS, program
    return Comparison.TOKENS, None


def read_points(reader: Reader, index: int, test: pb.TestCase) -> float:
    """What a test is worth."""
    if not test.HasField("points"):
        return 1.0
    if not 0 <= test.points < math.inf:
        reader.refuse(f"tests[{index}].points", f"must be a number of at least 0, got {test.points}")
    return test.points


def give_patience(interactor: Program, wall_ms: int) -> Program:
    """An interactor waits for its submission, so it may take longer."""
    longest = max(interactor.limits.wall_ms, wall_ms + _PATIENCE_MS)
    return dataclasses.replace(interactor, limits=dataclasses.replace(interactor.limits, wall_ms=longest))
