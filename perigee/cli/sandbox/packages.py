"""Problems in any form that is known, and their tests made ready: inputs by generators, answers by the main solution,
inputs checked by validators.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from perigee.cli.sandbox.connection import MIB, Sandbox
from perigee.cli.sandbox.dmoj import is_dmoj, load_dmoj
from perigee.cli.sandbox.kattis import is_kattis, load_kattis
from perigee.cli.sandbox.polygon import is_polygon, load_polygon
from perigee.cli.sandbox.problem import Generation, Problem, ProgramSection, load_problem
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.making import describe_end, run_program, status_name

_KATTIS_VALID = 42
# Wall-clock limit that a program's call waits for at most.
_WALL_S = 120.0
# Standard output of a generator, the input of a test.
_OUTPUT_BYTES = 16 * MIB


def open_problem(folder: Path) -> Problem:
    """Loads a problem's folder or a package; raises InvalidArgumentError naming the file and what is wrong."""
    for fits, load in ((is_dmoj, load_dmoj), (is_polygon, load_polygon), (is_kattis, load_kattis)):
        if fits(folder):
            try:
                return load(folder)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
                reason = f"is no package that can be read: {type(error).__name__}: {' '.join(str(error).split())}"
                raise InvalidArgumentError.for_field(str(folder), reason) from error
    return load_problem(folder)


async def prepare_tests(sandbox: Sandbox, problem: Problem, validate: bool) -> list[pb.TestCase]:
    """Returns the tests with what programs of the problem make of them.

    Raises InvalidArgumentError naming a test that cannot be made, and with `validate` one that is not valid.
    """
    tests = problem.read_tests()
    for test in tests:
        if (generation := problem.generated.get(test.name)) is not None:
            await _generate(sandbox, problem, test, generation)
    if validate:
        await _validate(sandbox, problem, tests)
    return tests


async def _generate(sandbox: Sandbox, problem: Problem, test: pb.TestCase, generation: Generation) -> None:
    request = _request(problem, "generator", generation.program, generation.stdin)
    request.args[:] = [*generation.program.args, *generation.args]
    if not request.limits.HasField("output_bytes"):
        request.limits.output_bytes = _OUTPUT_BYTES
    response = await _run(sandbox, problem, request, f"the generator of test {test.name}")
    answer = response.stderr if generation.gives_answer else test.stdio.expected_stdout or test.interactive.answer
    if not answer and problem.main_solution is not None and not problem.section.interactor:
        main = problem.read_program(problem.main_solution)
        solving = pb.ExecuteRequest(language=main.language, source=main.source, stdin=response.stdout)
        solving.limits.output_bytes = _OUTPUT_BYTES
        answer = (await _run(sandbox, problem, solving, f"{main.name} on test {test.name}")).stdout
    if test.WhichOneof("kind") == "interactive":
        test.interactive.input, test.interactive.answer = response.stdout, answer
    else:
        test.stdio.stdin, test.stdio.expected_stdout = response.stdout, answer


async def _validate(sandbox: Sandbox, problem: Problem, tests: Sequence[pb.TestCase]) -> None:
    for validator in problem.section.validators:
        accepts = _KATTIS_VALID if validator.protocol == "kattis" else 0
        for test in tests:
            request = _request(problem, "validators", validator, test.stdio.stdin or test.interactive.input)
            what = f"{validator.path} on test {test.name}"
            response = await run_program(sandbox.client, request, what, _WALL_S)
            if response.exit_code != accepts:
                raise InvalidArgumentError.for_field(
                    f"{problem.label}: validators", f"{what} says that it is not valid: {describe_end(response)}"
                )


def _request(problem: Problem, key: str, section: ProgramSection, stdin: bytes) -> pb.ExecuteRequest:
    program = problem.read_helper(key, section)
    return pb.ExecuteRequest(
        language=program.language,
        source=program.source,
        files=program.files,
        args=program.args,
        limits=program.limits,
        compile_limits=program.compile_limits,
        compile_args=program.compile_args,
        stdin=stdin,
    )


async def _run(sandbox: Sandbox, problem: Problem, request: pb.ExecuteRequest, what: str) -> pb.ExecuteResponse:
    response = await run_program(sandbox.client, request, what, _WALL_S)
    if response.status != pb.STATUS_OK:
        raise InvalidArgumentError.for_field(
            problem.label, f"{what} failed: {status_name(response)}: {describe_end(response)}"
        )
    return response
