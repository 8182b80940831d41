"""Judges dialogues: the submission and the caller's interactor, each in a sandbox of its own.

What they say is relayed, so that it is known how much each has said and which of them left first.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from perigee.errors import PerigeeError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge.checkers import OpenChecker, open_checker, run_checker
from services.sandbox.judge.decisions import FILES, Decision
from services.sandbox.judge.groups import Schedule, skipped_result
from services.sandbox.judge.pairs import PairedRun
from services.sandbox.judge.results import (
    UNDECIDED,
    Results,
    cut_output,
    decide,
    limit_verdict,
    run_passes,
    unjudged_result,
)
from services.sandbox.runtime.jobs import Submission
from services.sandbox.runtime.programs import LoadedProgram, Streams, open_program, opened, read_execution
from services.sandbox.runtime.sandboxes import SandboxFactory
from services.sandbox.runtime.worker_slots import SlotPair

PROGRAM, JUDGE = "program", "judge"
_CHUNK_BYTES = 65536


@dataclass
class Dialogue:
    """State of a dialogue: the sides that left it, in order, those that said something, and more than they may."""

    left: list[str] = field(default_factory=list)
    spoken: set[str] = field(default_factory=set)
    too_much: list[str] = field(default_factory=list)

    @property
    def program_left_first(self) -> bool:
        """Whether the submission closed its input or output before the judge closed its own."""
        return self.left[:1] == [PROGRAM]


class Descriptors:
    """Open descriptors of this process; one that is taken is closed by the taker."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def open_pipe(self) -> tuple[int, int]:
        """Opens a pipe; returns its read end and its write end."""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def take(self, descriptor: int) -> int:
        """Hands a descriptor over to the caller."""
        self._open.remove(descriptor)
        return descriptor

    def close(self, *descriptors: int) -> None:
        """Closes some of the descriptors."""
        for descriptor in descriptors:
            os.close(self.take(descriptor))

    def close_all(self) -> None:
        """Closes the remaining descriptors."""
        self.close(*self._open)


@dataclass(frozen=True)
class Ends:
    """Descriptors of the four pipes that the two sandboxes get."""

    program_stdin: int
    program_stdout: int
    judge_stdin: int
    judge_stdout: int
    owner: Descriptors

    def close(self) -> None:
        """Closes this process's copies, so that each sandbox sees when the other is gone."""
        self.owner.close(self.program_stdin, self.program_stdout, self.judge_stdin, self.judge_stdout)


@asynccontextmanager
async def relayed_pipes(program_bytes: int, judge_bytes: int) -> AsyncIterator[tuple[Ends, Dialogue]]:
    """Yields pipes for both sides, relayed until the block ends.

    Output of a side beyond its bytes is not passed on.
    """
    pipes = Descriptors()
    dialogue = Dialogue()
    try:
        (program_in, to_program), (from_program, program_out) = pipes.open_pipe(), pipes.open_pipe()
        (judge_in, to_judge), (from_judge, judge_out) = pipes.open_pipe(), pipes.open_pipe()
        said = _Direction(PROGRAM, from_program, JUDGE, to_judge, program_bytes)
        asked = _Direction(JUDGE, from_judge, PROGRAM, to_program, judge_bytes)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_relay(dialogue, pipes, direction)) for direction in (said, asked)]
            try:
                yield Ends(program_in, program_out, judge_in, judge_out, pipes), dialogue
            finally:
                for task in tasks:
                    task.cancel()
    except* PerigeeError as errors:  # a failure of one side, which the group of tasks has wrapped
        raise errors.exceptions[0] from None
    finally:
        pipes.close_all()


@dataclass(frozen=True)
class _Direction:
    speaker: str
    source: int
    listener: str
    sink: int
    most_bytes: int


async def _relay(dialogue: Dialogue, pipes: Descriptors, direction: _Direction) -> None:
    """Relays one direction until either side closes its end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
    source = os.fdopen(pipes.take(direction.source), "rb", buffering=0)
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    try:
        sink = os.fdopen(pipes.take(direction.sink), "wb", buffering=0)
        writing, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sink)
        try:
            await _pass_on(dialogue, direction, reader, asyncio.StreamWriter(writing, protocol, None, loop))
        finally:
            writing.close()
    finally:
        reading.close()


async def _pass_on(
    dialogue: Dialogue, direction: _Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    said_bytes = 0
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            said_bytes += len(chunk)
            dialogue.spoken.add(direction.speaker)
            if said_bytes > direction.most_bytes:
                dialogue.too_much.append(direction.speaker)
                break
            if writer.is_closing():  # uvloop refuses to write to a pipe that has lost its reader
                raise BrokenPipeError
            writer.write(chunk)
            await writer.drain()
        dialogue.left.append(direction.speaker)
    except (BrokenPipeError, ConnectionResetError):
        dialogue.left.append(direction.listener)


async def judge_interactive(factory: SandboxFactory, submission: Submission, pair: SlotPair) -> Results:
    """Returns the result of each dialogue."""
    assert submission.interactor is not None
    results: list[pb.TestResult] = []
    request, schedule = submission.request, Schedule(submission.request)
    async with open_program(factory, submission.program, pair.program) as loaded:
        if not await loaded.load():
            return [], loaded.compiled
        is_checked = submission.checker is not None
        async with open_checker(factory, submission.interactor, pair.judge, request.passes, is_checked) as interactor:

            async def run_pass(content: bytes, test: pb.TestCase) -> tuple[pb.TestResult, Decision]:
                return await run_dialogue(loaded, interactor, content, test)

            for test in request.tests:
                result = skipped_result()
                if not schedule.skips(test):
                    result = await run_passes(run_pass, test, test.interactive.input, request.passes)
                    if loaded.compile_failed:
                        return [], loaded.compiled
                schedule.note(test, result)
                results.append(result)
        if is_checked:
            await check_outputs(factory, submission, pair, results)
    return results, loaded.compiled


async def check_outputs(
    factory: SandboxFactory, submission: Submission, pair: SlotPair, results: list[pb.TestResult]
) -> None:
    """Has the caller's checker decide on what the interactor wrote about each dialogue that it accepted."""
    assert submission.checker is not None
    async with open_checker(factory, submission.checker, pair.judge) as checker:
        for result, test in zip(results, submission.request.tests, strict=True):
            if result.verdict == pb.TEST_VERDICT_ACCEPTED:
                dialogue = test.interactive
                decide(result, await run_checker(checker, dialogue.input, result.output, test, dialogue.answer))
            cut_output(result)


async def run_dialogue(
    loaded: LoadedProgram, interactor: OpenChecker, content: bytes, test: pb.TestCase
) -> tuple[pb.TestResult, Decision]:
    """Runs one dialogue; returns its result and what the interactor decided."""
    limits = interactor.loaded.program.limits
    most = (loaded.program.limits.output_bytes, limits.output_bytes)
    with opened(b"", b"", b"") as (errors, notes, nothing):
        async with relayed_pipes(*most) as (ends, dialogue):
            judging = interactor.run(
                Streams(ends.judge_stdin, ends.judge_stdout, notes), (content, b"", test.interactive.answer), test, True
            )
            paired = PairedRun(
                loaded.sandbox,
                loaded.run(Streams(ends.program_stdin, ends.program_stdout, errors)),
                interactor.loaded.sandbox,
                judging,
            )
            await paired.begin()
            ends.close()
            (run, _), (decided, left), program_first = await paired.finish()
        if PROGRAM in dialogue.too_much and run.stop in (None, "stopped"):
            run = replace(run, stop="output")
        execution = read_execution(run, Streams(nothing, nothing, errors), loaded.program.limits)
        limit = f"output limit of {limits.output_bytes} bytes" if JUDGE in dialogue.too_much else ""
        decision = interactor.decide(decided, left, Streams(nothing, nothing, notes), test, limit)
    known = unjudged_result(execution)
    crashed = known.verdict == pb.TEST_VERDICT_RUNTIME_ERROR and program_first
    if crashed or limit_verdict(run) is not None:
        return known, UNDECIDED
    if interactor.keeps_output:
        written = next((file.content for file in left if file.path == FILES["output"]), b"")
        known.output = written[: loaded.program.limits.output_bytes]  # the checker has space for as much
    return decide_dialogue(known, decision, dialogue), decision


def decide_dialogue(known: pb.TestResult, decision: Decision, dialogue: Dialogue) -> pb.TestResult:
    """Returns the interactor's decision on a submission that has neither passed a limit nor crashed.

    An interactor that fails after the submission left, or on what it said, has not failed: the submission has.
    """
    if decision.verdict == pb.TEST_VERDICT_UNJUDGEABLE:
        if dialogue.program_left_first:
            message = f"the submission left before the dialogue was over; {decision.message}"
            decision = replace(decision, verdict=pb.TEST_VERDICT_WRONG_ANSWER, message=message)
        elif PROGRAM in dialogue.spoken and not decision.is_declared:
            decision = replace(decision, verdict=pb.TEST_VERDICT_WRONG_ANSWER)
    return decide(known, decision)
