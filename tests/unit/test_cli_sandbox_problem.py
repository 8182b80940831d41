"""Problem folders: one clear line for every mistake, and the requests that a sound one makes."""

from pathlib import Path

import pytest

from perigee.cli.sandbox import judge as judging
from perigee.cli.sandbox.judge import JudgedSolution, exit_code, make_requests, merge, read_solutions
from perigee.cli.sandbox.problem import Problem, load_problem
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program


def write_problem(folder: Path, text: str = "checker: tokens\n", tests: tuple[str, ...] = ("1", "2", "10")) -> Path:
    (folder / "problem.yaml").write_text(text)
    (folder / "tests").mkdir()
    for name in tests:
        (folder / "tests" / f"{name}.in").write_text(f"[{name}]")
        (folder / "tests" / f"{name}.out").write_text(f"{name}\n")
    (folder / "checker.cpp").write_text("int main() {}")
    (folder / "testlib.h").write_text("// lib")
    (folder / "solutions").mkdir()
    (folder / "solutions" / "a.py").write_text("print(1)")
    return folder


def request_of(folder: Path, text: str) -> pb.JudgeRequest:
    problem = load_problem(write_problem(folder, text))
    (request,) = make_requests(problem, read_solutions(problem, [])[0], problem.read_tests())
    return request


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cheker: lines", "cheker: unknown key; did you mean checker?"),
        ("limits: {wall: 5}", "limits.wall: unknown key; did you mean wall_ms?"),
        ("limits: {wall_ms: 0}", "limits.wall_ms: input should be greater than or equal to 1, got 0"),
        ("checker: {floats: {absolut: 1}}", "checker.floats.absolut: unknown key; did you mean absolute?"),
        ("checker: {programm: a.cpp}", "checker.programm: unknown key; did you mean program?"),
        ("checker: line", "checker.comparison: input should be 'exact', 'tokens', 'lines', "),
        ("checker: {program: a.cpp, floats: {absolute: 1}}", "checker: must be one of floats, program"),
        ("checker: {program: gone.cpp}", "checker.program: gone.cpp is no file of this folder"),
        ("checker: {program: checker.cpp}\nfiles: [../x]", "files: '../x' must be a relative path"),
        ("interactor: checker.cpp\nfunction: f", "interactor: decides by itself"),
        ("points: {1: many}", "points.1: input should be a valid number"),
        ("points: {11: 5}", "points.11: no such test; did you mean 1?"),
        ("- 1", "must be a mapping"),
    ],
)
def test_a_mistake_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        request_of(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path / 'problem.yaml'}: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_an_empty_file_is_a_problem_with_defaults(tmp_path: Path) -> None:
    request = request_of(tmp_path, "")
    assert [test.name for test in request.tests] == ["1", "2", "10"]
    assert request.tests[2].stdio == pb.StdioTest(stdin=b"[10]", expected_stdout=b"10\n")
    assert not request.HasField("checker")
    assert not request.tests[0].HasField("points")
    assert (request.language, request.source, request.limits) == ("python", b"print(1)", pb.Limits())


@pytest.mark.parametrize(
    ("text", "checker"),
    [
        ("checker: unordered_lines", pb.Checker(comparison=pb.COMPARISON_UNORDERED_LINES)),
        ("checker: {comparison: exact}", pb.Checker(comparison=pb.COMPARISON_EXACT)),
        ("checker: {floats: {absolute: 0.5}}", pb.Checker(floats=pb.FloatTolerance(absolute=0.5))),
        (
            "checker: {program: checker.cpp}\nfiles: [testlib.h]",
            pb.Checker(
                program=pb.Program(
                    language="cpp", source=b"int main() {}", files=[pb.File(path="testlib.h", content=b"// lib")]
                )
            ),
        ),
    ],
)
def test_checkers(tmp_path: Path, text: str, checker: pb.Checker) -> None:
    assert request_of(tmp_path, text).checker == checker


def test_limits_points_language(tmp_path: Path) -> None:
    request = request_of(tmp_path, "limits: {wall_ms: 5, memory_mb: 64}\npoints: {2: 2.5}\nlanguage: pypy")
    assert request.limits == pb.Limits(wall_ms=5, memory_bytes=64 << 20)
    assert [test.points for test in request.tests if test.HasField("points")] == [2.5]
    assert request.language == "pypy"


def test_all_limits_can_be_set(tmp_path: Path) -> None:
    request = request_of(tmp_path, "limits: {cpu_ms: 6, processes: 7, file_mb: 8, output_mb: 9}")
    assert request.limits == pb.Limits(cpu_ms=6, processes=7, file_bytes=8 << 20, output_bytes=9 << 20)


def test_functions_and_dialogues(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "i").mkdir()
    function = request_of(tmp_path / "f", "function: solve")
    assert function.function_name == "solve"
    assert function.tests[0].function == pb.FunctionTest(arguments_json="[1]", expected_json="1\n")
    dialogue = request_of(tmp_path / "i", "interactor: checker.cpp")
    assert dialogue.interactor.language == "cpp"
    assert dialogue.tests[0].interactive == pb.InteractiveTest(input=b"[1]", answer=b"1\n")


@pytest.mark.parametrize(
    ("lost", "message"),
    [("1.out", "1.out: cannot be read"), ("1.in", "1.out: there is no 1.in beside it"), ("*", "holds no test")],
)
def test_a_test_in_halves_is_reported(tmp_path: Path, lost: str, message: str) -> None:
    problem = load_problem(write_problem(tmp_path))
    for path in (tmp_path / "tests").glob(lost):
        path.unlink()
    with pytest.raises(InvalidArgumentError, match=message):
        problem.read_tests()


def test_a_program_that_decides_may_do_without_answers(tmp_path: Path) -> None:
    problem = load_problem(write_problem(tmp_path, "checker: {program: checker.cpp}"))
    (tmp_path / "tests" / "1.out").unlink()
    assert problem.read_tests()[0].stdio.expected_stdout == b""


def test_solutions_are_found_from_here_and_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = load_problem(write_problem(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "b.cpp").write_text("")
    monkeypatch.chdir(elsewhere)
    found = read_solutions(problem, [Path("solutions/a.py"), Path("b.cpp")])
    assert [(program.name, program.language) for program in found] == [("solutions/a.py", "python"), ("b.cpp", "cpp")]
    with pytest.raises(InvalidArgumentError, match=r"c.py: cannot be read"):
        read_solutions(problem, [Path("c.py")])


def test_tests_are_sent_in_parts_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = load_problem(write_problem(tmp_path))
    monkeypatch.setattr(judging, "CALL_BYTES", 1000)
    monkeypatch.setattr(judging, "CALL_TESTS", 3)
    sizes = [10, 10, 10, 10, 600, 500, 2000, 10]
    tests = [pb.TestCase(name=str(number), stdio=pb.StdioTest(stdin=b"x" * size)) for number, size in enumerate(sizes)]
    solution = Program("a.py", "python", b"print(1)")
    parts = [[test.name for test in request.tests] for request in make_requests(problem, solution, tests)]
    assert parts == [["0", "1", "2"], ["3", "4"], ["5"], ["6"], ["7"]]


def test_a_test_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    problem = load_problem(write_problem(tmp_path))
    tests = [pb.TestCase(name="huge", stdio=pb.StdioTest(stdin=b"x" * (5 << 20)))]
    with pytest.raises(InvalidArgumentError, match=r"test huge with a.py: makes a request of"):
        make_requests(problem, Program("a.py", "python", b"print(1)"), tests)


def response_of(*verdicts: pb.TestVerdict.ValueType) -> pb.JudgeResponse:
    first = next((verdict for verdict in verdicts if verdict != pb.TEST_VERDICT_ACCEPTED), pb.TEST_VERDICT_ACCEPTED)
    return pb.JudgeResponse(
        verdict=first,
        results=[pb.TestResult(verdict=verdict) for verdict in verdicts],
        passed=sum(verdict == pb.TEST_VERDICT_ACCEPTED for verdict in verdicts),
        wall_ms=10,
        peak_memory_bytes=len(verdicts),
        max_points=len(verdicts),
    )


OK, WRONG, SLOW, INFRA, UNJUDGEABLE = (
    pb.TEST_VERDICT_ACCEPTED,
    pb.TEST_VERDICT_WRONG_ANSWER,
    pb.TEST_VERDICT_TIME_LIMIT,
    pb.TEST_VERDICT_INFRA_ERROR,
    pb.TEST_VERDICT_UNJUDGEABLE,
)


def test_parts_make_a_whole() -> None:
    parts = [response_of(OK, OK, OK), response_of(SLOW, OK), response_of(WRONG)]
    parts[0].compile.wall_ms = 5
    whole = merge(parts)
    assert [result.verdict for result in whole.results] == [OK, OK, OK, SLOW, OK, WRONG]
    assert (whole.verdict, whole.passed, whole.wall_ms, whole.peak_memory_bytes) == (SLOW, 4, 30, 3)
    assert (whole.max_points, whole.compile.wall_ms) == (6, 5)


@pytest.mark.parametrize(
    ("name", "verdicts", "code"),
    [
        ("a.py", [OK, OK], 0),
        ("a.py", [OK, WRONG], 1),
        ("a.py", [OK, INFRA], 3),
        ("a.py", [OK, UNJUDGEABLE], 1),
        ("wrong_a.py", [UNJUDGEABLE, WRONG], 1),
        ("wrong_a.py", [OK, WRONG], 0),
        ("wrong_a.py", [SLOW, WRONG], 0),
        ("wrong_a.py", [OK, OK], 1),
        ("wrong_a.py", [SLOW, SLOW], 1),
        ("wrong_a.py", [WRONG, INFRA], 3),
        ("slow_a.py", [OK, SLOW], 0),
        ("crash_a.py", [OK, pb.TEST_VERDICT_RUNTIME_ERROR], 0),
        ("big_a.py", [OK, pb.TEST_VERDICT_MEMORY_LIMIT], 0),
        ("wrongful.py", [OK, WRONG], 1),
    ],
)
def test_names_say_what_solutions_should_get(name: str, verdicts: list[pb.TestVerdict.ValueType], code: int) -> None:
    judged = JudgedSolution(Program(f"solutions/{name}", "python", b""), response_of(*verdicts))
    assert exit_code([judged]) == code
    assert exit_code([JudgedSolution(Program("b.py", "python", b""), response_of(OK)), judged]) == code


@pytest.mark.parametrize(
    ("verdict", "code"), [(OK, 0), (SLOW, 0), (WRONG, 1), (INFRA, 3), (pb.TEST_VERDICT_MEMORY_LIMIT, 1)]
)
def test_a_package_says_which_verdicts_a_solution_may_get(verdict: pb.TestVerdict.ValueType, code: int) -> None:
    judged = JudgedSolution(Program("wrong_a.py", "python", b""), response_of(OK, verdict), (SLOW, OK))
    assert exit_code([judged]) == code


def test_a_problem_is_a_folder_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"has no problem.yaml; name a problem's folder"):
        load_problem(tmp_path)
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        load_problem(tmp_path / "gone")
    assert isinstance(load_problem(write_problem(tmp_path)), Problem)
