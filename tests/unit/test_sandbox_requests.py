"""Requests become jobs, or a violation for each wrong field."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.api.requests import find_path_problem, read_job, read_submission
from services.sandbox.config import ExtraTimeConfig, LimitsConfig, SandboxConfig
from services.sandbox.languages.catalog import Catalog, load_catalog

CONFIG = SandboxConfig(max_source_bytes=100, max_tests=3, default_limits=LimitsConfig(wall_ms=123))
CATALOG = load_catalog(CONFIG)
STDIO = pb.TestCase(stdio=pb.StdioTest(stdin=b"1", expected_stdout=b"2"))
FUNCTION = pb.TestCase(function=pb.FunctionTest(arguments_json="[1, null]", expected_json="true"))


def violated(request: pb.JudgeRequest | pb.ExecuteRequest) -> dict[str, str]:
    read = read_submission if isinstance(request, pb.JudgeRequest) else read_job
    with pytest.raises(InvalidArgumentError) as error:
        read(request, CONFIG, CATALOG)  # type: ignore[operator]
    return {violation.field: violation.description for violation in error.value.violations}


def judge_request(*tests: pb.TestCase, function_name: str = "", source: bytes = b"x") -> pb.JudgeRequest:
    return pb.JudgeRequest(language="python", source=source, tests=tests, function_name=function_name)


def test_limits_are_the_request_s_or_the_default() -> None:
    request = pb.ExecuteRequest(language="python", source=b"x", limits=pb.Limits(cpu_ms=7))
    limits = read_job(request, CONFIG, CATALOG).program.limits
    assert (limits.cpu_ms, limits.wall_ms) == (7, 123)


@pytest.mark.parametrize("name", ["wall_ms", "cpu_ms", "memory_bytes", "processes", "file_bytes", "output_bytes"])
def test_each_limit_has_a_maximum_and_a_minimum(name: str) -> None:
    for value in (getattr(CONFIG.maximum_limits, name) + 1, 0):
        limits = pb.Limits(**{name: value})
        assert set(violated(pb.ExecuteRequest(language="python", source=b"x", limits=limits))) == {f"limits.{name}"}


def test_all_violations_are_reported_at_once() -> None:
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
    submission = read_submission(judge_request(FUNCTION, function_name="f"), CONFIG, CATALOG)
    assert (submission.request.tests, submission.expected) == ([FUNCTION], [True])
    assert read_submission(judge_request(STDIO), CONFIG, CATALOG).request.tests == [STDIO]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "empty"),
        ("a\0b", "NUL"),
        ("/etc/passwd", "absolute"),
        ("../x", "leaves"),
        ("a/../../x", "leaves"),
        ("a/..", "leaves"),
        (".", "is the working folder itself"),
        ("./a", "shortest form"),
        ("a//b", "shortest form"),
        ("a/", "shortest form"),
        ("x" * 256, "name of more than 255"),
        ("/".join(["d" * 200] * 6), "more than 1024"),
    ],
)
def test_paths_stay_in_the_working_folder(path: str, problem: str) -> None:
    assert problem in (find_path_problem(path) or "")
    request = pb.ExecuteRequest(language="python", source=b"x", files=[pb.File(path=path)], output_files=[path])
    assert set(violated(request)) == {"files[0].path", "output_files[0]"}


@given(st.text(max_size=30))
def test_a_path_that_is_taken_names_something_below_the_folder(path: str) -> None:
    if find_path_problem(path) is None:
        assert os.path.normpath(f"/box/{path}") == f"/box/{path}"


def test_files_are_named_once_and_not_as_the_source() -> None:
    files = [pb.File(path="a"), pb.File(path="a"), pb.File(path="main.py")]
    fields = violated(pb.ExecuteRequest(language="python", source=b"x", files=files))
    assert set(fields) == {"files[1].path", "files[2].path"}


def test_inputs_have_a_size() -> None:
    config = SandboxConfig(max_file_bytes=10)
    request = pb.ExecuteRequest(
        language="python", source=b"x", stdin=b"y" * 11, files=[pb.File(path="a", content=b"z" * 11)]
    )
    with pytest.raises(InvalidArgumentError) as error:
        read_job(request, config, CATALOG)
    assert {violation.field for violation in error.value.violations} == {"stdin", "files[0].content", "files"}


def test_files_fit_into_the_working_folder() -> None:
    most = CONFIG.default_limits.file_bytes
    large = [pb.File(path="a", content=bytes(most // 2)), pb.File(path="b", content=bytes(most // 2))]
    request = pb.ExecuteRequest(language="python", source=b"x", files=large)
    assert "raise limits.file_bytes" in violated(request)["files"]
    request.limits.file_bytes = most + (1 << 16)
    read_job(request, CONFIG, CATALOG)
    nested = [pb.File(path=f"{n}/{n}/a") for n in range(40)]
    request = pb.ExecuteRequest(language="python", files=nested, limits=pb.Limits(files=120))
    assert "40 files in 80 folders" in violated(request)["files"]


def test_a_checker_has_space_for_what_it_compares() -> None:
    test = pb.TestCase(stdio=pb.StdioTest(stdin=bytes(20 << 20), expected_stdout=b"1"))
    request = judge_request(test)
    request.checker.program.CopyFrom(pb.Program(language="python", source=b"x"))
    checker = read_submission(request, CONFIG, CATALOG).checker
    assert checker is not None
    assert checker.program.limits.file_bytes > 21 << 20
    request.tests[0].stdio.stdin = b""
    checker = read_submission(request, CONFIG, CATALOG).checker
    assert checker is not None
    assert checker.program.limits.file_bytes == CONFIG.default_limits.file_bytes


def test_an_empty_program_is_one_but_nothing_judges_by_being_empty() -> None:
    read_job(pb.ExecuteRequest(language="python"), CONFIG, CATALOG)
    request = judge_request(STDIO, source=b"")
    read_submission(request, CONFIG, CATALOG)
    request.checker.program.language = "python"
    assert set(violated(request)) == {"checker.program.source"}


def test_sources_have_any_encoding() -> None:
    read_job(pb.ExecuteRequest(language="python", source=b"x = '\xff'"), CONFIG, CATALOG)
    read_submission(judge_request(STDIO, source=b"\x80"), CONFIG, CATALOG)


def test_arguments_and_variables_fit_into_an_order() -> None:
    assert set(violated(pb.ExecuteRequest(language="python", source=b"x", args=["a" * 1000] * 40))) == {"args"}
    assert set(violated(pb.ExecuteRequest(language="python", source=b"x", env={"A": "b" * 40_000}))) == {"env"}


def test_variables_are_what_execve_takes() -> None:
    assert set(violated(pb.ExecuteRequest(language="python", source=b"x", env={"A=B": "1", "C": "\0"}))) == {
        "env",
        "env['C']",
    }


def test_checkers_and_interactors_are_read_like_programs() -> None:
    checker = pb.Checker(program=pb.Program(language="nope", source=b"x", files=[pb.File(path="/x")]))
    request = judge_request(STDIO)
    request.checker.CopyFrom(checker)
    assert set(violated(request)) == {
        "checker.program.language",
        "checker.program.files[0].path",
    }
    interactive = pb.TestCase(interactive=pb.InteractiveTest(input=b"1"))
    assert set(violated(judge_request(interactive))) == {"interactor"}
    request = judge_request(STDIO)
    request.interactor.CopyFrom(pb.Program(language="python", source=b"x"))
    assert set(violated(request)) == {"interactor"}


def test_tolerances_and_points_are_numbers() -> None:
    request = judge_request(pb.TestCase(stdio=pb.StdioTest(), points=-1))
    request.checker.floats.absolute = float("nan")
    request.checker.floats.relative = -1e-9
    assert set(violated(request)) == {"checker.floats.absolute", "checker.floats.relative", "tests[0].points"}
    submission = read_submission(judge_request(pb.TestCase(stdio=pb.StdioTest(), points=0)), CONFIG, CATALOG)
    assert submission.request.tests[0].points == 0


def test_what_is_missing_says_why() -> None:
    catalog = Catalog([], [pb.MissingRuntime(language="cobol", reason="cobc is not there: install gnucobol")])
    with pytest.raises(InvalidArgumentError, match="install gnucobol"):
        read_job(pb.ExecuteRequest(language="cobol", source=b"x"), CONFIG, catalog)


@pytest.mark.parametrize("kind", ["function", "code"])
def test_only_python_has_function_tests(kind: str) -> None:
    test = FUNCTION if kind == "function" else pb.TestCase(code=pb.CodeTest(code="assert f(1)"))
    request = pb.JudgeRequest(language="bash", source=b"x", tests=[test], function_name="f")
    assert set(violated(request)) == {"language"}


def test_what_judges_is_known() -> None:
    program = pb.Program(language="python", source=b"x", protocol=99, points_scale=99)  # type: ignore[arg-type]
    request = judge_request(STDIO)
    request.checker.program.CopyFrom(program)
    request.groups.add(name="a", policy=99)  # type: ignore[arg-type]
    assert set(violated(request)) == {
        "checker.program.protocol",
        "checker.program.points_scale",
        "groups[0].policy",
        "groups[0]",
    }


@pytest.mark.parametrize("name", ["mine", "My"])
@pytest.mark.parametrize("of_request", [True, False])
def test_extra_time_is_that_of_the_language_whatever_names_its_source_asks_for(
    tmp_path: Path, name: str, of_request: bool
) -> None:
    text = 'name: mine\naliases: [my]\ntitle: Mine\nsource: Main.java\njava_names: true\nrun: [sh, "{source}"]\n'
    (tmp_path / "mine.yaml").write_text(text)
    config = SandboxConfig(
        runtimes_path=str(tmp_path),
        default_limits=LimitsConfig(wall_ms=100, cpu_ms=50),
        extra_time={} if of_request else {name: ExtraTimeConfig(factor=2, added_ms=1)},
    )
    request = pb.JudgeRequest(language="mine", source=b"public class A {}", tests=[STDIO])
    if of_request:
        request.extra_time[name].CopyFrom(pb.ExtraTime(factor=2, added_ms=1))
    limits = read_submission(request, config, load_catalog(config)).program.limits
    assert (limits.wall_ms, limits.cpu_ms) == (201, 101)


def test_extra_time_beyond_all_numbers_is_refused() -> None:
    request = judge_request(STDIO)
    request.extra_time["python"].factor = 1e307
    assert set(violated(request)) == {"limits.wall_ms", "limits.cpu_ms"}
