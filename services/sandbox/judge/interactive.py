"""Carries a dialogue between two boxes, so that it is known how much was said and who left first.

Judges dialogues: the submission and the caller's interactor, each in a box of its own, on two pipes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from services.sandbox.judge.pairs import Pair
from services.sandbox.judge.stdio import (
    CHECKER_FILES,
    Decision,
    compiler_words,
    decide,
    open_checker,
    read_decision,
    read_outcome,
)
from services.sandbox.runtime.helper_process import BoxFailedError
from services.sandbox.runtime.jobs import CompileReport, InputFile, InteractiveTest, Submission, TestOutcome, Verdict
from services.sandbox.runtime.pool import Slot
from services.sandbox.runtime.programs import (
    LoadedProgram,
    Streams,
    explain,
    open_program,
    opened,
    read_execution,
    read_output,
)
from services.sandbox.runtime.sandboxes import Opener

PROGRAM, JUDGE = "program", "judge"
_CHUNK_BYTES = 65536


@dataclass
class Dialogue:
    """What is known of a dialogue: who left it, first things first, and whether a side said more than it may."""

    left: list[str] = field(default_factory=list)
    too_much: list[str] = field(default_factory=list)

    @property
    def program_left_first(self) -> bool:
        """Whether the submission closed its output, or its input, before the judge had closed either of its own."""
        return self.left[:1] == [PROGRAM]


class Descriptors:
    """Descriptors that are still ours to close; each is taken by whoever closes it instead."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def open_pipe(self) -> tuple[int, int]:
        """What is read from, and what is written to."""
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def take(self, descriptor: int) -> int:
        """One that is no longer ours."""
        self._open.remove(descriptor)
        return descriptor

    def close(self, *descriptors: int) -> None:
        """Closes these."""
        for descriptor in descriptors:
            os.close(self.take(descriptor))

    def close_all(self) -> None:
        """Closes what is left."""
        self.close(*self._open)


@dataclass(frozen=True)
class Ends:
    """Descriptors of the four pipes that the two boxes get."""

    program_stdin: int
    program_stdout: int
    judge_stdin: int
    judge_stdout: int
    owner: Descriptors

    def close(self) -> None:
        """Closes ours, once the boxes have theirs: each side then sees when the other is gone."""
        self.owner.close(self.program_stdin, self.program_stdout, self.judge_stdin, self.judge_stdout)


@asynccontextmanager
async def carrying(program_bytes: int, judge_bytes: int) -> AsyncIterator[tuple[Ends, Dialogue]]:
    """Pipes for both sides, carried for as long as the block lasts.

    What a side says beyond its bytes is not passed on.
    """
    pipes = Descriptors()
    dialogue = Dialogue()
    try:
        (program_in, to_program), (from_program, program_out) = pipes.open_pipe(), pipes.open_pipe()
        (judge_in, to_judge), (from_judge, judge_out) = pipes.open_pipe(), pipes.open_pipe()
        said = _Direction(PROGRAM, from_program, JUDGE, to_judge, program_bytes)
        asked = _Direction(JUDGE, from_judge, PROGRAM, to_program, judge_bytes)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_carry(dialogue, pipes, direction)) for direction in (said, asked)]
            try:
                yield Ends(program_in, program_out, judge_in, judge_out, pipes), dialogue
            finally:
                for task in tasks:
                    task.cancel()
    finally:
        pipes.close_all()


@dataclass(frozen=True)
class _Direction:
    speaker: str
    source: int
    listener: str
    sink: int
    most_bytes: int


async def _carry(dialogue: Dialogue, pipes: Descriptors, direction: _Direction) -> None:
    """One direction, until either side closes its end."""
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
            if said_bytes > direction.most_bytes:
                dialogue.too_much.append(direction.speaker)
                break
            writer.write(chunk)
            await writer.drain()
        dialogue.left.append(direction.speaker)
    except (BrokenPipeError, ConnectionResetError):
        dialogue.left.append(direction.listener)


async def judge_interactive(
    opener: Opener, submission: Submission, slot: Slot
) -> tuple[list[TestOutcome], CompileReport | None]:
    """The outcome of each dialogue, up to the first failure when that is asked for."""
    assert submission.interactor is not None
    results: list[TestOutcome] = []
    async with open_program(opener, submission.program, slot.program) as loaded:
        if not await loaded.load():
            return [], loaded.compile_report
        async with open_checker(opener, submission.interactor, slot.judge) as interactor:
            for test in submission.tests:
                assert isinstance(test, InteractiveTest)
                results.append(await hold_dialogue(loaded, interactor, test))
                if loaded.compile_report is not None and not loaded.compile_report.ok:
                    return [], loaded.compile_report
                if submission.stop_at_first_failure and results[-1].verdict is not Verdict.ACCEPTED:
                    break
    return results, loaded.compile_report


async def hold_dialogue(loaded: LoadedProgram, interactor: LoadedProgram, test: InteractiveTest) -> TestOutcome:
    """The outcome of one dialogue."""
    contents = (test.input, b"", test.answer)
    files = [InputFile(name, content) for name, content in zip(CHECKER_FILES, contents, strict=True)]
    most = (loaded.program.limits.output_bytes, interactor.program.limits.output_bytes)
    with opened(b"", b"", b"") as (errors, notes, nothing):
        async with carrying(*most) as (ends, dialogue):
            pair = Pair(
                loaded.box,
                loaded.run(Streams(ends.program_stdin, ends.program_stdout, errors)),
                interactor.box,
                interactor.run(Streams(ends.judge_stdin, ends.judge_stdout, notes), CHECKER_FILES, files),
            )
            await pair.begin()
            ends.close()
            (outcome, _), (decided, _), program_first = await pair.finish()
        if interactor.compile_report is not None and not interactor.compile_report.ok:
            raise BoxFailedError(f"the interactor does not compile: {compiler_words(interactor)}")
        if PROGRAM in dialogue.too_much and outcome.stop in (None, "told"):
            outcome = replace(outcome, stop="output")
        execution = read_execution(outcome, Streams(nothing, nothing, errors), loaded.program.limits)
        message, _ = read_output(notes, interactor.program.limits.output_bytes)
    limit = explain(decided, interactor.program.limits)
    if JUDGE in dialogue.too_much:
        limit = f"output limit of {interactor.program.limits.output_bytes} bytes"
    exit_code = -1 if decided.exit_code is None else decided.exit_code
    decision = read_decision(exit_code, decided.signal, message, limit)
    known = read_outcome(execution)
    crashed = known.verdict is Verdict.RUNTIME_ERROR and program_first
    if crashed or outcome.stop in ("wall", "cpu", "memory", "output"):
        return known
    return decide_dialogue(known, decision, dialogue)


def decide_dialogue(known: TestOutcome, decision: Decision, dialogue: Dialogue) -> TestOutcome:
    """The verdict of a dialogue in which the submission has neither passed a limit nor crashed: the interactor's.

    One that fails because the submission had left before has not failed: the submission has.
    """
    if decision.verdict is Verdict.INFRA_ERROR and dialogue.program_left_first:
        reason = f"the submission left before the dialogue was over; {decision.message}"
        return replace(known, verdict=Verdict.WRONG_ANSWER, reason=reason)
    return decide(replace(known, reason=""), decision)
