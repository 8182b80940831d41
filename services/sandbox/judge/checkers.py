"""Checkers and interactors of the caller, in sandboxes of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import RunResult
from services.sandbox.judge.decisions import (
    FILES,
    JUDGE_MESSAGE,
    Decision,
    Ending,
    arguments_of,
    files_of,
    read_decision,
)
from services.sandbox.judge.groups import points_of
from services.sandbox.runtime.failure import SandboxFailedError, UnjudgeableError
from services.sandbox.runtime.jobs import Checker
from services.sandbox.runtime.programs import (
    LoadedProgram,
    Streams,
    exit_code_of,
    explain,
    is_wall_limited,
    memory_streams,
    open_program,
    read_output,
)
from services.sandbox.runtime.sandboxes import SandboxFactory
from services.sandbox.runtime.worker_slots import WorkerSlot

_TAIL_CHARACTERS = 1000
_MOST_OF = 0.8
_TRIAL_OUTPUTS = (b"", b"0\n", b"1 1\n", b"x\n")


@dataclass(frozen=True)
class OpenChecker:
    """Checker or interactor that is compiled; `passes` are those that it may ask for. The output that it leaves is kept
    for a checker where `keeps_output`.
    """

    checker: Checker
    loaded: LoadedProgram
    passes: int = 1
    keeps_output: bool = False

    async def run(
        self, streams: Streams, contents: Sequence[bytes], test: pb.TestCase, is_interactor: bool = False
    ) -> tuple[RunResult, list[pb.OutputFile]]:
        """Runs it once on the contents of the input, the output and the answer."""
        names = (FILES["input"], FILES["output"], FILES["answer"])
        files = [pb.File(path=name, content=content) for name, content in zip(names, contents, strict=True)]
        if self.checker.protocol == pb.CHECKER_PROTOCOL_KATTIS:
            files.append(pb.File(path=JUDGE_MESSAGE))  # so that its folder is there
        arguments = arguments_of(self.checker, test.checker_args, is_interactor)
        wanted = [*files_of(self.checker, self.passes), *([FILES["output"]] if self.keeps_output else [])]
        result = await self.loaded.run(streams, arguments, files, wanted, self.loaded.program.limits.file_bytes)
        check_compiled(self.loaded)
        return result

    def decide(
        self, run: RunResult, left: Sequence[pb.OutputFile], streams: Streams, test: pb.TestCase, limit: str = ""
    ) -> Decision:
        """Reads its decision from how it ended; `limit` names one that the run does not know of."""
        limits = self.loaded.program.limits
        stdout, stderr = (read_output(file, limits.output_bytes)[0] for file in (streams.stdout, streams.stderr))
        files = {file.path: file.content for file in left if not file.error}
        limit = limit or explain(run, limits)
        return read_decision(
            Ending(exit_code_of(run), run.signal, stderr, stdout, limit, files), self.checker, points_of(test)
        )


@asynccontextmanager
async def open_checker(
    factory: SandboxFactory, checker: Checker, slot: WorkerSlot, passes: int = 1, keeps_output: bool = False
) -> AsyncIterator[OpenChecker]:
    """Yields a checker or an interactor, compiled; raises as `check_compiled`."""
    async with open_program(factory, checker.program, slot) as loaded:
        await loaded.load()
        check_compiled(loaded)
        yield OpenChecker(checker, loaded, passes, keeps_output)


def check_compiled(loaded: LoadedProgram) -> None:
    """Raises UnjudgeableError for a checker or interactor that does not compile, SandboxFailedError when its
    compiler was starved.
    """
    if not loaded.compile_failed:
        return
    error = SandboxFailedError if loaded.compiler_was_starved else UnjudgeableError
    raise error(f"the checking program does not compile: {compiler_message(loaded)}")


def compiler_message(loaded: LoadedProgram) -> str:
    """Returns the end of a compiler's output."""
    compiled = loaded.compiled
    assert compiled is not None
    return (compiled.stderr or compiled.stdout).decode(errors="replace").strip()[-_TAIL_CHARACTERS:] or compiled.reason


async def run_checker(
    checker: OpenChecker, stdin: bytes, output: bytes, test: pb.TestCase, expected: bytes
) -> Decision:
    """Runs a checker on one output.

    One that fails is at fault only where it says so itself, or fails on the expected output, too, or on any where none
    is expected: a submission must not gain by what it prints. The same holds for one that passes its wall-clock limit
    twice, unless it had less CPU time than the other output takes: then others had the cores.
    """
    decision, cpu_ms = await _run_checker(checker, stdin, output, test, expected)
    if decision.verdict == pb.TEST_VERDICT_INFRA_ERROR:
        decision, again_ms = await _run_checker(checker, stdin, output, test, expected)
        cpu_ms = max(cpu_ms, again_ms)
    if decision.fraction is not None or decision.is_declared:
        return decision
    for other in [expected] if expected else [stdin, *_TRIAL_OUTPUTS]:
        tried, tried_ms = await _run_checker(checker, stdin, other, test, expected)
        if tried.verdict == pb.TEST_VERDICT_INFRA_ERROR:
            return replace(decision, verdict=tried.verdict)
        if tried.fraction is not None:
            was_starved = decision.verdict == pb.TEST_VERDICT_INFRA_ERROR and cpu_ms < _MOST_OF * tried_ms
            return decision if was_starved else replace(decision, verdict=pb.TEST_VERDICT_WRONG_ANSWER)
    return decision


async def _run_checker(
    checker: OpenChecker, stdin: bytes, output: bytes, test: pb.TestCase, expected: bytes
) -> tuple[Decision, int]:
    """Returns the decision, INFRA_ERROR where the wall clock ended the checker, and the CPU time that it took in ms."""
    reads_output = checker.checker.protocol == pb.CHECKER_PROTOCOL_KATTIS
    with memory_streams(output if reads_output else b"") as streams:
        run, left = await checker.run(streams, (stdin, output, expected), test)
        limits = checker.loaded.program.limits
        if is_wall_limited(run, limits):
            reason = f"the checker passed its {explain(run, limits)} after {run.cpu_ms} ms of CPU time"
            return Decision(pb.TEST_VERDICT_INFRA_ERROR, None, reason), run.cpu_ms
        return checker.decide(run, left, streams, test), run.cpu_ms
