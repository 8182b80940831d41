"""Judging by comparisons, checkers, interactors and the caller's own Python, with points."""

from __future__ import annotations

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime import metrics
from tests.fixtures.sandbox import function_tests, stdio_tests
from tests.fixtures.sandbox_fronts import Fronts

ECHO = b"import sys; sys.stdout.write(sys.stdin.read())"


def verdicts(response: pb.JudgeResponse) -> list[str]:
    return [pb.TestVerdict.Name(result.verdict).removeprefix("TEST_VERDICT_") for result in response.results]


COMPARISONS = {
    pb.COMPARISON_EXACT: ([(b"a b\n", b"a b\n")], [(b"a b\n", b"a b"), (b"a  b", b"a b"), (b"A", b"a")]),
    pb.COMPARISON_TOKENS: (
        [(b" a\n\nb \n", b"a b")],
        [(b"ab", b"a b"), (b"b a", b"a b"), (b"a", b"a b"), (b"a b c", b"a b")],
    ),
    pb.COMPARISON_UNSPECIFIED: ([(b" a\n\nb \n", b"a b")], [(b"b a", b"a b"), (b"1.0", b"1")]),
    pb.COMPARISON_LINES: (
        [(b"a b  \nc\r\n\n\n", b"a b\nc")],
        [(b"a  b\nc", b"a b\nc"), (b"a b c", b"a b\nc"), (b"c\na b", b"a b\nc")],
    ),
    pb.COMPARISON_UNORDERED_LINES: ([(b"c\na b \n", b"a b\nc")], [(b"b a\nc", b"a b\nc"), (b"a b\nc\nc", b"a b\nc")]),
    pb.COMPARISON_UNORDERED_TOKENS: ([(b"c b\na", b"a b\nc")], [(b"a b b", b"a b c"), (b"a b c c", b"a b c")]),
}
"""For each, pairs of output and expected output that are the same to it, and pairs that are not."""


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda value: pb.Comparison.Name(value).lower())
async def test_each_comparison(fronts: Fronts, comparison: pb.Comparison.ValueType) -> None:
    same, different = COMPARISONS[comparison]
    checker = pb.Checker(comparison=comparison)
    tests = stdio_tests([*same, *different])
    response = await fronts.grpc.judge(pb.JudgeRequest(language="python", source=ECHO, tests=tests, checker=checker))
    assert verdicts(response) == ["ACCEPTED"] * len(same) + ["WRONG_ANSWER"] * len(different)
    assert response.passed == len(same)
    assert all(result.reason for result in response.results[len(same) :])


async def test_tolerances_of_numbers(fronts: Fronts) -> None:
    tests = stdio_tests(
        [(b"1.0001", b"1"), (b"1.002", b"1"), (b"1000.5 x", b"1000 x"), (b"nan", b"1"), (b"y", b"x"), (b"1 1", b"1")]
    )
    for tolerance, expected in (
        (pb.FloatTolerance(absolute=1e-3), "AWWWWW"),
        (pb.FloatTolerance(relative=1e-3), "AWAWWW"),
        (pb.FloatTolerance(absolute=1e-2, relative=1e-3), "AAAWWW"),
        (pb.FloatTolerance(), "WWWWWW"),
    ):
        request = pb.JudgeRequest(language="python", source=ECHO, tests=tests, checker=pb.Checker(floats=tolerance))
        response = await fronts.grpc.judge(request)
        assert "".join(name[0] for name in verdicts(response)) == expected
    function = pb.JudgeRequest(
        language="python",
        source=b"def f(x): return [x + 1e-7]",
        function_name="f",
        tests=function_tests([([1], [1]), ([1], [2])]),
        checker=pb.Checker(floats=pb.FloatTolerance(absolute=1e-6)),
    )
    assert verdicts(await fronts.grpc.judge(function)) == ["ACCEPTED", "WRONG_ANSWER"]


async def test_the_input_of_a_test_is_a_file(fronts: Fronts) -> None:
    source = b"import io, os, sys\nread = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\nprint(read().decode(), open('/dev/stdin').read())"  # noqa: E501
    request = pb.JudgeRequest(language="python", source=source, tests=stdio_tests([(b"1 2\n3", b"1 2 1 2 3")]))
    assert verdicts(await fronts.grpc.judge(request)) == ["ACCEPTED"]


async def test_points_names_and_arguments_of_tests(fronts: Fronts) -> None:
    source = b"import sys; print(sys.argv[1:], input())"
    first = pb.StdioTest(stdin=b"x", expected_stdout=b"['1', '2 3'] x", args=["1", "2 3"])
    tests = [
        pb.TestCase(stdio=first, points=2.5, name="a"),
        pb.TestCase(stdio=pb.StdioTest(stdin=b"x", expected_stdout=b"[] x"), points=0, name="b"),
        pb.TestCase(stdio=pb.StdioTest(stdin=b"x", expected_stdout=b"[] y"), points=4),
        pb.TestCase(stdio=pb.StdioTest(stdin=b"x", expected_stdout=b"[] x")),
    ]
    response = await fronts.grpc.judge(pb.JudgeRequest(language="python", source=source, tests=tests))
    assert verdicts(response) == ["ACCEPTED", "ACCEPTED", "WRONG_ANSWER", "ACCEPTED"]
    assert [result.points for result in response.results] == [2.5, 0, 0, 1]
    assert [result.name for result in response.results] == ["a", "b", "", ""]
    assert (response.points, response.max_points, response.passed) == (3.5, 7.5, 3)


async def test_environment_and_files_of_a_submission(fronts: Fronts) -> None:
    request = pb.JudgeRequest(
        language="python",
        source=b"import os, helper; print(os.environ['MINE'], helper.x, open('d/data').read())",
        files=[pb.File(path="helper.py", content=b"x = 1"), pb.File(path="d/data", content=b"data")],
        env={"MINE": "yes"},
        tests=stdio_tests([(b"", b"yes 1 data")] * 2),
    )
    assert verdicts(await fronts.grpc.judge(request)) == ["ACCEPTED"] * 2


CHECKERS = {
    "python": rb"""
import sys
given, output, answer = (open(path).read() for path in sys.argv[1:])
assert given == output
code, _, message = answer.partition(" ")
sys.stderr.write(message)
sys.exit(int(code))
""",
    "cpp": rb"""
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
std::string read(const char *path) {
    std::ifstream file(path);
    return std::string(std::istreambuf_iterator<char>(file), {});
}
int main(int count, char **arguments) {
    if (count != 4 || read(arguments[1]) != read(arguments[2])) return 9;
    std::string answer = read(arguments[3]);
    std::cerr << answer.substr(2);
    return std::atoi(answer.c_str());
}
""",
}
DECISIONS = [
    (b"0 well done", "ACCEPTED", 10.0, "well done"),
    (b"1 wrong", "WRONG_ANSWER", 0.0, "wrong"),
    (b"2 badly written", "WRONG_ANSWER", 0.0, "badly written"),
    (b"3 my own mistake", "UNJUDGEABLE", 0.0, "my own mistake"),
    (b"7 points 0.25 some", "WRONG_ANSWER", 2.5, "some"),
    (b"7 0.5", "WRONG_ANSWER", 5.0, "0.5"),
    (b"7 points 1", "ACCEPTED", 10.0, "points 1"),
    (b"7 no share", "UNJUDGEABLE", 0.0, "no share"),
]


@pytest.mark.parametrize("language", CHECKERS)
async def test_a_checker_decides_by_its_exit_code(fronts: Fronts, language: str) -> None:
    program = pb.Program(language=language, source=CHECKERS[language])
    tests = [
        pb.TestCase(stdio=pb.StdioTest(stdin=b"in\n", expected_stdout=answer), points=10) for answer, *_ in DECISIONS
    ]
    request = pb.JudgeRequest(language="python", source=ECHO, tests=tests, checker=pb.Checker(program=program))
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == [verdict for _, verdict, _, _ in DECISIONS]
    assert [result.points for result in response.results] == [points for _, _, points, _ in DECISIONS]
    for result, (*_, words) in zip(response.results, DECISIONS, strict=True):
        assert words in result.reason
    assert response.verdict == pb.TEST_VERDICT_WRONG_ANSWER


@pytest.mark.parametrize(
    ("source", "limits", "words"),
    [
        (b"while True: pass", pb.Limits(cpu_ms=50), "CPU limit"),
        (b"1 / 0", pb.Limits(), "ZeroDivisionError"),
        (b"def f(:", pb.Limits(), "does not compile"),
        (b"import os; os.abort()", pb.Limits(), "signal 6"),
    ],
)
async def test_a_checker_that_fails_is_no_wrong_answer(
    fronts: Fronts, source: bytes, limits: pb.Limits, words: str
) -> None:
    checker = pb.Checker(program=pb.Program(language="python", source=source, limits=limits))
    request = pb.JudgeRequest(language="python", source=ECHO, tests=stdio_tests([(b"", b"")]), checker=checker)
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["UNJUDGEABLE"]
    assert words in response.results[0].reason


async def test_a_checker_that_is_kept_from_its_work_says_nothing(fronts: Fronts) -> None:
    program = pb.Program(language="python", source=b"import time; time.sleep(9)", limits=pb.Limits(wall_ms=100))
    checker = pb.Checker(program=program)
    request = pb.JudgeRequest(language="python", source=ECHO, tests=stdio_tests([(b"1", b"1")]), checker=checker)
    assert verdicts(await fronts.grpc.judge(request)) == ["INFRA_ERROR"]


async def test_an_output_that_breaks_the_checker_is_wrong(fronts: Fronts) -> None:
    """Else an answer could have it that it is never counted as wrong."""
    source = b"import sys\na, b = (int(open(path).read()) for path in sys.argv[2:])\nsys.exit(a != b)"
    checker = pb.Checker(program=pb.Program(language="python", source=source))
    tests = stdio_tests([(b"1", b"1"), (b"x", b"1"), (b"", b"1"), (b"x", b"x")])
    request = pb.JudgeRequest(language="python", source=ECHO, tests=tests, checker=checker)
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER", "WRONG_ANSWER", "UNJUDGEABLE"]
    assert "ValueError" in response.results[1].reason
    source = b"import sys\nsys.exit(int(open(sys.argv[2]).read()) % 2)"
    request.checker.program.source = source
    del request.tests[:]
    request.tests.extend(stdio_tests([(b"4", b""), (b"x", b""), (b"", b"")]))
    assert verdicts(await fronts.grpc.judge(request)) == ["ACCEPTED", "WRONG_ANSWER", "WRONG_ANSWER"]


STARVED = b"""
import time
while True:
    end = time.thread_time() + 0.02
    while time.thread_time() < end: pass
    time.sleep(0.06)
"""


@pytest.mark.parametrize(("source", "tries"), [(STARVED, 2), (b"import time; time.sleep(9)", 1)])
async def test_a_program_that_the_clock_ends_is_told_apart_and_tried_once_more(
    fronts: Fronts, source: bytes, tries: int
) -> None:
    limits = pb.Limits(wall_ms=400)
    test = pb.TestCase(stdio=pb.StdioTest())
    judging = pb.JudgeRequest(language="python", source=source, tests=[test], limits=limits, retry_starved=True)
    before = metrics.JOBS.labels("judge", "TIME_LIMIT")._value.get()
    [result] = (await fronts.grpc.judge(judging)).results
    assert (result.verdict, result.wall_limited) == (pb.TEST_VERDICT_TIME_LIMIT, True)
    assert metrics.JOBS.labels("judge", "TIME_LIMIT")._value.get() - before == tries
    running = pb.ExecuteRequest(language="python", source=source, limits=limits, retry_starved=True)
    before = metrics.JOBS.labels("execute", "TIME_LIMIT")._value.get()
    assert (await fronts.grpc.execute(running)).wall_limited
    assert metrics.JOBS.labels("execute", "TIME_LIMIT")._value.get() - before == tries


IN_ANY_ORDER = b"""
import json, sys
arguments, result, expected = (json.load(open(path)) for path in sys.argv[1:])
assert len(expected) == arguments[0]
sys.exit(0 if sorted(result) == sorted(expected) else 1)
"""


@pytest.mark.parametrize("count", [3, 3000])
async def test_a_checker_decides_on_what_functions_return(fronts: Fronts, count: int) -> None:
    checker = pb.Checker(program=pb.Program(language="python", source=IN_ANY_ORDER))
    tests = function_tests([([count], list(range(count))), ([count], [0] * count)])
    request = pb.JudgeRequest(
        language="python",
        source=b"def f(count): return list(range(count))[::-1]",
        function_name="f",
        tests=tests,
        checker=checker,
    )
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER"]
    assert [result.output_truncated for result in response.results] == [count > 1000] * 2
    assert max(len(result.output) for result in response.results) <= 4096


INTERACTORS = {
    "python": rb"""
import sys
secret = int(open(sys.argv[1]).read())
for _ in range(20):
    guess = int(input())
    if guess == secret:
        sys.stderr.write("found " + open(sys.argv[3]).read())
        sys.exit(0)
    print("less" if secret < guess else "more", flush=True)
sys.exit(1)
""",
    "cpp": rb"""
#include <fstream>
#include <iostream>
int main(int count, char **arguments) {
    int secret, guess;
    std::ifstream(arguments[1]) >> secret;
    for (int tries = 0; tries < 20 && std::cin >> guess; tries++) {
        if (guess == secret) {
            std::cerr << "found " << std::ifstream(arguments[3]).rdbuf();
            return 0;
        }
        std::cout << (secret < guess ? "less" : "more") << std::endl;
    }
    return 1;
}
""",
}
GUESSERS = {
    "python": b"""
low, high = 1, 1000
while True:
    middle = (low + high) // 2
    print(middle, flush=True)
    try:
        hint = input()
    except EOFError:
        break
    low, high = (low, middle - 1) if hint == "less" else (middle + 1, high)
""",
    "cpp": rb"""
#include <iostream>
int main() {
    int low = 1, high = 1000;
    std::string hint;
    do {
        std::cout << (low + high) / 2 << std::endl;
        if (!(std::cin >> hint)) break;
        (hint == "less" ? high : low) = (low + high) / 2 + (hint == "less" ? -1 : 1);
    } while (true);
}
""",
}


CHECK_SAME = b"""
import sys
output, answer = (open(name).read() for name in sys.argv[2:4])
print(output, "and", answer, file=sys.stderr)
sys.exit(output != answer)
"""


@pytest.mark.parametrize("language", GUESSERS)
@pytest.mark.parametrize("interactor", INTERACTORS)
async def test_a_dialogue(fronts: Fronts, language: str, interactor: str) -> None:
    tests = [
        pb.TestCase(interactive=pb.InteractiveTest(input=str(number).encode(), answer=b"it"))
        for number in (1, 500, 1000)
    ]
    request = pb.JudgeRequest(
        language=language,
        source=GUESSERS[language],
        tests=tests,
        interactor=pb.Program(language=interactor, source=INTERACTORS[interactor]),
    )
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["ACCEPTED"] * 3
    assert [result.reason for result in response.results] == ["found it"] * 3


async def test_a_dialogue_that_is_lost(fronts: Fronts) -> None:
    interactor = pb.Program(language="python", source=INTERACTORS["python"])
    test = pb.TestCase(interactive=pb.InteractiveTest(input=b"7"))
    for source, expected in (
        (b"for _ in range(20):\n  print(1, flush=True)\n  input()", "WRONG_ANSWER"),
        (b"print(1, flush=True)\n1 / 0", "RUNTIME_ERROR"),
        (b"while True: pass", "TIME_LIMIT"),
        (b"print(", "COMPILE_ERROR"),
        (b"print('junk', flush=True)\ninput()", "WRONG_ANSWER"),
        (b"while True: print(1)", "WRONG_ANSWER"),
    ):
        request = pb.JudgeRequest(
            language="python", source=source, tests=[test], interactor=interactor, limits=pb.Limits(cpu_ms=300)
        )
        assert verdicts(await fronts.grpc.judge(request)) == [expected]


async def test_an_interactor_that_does_not_compile_judges_nothing(fronts: Fronts) -> None:
    request = pb.JudgeRequest(
        language="python",
        source=b"print(1)",
        tests=[pb.TestCase(interactive=pb.InteractiveTest(input=b"7"))],
        interactor=pb.Program(language="python", source=b"print("),
    )
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["UNJUDGEABLE"]
    assert "does not compile" in response.results[0].reason


async def test_a_checker_reads_what_the_interactor_wrote(fronts: Fronts) -> None:
    interactor = b"import sys\nsaid = input()\nopen(sys.argv[2], 'w').write(said)\nsys.exit(said == 'no')"
    request = pb.JudgeRequest(
        language="python",
        source=b"print(input())",
        tests=[pb.TestCase(interactive=pb.InteractiveTest(input=name, answer=b"5")) for name in (b"5", b"4", b"no")],
        interactor=pb.Program(language="python", source=b"print(open('input.txt').read(), flush=True)\n" + interactor),
        checker=pb.Checker(program=pb.Program(language="python", source=CHECK_SAME)),
    )
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER", "WRONG_ANSWER"]
    assert [result.reason for result in response.results] == ["5 and 5", "4 and 5", ""]
