"""`perigee sandbox judge` and `runtimes`: solutions against the tests of a problem, and the languages."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perigee.cli.metrics import format_seconds
from perigee.cli.sandbox.connection import (
    MIB,
    Sandbox,
    check_size,
    language_of,
    megabytes,
    open_console,
    open_sandbox,
    wall_seconds,
)
from perigee.cli.sandbox.packages import open_problem, prepare_tests
from perigee.cli.sandbox.problem import Expected, Problem, list_programs
from perigee.errors import InternalError, InvalidArgumentError
from perigee.json_codec import write_message
from perigee.rpc import MAX_MESSAGE_BYTES, ChannelOptions
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.plan import Program

SOLUTIONS_FOLDER = "solutions"
# Verdict on one test at least that the beginning of a solution's file name announces.
EXPECTATIONS = {
    "wrong_": pb.TEST_VERDICT_WRONG_ANSWER,
    "slow_": pb.TEST_VERDICT_TIME_LIMIT,
    "big_": pb.TEST_VERDICT_MEMORY_LIMIT,
    "crash_": pb.TEST_VERDICT_RUNTIME_ERROR,
}
# Bounds of one call: its request and its response (12 KiB a test at most) fit into a message.
CALL_BYTES = 2 << 20
CALL_TESTS = 250
# A call's deadline beyond the tests' own limits: the wait in the queue, the compiler, checkers.
QUEUE_S = 300.0
COMPILE_S = 60.0


@dataclass(frozen=True)
class JudgedSolution:
    """Solution with the response of the sandbox."""

    solution: Program
    response: pb.JudgeResponse
    tagged: Expected = ()
    """Verdicts of which a package says that it should get one."""

    @property
    def expected(self) -> Expected:
        """Verdicts of which the package or the solution's file name announces one."""
        name = PurePosixPath(self.solution.name).name
        found = (verdict for prefix, verdict in EXPECTATIONS.items() if name.startswith(prefix))
        return self.tagged or (next(found, pb.TEST_VERDICT_ACCEPTED),)

    @property
    def sandbox_failed(self) -> bool:
        """Whether a test has no verdict because the sandbox failed."""
        return any(result.verdict in _FAILURES for result in self.response.results)

    @property
    def unjudgeable(self) -> int:
        """Number of tests that are at fault themselves."""
        return sum(result.verdict == pb.TEST_VERDICT_UNJUDGEABLE for result in self.response.results)

    @property
    def as_expected(self) -> bool:
        """Whether it was accepted, or failed in the way that the file name announces; not where a test is at fault."""
        if self.unjudgeable:
            return False
        if self.response.verdict == pb.TEST_VERDICT_ACCEPTED:
            return pb.TEST_VERDICT_ACCEPTED in self.expected
        failures = {*self.expected} - {pb.TEST_VERDICT_ACCEPTED}
        return not self.sandbox_failed and any(result.verdict in failures for result in self.response.results)


_FAILURES = (pb.TEST_VERDICT_INFRA_ERROR, pb.TEST_VERDICT_UNSPECIFIED)


def read_solutions(problem: Problem, chosen: Sequence[Path]) -> list[Program]:
    """Reads the chosen solutions, by paths as they are or below the problem's folder; all of them when none is chosen.

    Raises InvalidArgumentError naming what cannot be read or has no language.
    """
    if not chosen and problem.solutions is not None:
        if not problem.solutions:
            raise InvalidArgumentError.for_field(problem.label, "names no solution; name one by --solution")
        return list(_read_package(problem, problem.solutions))
    if not chosen:
        return [problem.read_program(path) for path in list_programs(problem.folder / SOLUTIONS_FOLDER, "solution")]
    return [
        problem.read_program(path if path.exists() or not (problem.folder / path).exists() else problem.folder / path)
        for path in chosen
    ]


def _read_package(problem: Problem, names: Iterable[str]) -> Iterator[Program]:
    for name in names:
        try:
            language_of(PurePath(name))
        except InvalidArgumentError as error:
            _leave_out(error)
        else:
            yield problem.read_program(problem.folder / name)


def _leave_out(error: InvalidArgumentError) -> None:
    print(f"perigee: left out: {error.message}", file=sys.stderr)


def make_requests(problem: Problem, solution: Program, tests: Sequence[pb.TestCase]) -> list[pb.JudgeRequest]:
    """Returns the calls that judge a solution; raises InvalidArgumentError naming a test that is too large."""
    common = problem.request(solution)
    requests = []
    for part in [list(tests)] if common.groups else _split(tests):  # groups need each other
        request = pb.JudgeRequest(tests=part)
        request.MergeFrom(common)
        most = SandboxClient.message_bytes if common.groups else MAX_MESSAGE_BYTES
        check_size(request, f"{problem.folder}: test {part[0].name} with {solution.name}", most)
        requests.append(request)
    return requests


def merge(responses: Sequence[pb.JudgeResponse]) -> pb.JudgeResponse:
    """Merges the responses to parts of the tests."""
    whole = pb.JudgeResponse(
        verdict=next((r.verdict for r in responses if r.verdict != pb.TEST_VERDICT_ACCEPTED), pb.TEST_VERDICT_ACCEPTED),
        results=[result for response in responses for result in response.results],
        passed=sum(response.passed for response in responses),
        wall_ms=sum(response.wall_ms for response in responses),
        peak_memory_bytes=max(response.peak_memory_bytes for response in responses),
        points=sum(response.points for response in responses),
        max_points=sum(response.max_points for response in responses),
        groups=[group for response in responses for group in response.groups],
    )
    accepted = float(whole.verdict == pb.TEST_VERDICT_ACCEPTED)
    whole.score = whole.points / whole.max_points if whole.max_points else accepted
    if responses[0].HasField("compile"):
        whole.compile.CopyFrom(responses[0].compile)
    return whole


async def judge(
    sandbox: Sandbox, problem: Problem, solutions: Sequence[Program], tests: Sequence[pb.TestCase]
) -> AsyncIterator[JudgedSolution]:
    """Judges solutions one after another, so that they do not disturb each other's times."""
    runtimes = [sandbox.find_runtime(solution.language, solution.name) for solution in solutions]
    tags = problem.solutions or {}
    calls = [make_requests(problem, solution, tests) for solution in solutions]
    for solution, runtime, requests in zip(solutions, runtimes, calls, strict=True):
        responses = []
        for request in requests:
            runs = (2 * len(request.tests) + 1) * max(1, request.passes)
            tests_s = runs * wall_seconds(runtime, request.limits) * _slowest(request)
            response = await sandbox.client.judge(request, timeout_s=QUEUE_S + COMPILE_S + tests_s)
            _check_complete(request, response)
            responses.append(response)
        yield JudgedSolution(solution, merge(responses), tags.get(solution.name, ()))


def _slowest(request: pb.JudgeRequest) -> float:
    """Returns the largest factor of the time limits that extra time makes."""
    least_ms = max(1, min(request.limits.wall_ms or 1000, 1000))
    return max((max(1.0, e.factor) + e.added_ms / least_ms for e in request.extra_time.values()), default=1.0)


def exit_code(judged_solutions: Sequence[JudgedSolution]) -> int:
    """Returns 0 when all solutions are as expected, 3 when the sandbox failed, else 1."""
    if any(judged.sandbox_failed for judged in judged_solutions):
        return 3
    return 0 if all(judged.as_expected for judged in judged_solutions) else 1


def to_json(problem: Problem, tests: Sequence[pb.TestCase], judged: Sequence[JudgedSolution]) -> dict[str, Any]:
    """Returns the results as JSON, messages in the form of the HTTP gateway; verdicts are upper-case."""
    return {
        "problem": str(problem.folder),
        "as_expected": all(each.as_expected for each in judged),
        "solutions": [_solution_json(each, tests) for each in judged],
    }


def verdict_name(verdict: pb.TestVerdict.ValueType) -> str:
    """Returns ACCEPTED, WRONG_ANSWER, ..."""
    return pb.TestVerdict.Name(verdict).removeprefix("TEST_VERDICT_")


def expected_name(judged: JudgedSolution) -> str:
    """Returns the verdicts of which it should get one."""
    return " or ".join(map(verdict_name, judged.expected))


def _solution_json(judged: JudgedSolution, tests: Sequence[pb.TestCase]) -> dict[str, Any]:
    response = write_message(judged.response)
    del response["results"]
    return response | {
        "solution": judged.solution.name,
        "language": judged.solution.language,
        "verdict": verdict_name(judged.response.verdict),
        "expected": expected_name(judged),
        "as_expected": judged.as_expected,
        "tests": [
            write_message(result) | {"name": test.name, "verdict": verdict_name(result.verdict)}
            for test, result in zip(tests, judged.response.results, strict=True)
        ],
    }


def _split(tests: Sequence[pb.TestCase]) -> Iterator[list[pb.TestCase]]:
    """Splits the tests into parts that fit into a call; a larger test is a part of its own."""
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
        raise InternalError(f"the sandbox returned {len(response.results)} results of {len(request.tests)} tests")


REASON_CUT = 60
_GREEN, _RED, _YELLOW = "green", "red", "yellow"


def test_table(judged: JudgedSolution, tests: Sequence[pb.TestCase]) -> Table:
    """Returns a table with a row for each test."""
    table = Table(title=escape(judged.solution.name), title_justify="left")
    table.add_column("test")
    table.add_column("verdict")
    for heading in ("wall", "CPU", "memory", "points"):
        table.add_column(heading, justify="right")
    table.add_column("reason")
    for test, result in zip(tests, judged.response.results, strict=True):
        table.add_row(
            escape(test.name),
            _colored(result.verdict),
            f"{result.wall_ms} ms",
            f"{result.cpu_ms} ms",
            megabytes(result.peak_memory_bytes),
            f"{result.points:g}",
            escape(" ".join(result.reason.split())[:REASON_CUT]),
        )
    for group in judged.response.groups:
        points = f"{group.points:g} of {group.max_points:g}"
        table.add_row(escape(group.name), _colored(group.verdict), "", "", "", points, f"{group.passed} accepted")
    return table


def show_tests(console: Console, judged: JudgedSolution, tests: Sequence[pb.TestCase]) -> None:
    """Prints the table, and the output of the compiler when it failed."""
    console.print(test_table(judged, tests))
    response = judged.response
    if response.verdict == pb.TEST_VERDICT_COMPILE_ERROR and response.HasField("compile"):
        output = response.compile.stderr or response.compile.stdout
        console.print(output.decode(errors="replace").rstrip(), markup=False, soft_wrap=True)


def solution_line(judged: JudgedSolution) -> str:
    """Returns a line of markup about a solution."""
    response = judged.response
    line = (
        f"{escape(judged.solution.name)}: {_colored(response.verdict)}, "
        f"{response.passed} of {len(response.results)} tests, {response.points:g} of {response.max_points:g} points, "
        f"{format_seconds(response.wall_ms / 1000)}"
    )
    if judged.unjudgeable:
        return f"{line} [{_YELLOW}]({judged.unjudgeable} cannot be judged, whatever the solution)[/]"
    if judged.expected == (pb.TEST_VERDICT_ACCEPTED,) or judged.sandbox_failed:
        return line
    if judged.as_expected:
        return f"{line} [{_GREEN}](as its name says)[/]"
    return f"{line} [{_RED}](its name says {expected_name(judged)})[/]"


def runtime_table(response: pb.ListRuntimesResponse) -> Table:
    """Returns a table with a row for each runtime, and for each that is missing."""
    table = Table()
    for heading in ("language", "version", "isolation", "offers"):
        table.add_column(heading)
    for heading in ("wall", "CPU", "memory"):
        table.add_column(heading, justify="right")
    for runtime in response.runtimes:
        names = ", ".join([runtime.language, *runtime.aliases])
        offers = {"compiled": runtime.compiled, "sessions": runtime.sessions, "functions": runtime.functions}
        default, maximum = runtime.default_limits, runtime.maximum_limits
        table.add_row(
            escape(names),
            escape(runtime.version),
            escape(runtime.isolation),
            ", ".join(name for name, is_offered in offers.items() if is_offered),
            f"{default.wall_ms / 1000:g} s (max {maximum.wall_ms / 1000:g})",
            f"{default.cpu_ms / 1000:g} s (max {maximum.cpu_ms / 1000:g})",
            f"{default.memory_bytes / MIB:g} MiB (max {maximum.memory_bytes / MIB:g})",
        )
    for missing in response.missing:
        table.add_row(f"[{_YELLOW}]{escape(missing.language)}[/]", f"[{_YELLOW}]missing: {escape(missing.reason)}[/]")
    return table


def _colored(verdict: pb.TestVerdict.ValueType) -> str:
    name = verdict_name(verdict)
    if verdict == pb.TEST_VERDICT_ACCEPTED:
        return f"[{_GREEN}]{name}[/]"
    is_grey = verdict in (*_FAILURES, pb.TEST_VERDICT_UNJUDGEABLE, pb.TEST_VERDICT_SKIPPED)
    return f"[{_YELLOW if is_grey else _RED}]{name}[/]"


async def list_runtimes(address: str, channel: ChannelOptions, as_json: bool) -> int:
    """Prints the runtimes and returns the exit code."""
    console = open_console()
    async with open_sandbox(address, channel) as sandbox:
        if as_json:
            console.print_json(data=write_message(sandbox.runtimes))
        else:
            console.print(runtime_table(sandbox.runtimes))
    return 0


async def judge_folder(
    address: str, channel: ChannelOptions, folder: Path, chosen: Sequence[Path], as_json: bool, validate: bool = False
) -> int:
    """Prints a table for each solution as it is judged, then a line for each; returns the exit code."""
    problem = open_problem(folder)
    solutions = read_solutions(problem, chosen)
    console = open_console()
    judged_solutions = []
    async with open_sandbox(address, channel) as sandbox:
        if problem.solutions is not None and not chosen:
            solutions = known_to(sandbox, problem, solutions)
        tests = await prepare_tests(sandbox, problem, validate)
        async for judged in judge(sandbox, problem, solutions, tests):
            judged_solutions.append(judged)
            if not as_json:
                show_tests(console, judged, tests)
    if as_json:
        console.print_json(data=to_json(problem, tests, judged_solutions))
    else:
        for judged in judged_solutions:
            console.print(solution_line(judged))
    return exit_code(judged_solutions)


def known_to(sandbox: Sandbox, problem: Problem, solutions: Sequence[Program]) -> list[Program]:
    """Returns a package's solutions in languages that the sandbox has, and names the others on standard error.

    Raises InvalidArgumentError when none is left.
    """
    known = []
    for solution in solutions:
        try:
            sandbox.find_runtime(solution.language, solution.name)
            known.append(solution)
        except InvalidArgumentError as error:
            _leave_out(error)
    if not known:
        raise InvalidArgumentError.for_field(problem.label, "names no solution in a language of this sandbox")
    return known
