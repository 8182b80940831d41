"""`perigee sandbox judge`: the solutions of a problem's folder against its tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from perigee.cli.sandbox.connection import Sandbox, wall_seconds
from perigee.cli.sandbox.problem import Problem, list_programs
from perigee.cli.sandbox.reading import check_size
from perigee.errors import InternalError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program

SOLUTIONS_FOLDER = "solutions"
# What the beginning of a solution's file name says it will get on a test at least.
EXPECTATIONS = {
    "wrong_": pb.TEST_VERDICT_WRONG_ANSWER,
    "slow_": pb.TEST_VERDICT_TIME_LIMIT,
    "big_": pb.TEST_VERDICT_MEMORY_LIMIT,
    "crash_": pb.TEST_VERDICT_RUNTIME_ERROR,
}
# Tests of one call: what is sent, and what comes back (12 KiB a test at most), fits in a message.
CALL_BYTES = 2 << 20
CALL_TESTS = 250
# A call's deadline beyond the tests' own limits: its place in the queue, its compiler, checkers.
QUEUE_S = 300.0
COMPILE_S = 60.0


@dataclass(frozen=True)
class Judgement:
    """A solution and what it got."""

    solution: Program
    response: pb.JudgeResponse

    @property
    def expected(self) -> pb.TestVerdict.ValueType:
        """What the solution's file name says."""
        name = PurePosixPath(self.solution.name).name
        found = (verdict for prefix, verdict in EXPECTATIONS.items() if name.startswith(prefix))
        return next(found, pb.TEST_VERDICT_ACCEPTED)

    @property
    def sandbox_failed(self) -> bool:
        """Whether a test has no verdict because the sandbox failed."""
        return any(result.verdict in _FAILURES for result in self.response.results)

    @property
    def as_expected(self) -> bool:
        """Accepted, or failed in the way that the file name says."""
        if self.expected == pb.TEST_VERDICT_ACCEPTED:
            return self.response.verdict == pb.TEST_VERDICT_ACCEPTED
        return not self.sandbox_failed and any(result.verdict == self.expected for result in self.response.results)


_FAILURES = (pb.TEST_VERDICT_INFRA_ERROR, pb.TEST_VERDICT_UNSPECIFIED)


def read_solutions(problem: Problem, chosen: Sequence[Path]) -> list[Program]:
    """The solutions chosen, as paths or below the problem's folder; all of them where none is.

    Raises InvalidArgumentError naming what cannot be read or has no language.
    """
    if not chosen:
        return [problem.read_program(path) for path in list_programs(problem.folder / SOLUTIONS_FOLDER, "solution")]
    return [
        problem.read_program(path if path.exists() or not (problem.folder / path).exists() else problem.folder / path)
        for path in chosen
    ]


def make_requests(problem: Problem, solution: Program, tests: Sequence[pb.TestCase]) -> list[pb.JudgeRequest]:
    """The calls that judge a solution. Raises InvalidArgumentError naming a test that is too large to be sent."""
    common = pb.JudgeRequest(
        language=solution.language,
        source=solution.source,
        function_name=problem.section.function,
        limits=problem.section.limits.to_proto(),
        checker=problem.checker(),
    )
    if problem.section.interactor:
        common.interactor.CopyFrom(problem.read_helper("interactor", problem.section.interactor))
    requests = []
    for part in _split(tests):
        request = pb.JudgeRequest(tests=part)
        request.MergeFrom(common)
        check_size(request, f"{problem.folder}: test {part[0].name} with {solution.name}")
        requests.append(request)
    return requests


def merge(responses: Sequence[pb.JudgeResponse]) -> pb.JudgeResponse:
    """The responses to parts of the tests as one."""
    whole = pb.JudgeResponse(
        verdict=next((r.verdict for r in responses if r.verdict != pb.TEST_VERDICT_ACCEPTED), pb.TEST_VERDICT_ACCEPTED),
        results=[result for response in responses for result in response.results],
        passed=sum(response.passed for response in responses),
        wall_ms=sum(response.wall_ms for response in responses),
        peak_memory_bytes=max(response.peak_memory_bytes for response in responses),
        points=sum(response.points for response in responses),
        max_points=sum(response.max_points for response in responses),
    )
    if responses[0].HasField("compile"):
        whole.compile.CopyFrom(responses[0].compile)
    return whole


async def judge(
    sandbox: Sandbox, problem: Problem, solutions: Sequence[Program], tests: Sequence[pb.TestCase]
) -> AsyncIterator[Judgement]:
    """The judgements, one after another, so that solutions do not disturb each other's times."""
    runtimes = [sandbox.find_runtime(solution.language, solution.name) for solution in solutions]
    calls = [make_requests(problem, solution, tests) for solution in solutions]
    for solution, runtime, requests in zip(solutions, runtimes, calls, strict=True):
        responses = []
        for request in requests:
            tests_s = (2 * len(request.tests) + 1) * wall_seconds(runtime, request.limits)
            response = await sandbox.client.judge(request, timeout_s=QUEUE_S + COMPILE_S + tests_s)
            _check_complete(request, response)
            responses.append(response)
        yield Judgement(solution, merge(responses))


def exit_code(judgements: Sequence[Judgement]) -> int:
    """0 where all solutions got what they should, 3 where the sandbox failed, else 1."""
    if any(judgement.sandbox_failed for judgement in judgements):
        return 3
    return 0 if all(judgement.as_expected for judgement in judgements) else 1


def to_json(problem: Problem, tests: Sequence[pb.TestCase], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What was found, for programs."""
    return {
        "problem": str(problem.folder),
        "as_expected": all(judgement.as_expected for judgement in judgements),
        "solutions": [_judgement_json(judgement, tests) for judgement in judgements],
    }


def verdict_name(verdict: pb.TestVerdict.ValueType) -> str:
    """ACCEPTED, WRONG_ANSWER, ..."""
    return pb.TestVerdict.Name(verdict).removeprefix("TEST_VERDICT_")


def _judgement_json(judgement: Judgement, tests: Sequence[pb.TestCase]) -> dict[str, Any]:
    response = judgement.response
    compiled = response.compile
    return {
        "solution": judgement.solution.name,
        "language": judgement.solution.language,
        "verdict": verdict_name(response.verdict),
        "expected": verdict_name(judgement.expected),
        "as_expected": judgement.as_expected,
        "passed": response.passed,
        "points": response.points,
        "max_points": response.max_points,
        "wall_ms": response.wall_ms,
        "peak_memory_bytes": response.peak_memory_bytes,
        "compile": {
            "exit_code": compiled.exit_code,
            "wall_ms": compiled.wall_ms,
            "stdout": compiled.stdout.decode(errors="replace"),
            "stderr": compiled.stderr.decode(errors="replace"),
        }
        if response.HasField("compile")
        else None,
        "tests": [
            {
                "name": test.name,
                "verdict": verdict_name(result.verdict),
                "points": result.points,
                "wall_ms": result.wall_ms,
                "cpu_ms": result.cpu_ms,
                "peak_memory_bytes": result.peak_memory_bytes,
                "exit_code": result.exit_code,
                "signal": result.signal,
                "reason": result.reason,
                "output": result.output.decode(errors="replace"),
                "stderr": result.stderr.decode(errors="replace"),
            }
            for test, result in zip(tests, response.results, strict=True)
        ],
    }


def _split(tests: Sequence[pb.TestCase]) -> Iterator[list[pb.TestCase]]:
    """The tests in parts that fit into a call; a test that is too large makes a part of its own."""
    part: list[pb.TestCase] = []
    size = 0
    for test in tests:
        if part and (len(part) == CALL_TESTS or size + test.ByteSize() > CALL_BYTES):
            yield part
            part, size = [], 0
        part.append(test)
        size += test.ByteSize()
    yield part


def _check_complete(request: pb.JudgeRequest, response: pb.JudgeResponse) -> None:
    if len(response.results) != len(request.tests):
        raise InternalError(f"the sandbox told {len(response.results)} results of {len(request.tests)} tests")
