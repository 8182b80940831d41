"""Checkers and interactors that attack, and submissions that attack them: who is to blame gets the blame."""

from __future__ import annotations

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import assert_serves, make_limits, read_program
from tests.fixtures.sandbox import stdio_tests

CALL_S = 110.0
HELD = {
    pb.TEST_VERDICT_WRONG_ANSWER,
    pb.TEST_VERDICT_RUNTIME_ERROR,
    pb.TEST_VERDICT_TIME_LIMIT,
    pb.TEST_VERDICT_MEMORY_LIMIT,
    pb.TEST_VERDICT_OUTPUT_LIMIT,
}
# Asks for the double of its input's number, and is prepared for everything.
INTERACTOR = b"""
import os, sys
number = int(open(sys.argv[1]).read())
try:
    os.write(1, b"%d\\n" % number)
    said = sys.stdin.buffer.readline(100)
except OSError:
    os._exit(1)
os._exit(said.strip() != b"%d" % (2 * number))
"""
# The same by somebody who thinks of no attack; slow, so that the other side is there first.
TRUSTING_INTERACTOR = b"""
import sys, time
time.sleep(1)
number = int(open(sys.argv[1]).read())
print(number, flush=True)
sys.exit(sys.stdin.readline().strip() != str(2 * number))
"""
HONEST = b"print(2 * int(input()), flush=True)"
HOSTILE_JUDGES = [
    "resources/fork_bomb.py",
    "resources/busy.py",
    "resources/asleep.py",
    "resources/memory_bomb.py",
    "resources/output_from_children.py",
    "breakouts/abort.py",
    "breakouts/kill_group.py",
    "outputs/wrong_exit_code.py",
]


async def converse(client: SandboxClient, source: bytes, interactor: bytes) -> pb.JudgeResponse:
    """Judges a submission by a dialogue about the number 21."""
    tests = [pb.TestCase(interactive=pb.InteractiveTest(input=b"21", answer=b"42"))]
    limits = make_limits("python", wall_ms=3000)
    program = pb.Program(language="python", source=interactor, limits=limits)
    request = pb.JudgeRequest(language="python", source=source, tests=tests, interactor=program, limits=limits)
    return await client.judge(request, timeout_s=CALL_S)


async def check(client: SandboxClient, source: bytes, checker: bytes) -> pb.JudgeResponse:
    """Judges a submission by a checker of one's own."""
    limits = make_limits("python", wall_ms=1500)
    program = pb.Program(language="python", source=checker, limits=limits)
    request = pb.JudgeRequest(language="python", source=source, limits=limits, checker=pb.Checker(program=program))
    request.tests.extend(stdio_tests([(b"21", b"42")]))
    return await client.judge(request, timeout_s=CALL_S)


async def test_an_honest_dialogue_passes(sandbox: SandboxClient) -> None:
    """The same dialogue can be passed, so that its refusals mean something."""
    assert (await converse(sandbox, HONEST, INTERACTOR)).verdict == pb.TEST_VERDICT_ACCEPTED
    wrong = await converse(sandbox, b"print(2 + int(input()))", INTERACTOR)
    assert wrong.verdict == pb.TEST_VERDICT_WRONG_ANSWER


@pytest.mark.parametrize(
    "program",
    [
        "resources/asleep.py",
        "resources/busy.py",
        "resources/deaf.py",
        "resources/fork_bomb.py",
        "resources/memory_bomb.py",
        "resources/output_closed.py",
        "resources/output_from_children.py",
        "resources/output_with_holes.py",
        "breakouts/abort.py",
        "breakouts/kill_group.py",
        "outputs/nothing.py",
        "outputs/verdict.py",
        "outputs/forges_descriptors.py",
        "outputs/closes_output.py",
    ],
)
async def test_a_submission_does_not_talk_its_way_out(sandbox: SandboxClient, program: str) -> None:
    response = await converse(sandbox, read_program(program), INTERACTOR)
    assert response.verdict in HELD, response
    assert (response.passed, response.points) == (0, 0)
    await assert_serves(sandbox)


@pytest.mark.parametrize(
    "program",
    ["outputs/nothing.py", "resources/output_closed.py", "resources/output_from_children.py", "breakouts/abort.py"],
)
async def test_a_submission_cannot_break_its_interactor(sandbox: SandboxClient, program: str) -> None:
    """One that leaves, hangs up or floods fails the dialogue: what becomes of the interactor then is its doing."""
    response = await converse(sandbox, read_program(program), TRUSTING_INTERACTOR)
    assert response.verdict in HELD, response
    await assert_serves(sandbox)


async def test_two_sides_that_wait_for_each_other_end(sandbox: SandboxClient) -> None:
    response = await converse(sandbox, b"input()\ninput()", INTERACTOR)
    assert response.verdict in HELD, response
    response = await converse(sandbox, b"input()", b"input()")
    assert response.verdict in {*HELD, pb.TEST_VERDICT_UNJUDGEABLE}, response
    await assert_serves(sandbox)


@pytest.mark.parametrize("sandbox", ["zygote"], indirect=True)  # containers have the same programs as checkers
@pytest.mark.parametrize("program", HOSTILE_JUDGES)
async def test_an_interactor_that_fails_is_no_wrong_answer(sandbox: SandboxClient, program: str) -> None:
    source = b"import sys\nwhile sys.stdin.buffer.read1(4096): pass"
    response = await converse(sandbox, source, read_program(program))
    assert response.verdict in (pb.TEST_VERDICT_UNJUDGEABLE, pb.TEST_VERDICT_TIME_LIMIT), response
    assert response.passed == 0
    await assert_serves(sandbox)


@pytest.mark.parametrize("program", HOSTILE_JUDGES)
async def test_a_checker_that_fails_is_no_wrong_answer(sandbox: SandboxClient, program: str) -> None:
    response = await check(sandbox, HONEST, read_program(program))
    expected = pb.TEST_VERDICT_INFRA_ERROR if program.endswith("asleep.py") else pb.TEST_VERDICT_UNJUDGEABLE
    assert response.verdict == expected, response
    assert (response.passed, response.points) == (0, 0)
    await assert_serves(sandbox)


@pytest.mark.parametrize("program", ["breakouts/processes.py", "breakouts/privileges.py", "breakouts/namespaces.py"])
async def test_a_checker_is_confined_as_any_program(sandbox: SandboxClient, program: str) -> None:
    """What the probe prints is the checker's message, by way of standard error."""
    source = read_program(program)
    probe = b"import sys\nsys.stdout = sys.stderr\n" + source + b"\nsys.stdout = sys.__stdout__\nsys.exit(1)"
    response = await check(sandbox, HONEST, probe)
    assert response.verdict == pb.TEST_VERDICT_WRONG_ANSWER, response
    assert response.results[0].reason.strip() == "held"
