"""Submissions that want a verdict that they have not earned: tricks on the judge, and searches for the answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import (
    PROGRAMS,
    assert_serves,
    language_of,
    make_limits,
    read_program,
    run_program,
    skip_unless_there,
)
from tests.fixtures.sandbox import function_tests, stdio_tests

OUTCOMES = sorted(f"outcomes/{path.name}" for path in (PROGRAMS / "outcomes").glob("*.py"))
ANSWERS = sorted(f"answers/{path.name}" for path in (PROGRAMS / "answers").glob("*.py"))
TRICKS_ON_PROCESSES = [
    *("answers_twice", "closes_descriptors", "exit_hooks", "exits_in_call", "floods_descriptors", "forges_replies"),
    *("replaces_the_interpreter", "rewrites_replies"),
]
OUTPUTS = sorted(f"outputs/{path.name}" for path in (PROGRAMS / "outputs").glob("*.py"))
# An infrastructure error would be tried again, so a submission must not be able to cause one.
REFUSED = {
    pb.TEST_VERDICT_WRONG_ANSWER,
    pb.TEST_VERDICT_RUNTIME_ERROR,
    pb.TEST_VERDICT_TIME_LIMIT,
    pb.TEST_VERDICT_MEMORY_LIMIT,
    pb.TEST_VERDICT_OUTPUT_LIMIT,
}
CALL_S = 110.0


def code_tests(*codes: str) -> list[pb.TestCase]:
    """Tests of Python code."""
    return [pb.TestCase(code=pb.CodeTest(code=code)) for code in codes]


# The function doubles its argument.
FUNCTION_TESTS: dict[str, tuple[list[pb.TestCase], pb.Checker | None]] = {
    "values": (function_tests([([3], 6), ([5], 10)]), None),
    "floats": (function_tests([([3], 6.0), ([5], 10.0)]), pb.Checker(floats=pb.FloatTolerance(absolute=0.1, relative=0.1))),  # noqa: E501
    "asserts": (code_tests("assert f(3) == 6", "result = f(5)\nassert result == 10, result"), None),
    "check": (code_tests("def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(5) == 10"), None),
    "unittest": (
        code_tests(
            "import unittest\n\nclass Test(unittest.TestCase):\n    def test(self):\n"
            "        self.assertEqual(f(3), 6)\n\nunittest.TestCase.assertEqual(unittest.TestCase(), f(3), 6)"
        ),
        None,
    ),
}  # fmt: skip


def assert_refused(response: pb.JudgeResponse) -> None:
    """No test passed, no point was earned, and the submission is the one to blame."""
    assert response.verdict in REFUSED, response
    assert {result.verdict for result in response.results} <= REFUSED, response
    assert (response.passed, response.points) == (0, 0)


async def judge(client: SandboxClient, program: str, tests: list[pb.TestCase], **fields: Any) -> pb.JudgeResponse:
    language = language_of(program)
    request = {"language": language, "source": read_program(program), "limits": make_limits(language, cpu_ms=10_000)}
    return await client.judge(pb.JudgeRequest(**{**request, "tests": tests, **fields}), timeout_s=CALL_S)


@pytest.mark.parametrize("program", ANSWERS)
async def test_tricks_do_not_pass_for_answers(every_language: SandboxClient, program: str) -> None:
    """Not in any kind of function tests."""
    await assert_no_trick(every_language, program, list(FUNCTION_TESTS))


@pytest.mark.parametrize("sandbox", ["crun"], indirect=True)
@pytest.mark.parametrize(("program", "kind"), zip(TRICKS_ON_PROCESSES, cycle(FUNCTION_TESTS), strict=False))
async def test_tricks_on_processes_do_not_pass_in_containers(sandbox: SandboxClient, program: str, kind: str) -> None:
    """What is done to the interpreter alone is the same there."""
    await assert_no_trick(sandbox, f"answers/{program}.py", [kind])


async def assert_no_trick(client: SandboxClient, program: str, kinds: list[str]) -> None:
    """No test of the kinds passes, and the next jobs are served."""
    limits, judged = make_limits("python"), [FUNCTION_TESTS[kind] for kind in kinds]
    for response in await asyncio.gather(
        *(judge(client, program, tests, function_name="f", checker=checker, limits=limits) for tests, checker in judged)
    ):
        assert_refused(response)
    await assert_serves(client)


@pytest.mark.parametrize("program", OUTCOMES)
async def test_no_program_brings_about_what_is_not_counted(
    sandbox: SandboxClient, program: str, request: pytest.FixtureRequest
) -> None:
    """Whatever it does to itself is its own failure: no INFRA_ERROR, no UNJUDGEABLE. In a container with one kind."""
    limits = make_limits("python", wall_ms=1500)
    kinds = [("", stdio_tests([(b"", b"42")])), *(("f", FUNCTION_TESTS[kind][0][:1]) for kind in ("values", "asserts"))]
    if request.node.callspec.params["sandbox"] == "crun":
        kinds = [kinds[OUTCOMES.index(program) % len(kinds)]]
    for response in await asyncio.gather(
        *(judge(sandbox, program, tests, function_name=name, limits=limits) for name, tests in kinds)
    ):
        assert_refused(response)
    await assert_serves(sandbox)


@pytest.mark.parametrize("kind", FUNCTION_TESTS)
async def test_an_honest_answer_passes(sandbox: SandboxClient, kind: str) -> None:
    """The same tests can be passed, so that their refusals mean something."""
    tests, checker = FUNCTION_TESTS[kind]
    source = b"def f(x):\n    return 2 * x"
    response = await judge(sandbox, ANSWERS[0], tests, function_name="f", checker=checker, source=source)
    assert (response.verdict, response.passed) == (pb.TEST_VERDICT_ACCEPTED, len(tests)), response


CHECKERS = {
    "unset": None,
    **{
        pb.Comparison.Name(number).removeprefix("COMPARISON_").lower(): pb.Checker(comparison=number)
        for number in pb.Comparison.values()
        if number != pb.COMPARISON_UNSPECIFIED
    },
    "floats": pb.Checker(floats=pb.FloatTolerance(absolute=0.1, relative=0.1)),
    "program": pb.Checker(
        program=pb.Program(
            language="python",
            source=b"import sys\n_, _, output, answer = sys.argv\n"
            b"sys.exit(open(output, 'rb').read().split() != open(answer, 'rb').read().split())",
        )
    ),
}


@pytest.mark.parametrize("program", OUTPUTS)
async def test_other_outputs_do_not_pass_for_the_expected_one(every_language: SandboxClient, program: str) -> None:
    """Not with any checker; what containers do with such programs, dialogues show."""
    tests = stdio_tests([(b"", b"1 2\n"), (b"in", b"1 2\n")])
    judging = (judge(every_language, program, tests, checker=checker) for checker in CHECKERS.values())
    for response in await asyncio.gather(*judging):
        assert_refused(response)


@pytest.mark.parametrize("checker", CHECKERS)
async def test_the_expected_output_passes(sandbox: SandboxClient, checker: str) -> None:
    tests = stdio_tests([(b"", b"1 2\n"), (b"in", b"1 2\n")])
    response = await judge(sandbox, OUTPUTS[0], tests, checker=CHECKERS[checker], source=b"print('1 2')")
    assert (response.verdict, response.passed) == (pb.TEST_VERDICT_ACCEPTED, 2), response


async def test_a_program_that_ends_before_main_has_no_answer(every_language: SandboxClient) -> None:
    await skip_unless_there(every_language, "compilers/constructor_exit.c")
    assert_refused(await judge(every_language, "compilers/constructor_exit.c", stdio_tests([(b"", b"42")])))


ECHO_INTERACTOR = pb.Program(
    language="python",
    source=b"import sys\nprint('say it', flush=True)\nsaid = sys.stdin.readline().strip()\n"
    b"sys.exit(said != open(sys.argv[3]).read().strip())",
)


def holders(secret: str) -> dict[str, tuple[list[pb.TestCase], dict[str, Any]]]:
    """Every place of a request where the judge keeps what a submission must not learn."""
    stdio, code = stdio_tests([(b"", b"first"), (b"", secret.encode())]), f"assert f(2) == {secret!r}"
    interactive = [pb.TestCase(interactive=pb.InteractiveTest(input=b"1", answer=secret.encode()))]
    return {
        "stdio": (stdio, {}),
        "checker": (stdio, {"checker": CHECKERS["program"]}),
        "function": (function_tests([([1], "first"), ([2], secret)]), {"function_name": "f"}),
        "code": (code_tests("assert f(1) == 'first'", code), {"function_name": "f"}),
        "check": (code_tests(f"def check(candidate):\n    assert candidate(2) == {secret!r}"), {"function_name": "f"}),
        "setup": (
            code_tests("assert f(2) == SECRET"),
            {"function_name": "f", "setup_code": f"SECRET = {secret!r}"},
        ),
        "interactor": (interactive, {"interactor": ECHO_INTERACTOR}),
    }


@pytest.mark.parametrize("holder", holders(""))
async def test_what_is_expected_cannot_be_found(sandbox: SandboxClient, holder: str) -> None:
    await assert_hidden(sandbox, "secrets/search.py", holder)


@pytest.mark.parametrize("holder", holders(""))
async def test_what_is_expected_is_in_no_frame(every_language: SandboxClient, holder: str) -> None:
    """Containers start an interpreter for each program, so that nothing is in its memory but its own."""
    await assert_hidden(every_language, "secrets/frames.py", holder)


async def assert_hidden(client: SandboxClient, program: str, holder: str) -> None:
    """A submission that searches while its tests are judged, and a program after it, find nothing."""
    tests, fields = holders(f"sesame-{secrets.token_hex(8)}")[holder]
    assert_refused(await judge(client, program, tests, **fields))
    later = await run_program(client, program, {"cpu_ms": 10_000})
    assert later.stdout == b"nothing\n"


@pytest.mark.parametrize("holder", ["stdio", "checker", "interactor"])
@pytest.mark.parametrize("program", ["secrets/search.c", "secrets/search.sh"])
async def test_what_is_expected_cannot_be_found_in_another_language(
    every_language: SandboxClient, program: str, holder: str
) -> None:
    await skip_unless_there(every_language, program)
    tests, fields = holders(f"sesame-{secrets.token_hex(8)}")[holder]
    assert_refused(await judge(every_language, program, tests, **fields))


async def test_inputs_of_later_tests_cannot_be_found(sandbox: SandboxClient) -> None:
    secret = f"sesame-{secrets.token_hex(8)}"
    functions = function_tests([(["first"], "nothing"), ([secret], secret)])
    codes = code_tests("assert f('first') == 'nothing'", f"assert f({secret!r}) == {secret!r}")
    for program, tests in (("secrets/frames.py", functions), ("secrets/search.py", codes)):
        response = await judge(sandbox, program, tests, function_name="f")
        assert (response.verdict, response.passed) == (pb.TEST_VERDICT_ACCEPTED, 2), response


TIMES = sorted(f"times/{path.name}" for path in (PROGRAMS / "times").glob("*.py"))


@pytest.mark.parametrize("program", TIMES)
async def test_no_test_has_the_time_of_another(sandbox: SandboxClient, program: str) -> None:
    """The submission takes four times the limit for its first test, and no time for the others."""
    tests = function_tests([([number], 2 * number) for number in range(8)])
    limits = make_limits("python", wall_ms=500)
    response = await judge(sandbox, program, tests, function_name="f", limits=limits)
    assert response.verdict in REFUSED, response
    assert response.results[0].verdict != pb.TEST_VERDICT_ACCEPTED, response


Request = tuple[list[pb.TestCase], dict[str, Any]]


@pytest.mark.parametrize(
    ("program", "hide"),
    [
        ("secrets/search.py", lambda secret: (stdio_tests([(secret, secret)]), {})),
        ("secrets/search.py", lambda secret: (function_tests([([secret.decode()], secret.decode())]), {"function_name": "f"})),  # noqa: E501
        ("secrets/frames.py", lambda secret: (function_tests([([secret.decode()], secret.decode())]), {"function_name": "f"})),  # noqa: E501
    ],
    ids=["input", "argument", "frame"],
)  # fmt: skip
async def test_a_search_finds_what_its_own_box_holds(
    sandbox: SandboxClient, program: str, hide: Callable[[bytes], Request]
) -> None:
    """The searches are no failures by themselves: what is within reach they find."""
    tests, fields = hide(f"sesame-{secrets.token_hex(8)}".encode())
    response = await judge(sandbox, program, tests, **fields)
    assert response.verdict == pb.TEST_VERDICT_ACCEPTED, response


@pytest.mark.parametrize("program", ["secrets/search.c", "secrets/search.sh"])
async def test_a_search_in_another_language_finds_what_its_own_box_holds(
    every_language: SandboxClient, program: str
) -> None:
    await skip_unless_there(every_language, program)
    secret = f"sesame-{secrets.token_hex(8)}".encode()
    files = [pb.File(path="data/notes.txt", content=b"here: " + secret)]
    tests = stdio_tests([(b"", secret)])
    response = await judge(every_language, program, tests, files=files)
    assert response.verdict == pb.TEST_VERDICT_ACCEPTED, response
